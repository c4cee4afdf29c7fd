// The recursion of gae as maps that compose, so that a sequence can be taken in parts.
//
//     R_t = r_t + U_n,  U_t = c R_t + k V_t        c = gamma lam,  k = gamma (1 - lam),  n the next position
//
// U is what a position passes to the one before it: counted, it is the map U -> c U + (c r + k V); a hole is U times 1, c or 0.
// The gradients run the other way, with G -> c G + g.
#pragma once

#include "math/fn.h"
#include "math/holes.h"

namespace lsc {
namespace LSC_ISA {

// A coefficient of 0 takes nothing, not even NaN.
LSC_FN inline double times(double coefficient, double x) { return coefficient == 0 ? 0.0 : coefficient * x; }

// x -> factor x + term, factor >= 0.
struct Affine {
  double factor, term;
};

LSC_FN inline double applied(const Affine& map, double x) { return map.term + times(map.factor, x); }

// First the inner map, then the outer. A product that underflows still takes NaN.
LSC_FN inline Affine composed(const Affine& inner, const Affine& outer) {
  const double product = outer.factor * inner.factor;
  const double factor = outer.factor == 0 || inner.factor == 0 ? 0.0 : product < 0x1p-1022 ? 0x1p-1022 : product;
  return {factor, applied(outer, inner.term)};
}

struct Recursion {
  double gamma, of_return, of_value, of_hole;

  LSC_FN Recursion(double discount, double lam, Holes holes)
      : gamma(discount), of_return(discount * lam), of_value(discount * (1.0 - lam)),
        of_hole(holes == Holes::skip ? 1.0 : holes == Holes::zero ? of_return : 0.0) {}

  LSC_FN Affine counted(double reward, double value) const { return {of_return, times(of_return, reward) + times(of_value, value)}; }
  LSC_FN Affine counted_backward(double upstream) const { return {of_return, upstream}; }
  LSC_FN Affine hole() const { return {of_hole, 0.0}; }
};

}  // namespace LSC_ISA
}  // namespace lsc
