// The recursion of gae as maps that compose, so that a sequence can be taken in parts.
//
//     R_t = r_t + U_n,  U_t = c R_t + k V_t        c = gamma lam,  k = gamma (1 - lam),  n the next position
//
// U is what a position passes to the one before it: counted, it is the map U -> c U + (c r + k V); a hole is U times 1, c or 0.
// The gradients run the other way, with G -> c G + g.
#pragma once

#include "math/fn.h"
#include "math/holes.h"
#include "math/one_lane.h"

namespace lsc {
namespace LSC_ISA {

// V is double, or a vector of them: what it needs is in math/one_lane.h. A coefficient of 0 takes nothing, not even NaN.
template <typename V>
LSC_FN inline V times(V coefficient, V x) {
  return select(coefficient == V(0.0), V(0.0), coefficient * x);
}

// x -> factor x + term, factor >= 0.
template <typename V>
struct AffineOf {
  V factor, term;
};
using Affine = AffineOf<double>;

template <typename V>
LSC_FN inline V applied(const AffineOf<V>& map, V x) {
  return map.term + times(map.factor, x);
}

// First the inner map, then the outer. A product that underflows still takes NaN.
template <typename V>
LSC_FN inline AffineOf<V> composed(const AffineOf<V>& inner, const AffineOf<V>& outer) {
  const V zero(0.0), smallest(0x1p-1022), product = outer.factor * inner.factor;
  const auto nothing = either(outer.factor == zero, inner.factor == zero);
  const V factor = select(nothing, zero, select(product < smallest, smallest, product));
  return {factor, applied(outer, inner.term)};
}

struct Recursion {
  double gamma, of_return, of_value, of_hole;

  LSC_FN Recursion(double discount, double lam, Holes holes)
      : gamma(discount), of_return(discount * lam), of_value(discount * (1.0 - lam)),
        of_hole(holes == Holes::skip ? 1.0 : holes == Holes::zero ? of_return : 0.0) {}

  // What a counted position adds to what it passes on.
  template <typename V>
  LSC_FN V term(V reward, V value) const {
    return times(V(of_return), reward) + times(V(of_value), value);
  }
  LSC_FN Affine counted(double reward, double value) const { return {of_return, term(reward, value)}; }
  LSC_FN Affine counted_backward(double upstream) const { return {of_return, upstream}; }
  LSC_FN Affine hole() const { return {of_hole, 0.0}; }
};

}  // namespace LSC_ISA
}  // namespace lsc
