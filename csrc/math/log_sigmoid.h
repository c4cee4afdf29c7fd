// The log-sigmoid-centred transform and its derivative.
//
// Design constraint: u and du/dz keep a relative error of 4e-7 for every z, and u is about -e^-z for large z. There an
// error of z in its last place, half an ulp of 80 for instance, is already 4e-6 of u. So z comes as a pair, z + low,
// and low goes into the exponential after its argument has been reduced. Nothing is subtracted that cancels:
// log(sigmoid(z)) and logaddexp, done literally, do.
//
// V is a vector of floats, or float: what it needs is in cpu/kernels/vec.h.
#pragma once

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

// e^(x + low) for x < 80, 0 far below, and a small low. e^r = 1 + r + r^2 q(r), |r| <= ln(2)/2, q minimax of degree 4 (3e-9).
template <typename V>
LSC_FN inline V exp_pair(V x, V low) {
  const V limited = max(V(kExp2Floor * 0x1.62e43p-1f), x);
  const V n = round(limited * V(0x1.715476p+0f));
  // ln 2 in two parts, the first short enough for its product with n to be exact
  const V r = fma(n, V(-0x1.7f7d1cp-20f), fma(n, V(-0x1.62e4p-1f), limited)) + low;
  V q = fma(V(0x1.6a23eep-10f), r, V(0x1.123a0cp-7f));
  q = fma(q, r, V(0x1.5558f2p-5f));
  q = fma(q, r, V(0x1.555492p-3f));
  q = fma(q, r, V(0x1.fffffcp-2f));
  return scale2(fma(r * r, q, r) + V(1.0f), n);
}

// log(1 + x) for 0 <= x <= 1, as x + x^2 g(x), g minimax of degree 8 (5e-9).
template <typename V>
LSC_FN inline V log1p_unit(V x) {
  V g = fma(V(-0x1.b2f368p-9f), x, V(0x1.4b0706p-6f));
  g = fma(g, x, V(-0x1.d8620ap-5f));
  g = fma(g, x, V(0x1.b57936p-4f));
  g = fma(g, x, V(-0x1.3a7a58p-3f));
  g = fma(g, x, V(0x1.935c92p-3f));
  g = fma(g, x, V(-0x1.ff26dep-3f));
  g = fma(g, x, V(0x1.554df0p-2f));
  g = fma(g, x, V(-0x1.ffffd2p-2f));
  return fma(x * x, g, x);
}

template <typename V>
struct Utility {
  V value, slope;  // u, du/dz
};

// e^-|z + low|
template <typename V>
LSC_FN inline V exp_minus_abs(V z, V low) {
  return exp_pair(V(0.0f) - abs(z), select(z < V(0.0f), low, V(0.0f) - low));
}

// The same where the sign of low does not matter for z < 0, as it is far below what is added to e then.
template <typename V>
LSC_FN inline V exp_minus_abs_above(V z, V low) {
  return exp_pair(V(0.0f) - abs(z), V(0.0f) - low);
}

// u = min(z, 0) - log1p(e^-|z|)
template <typename V>
LSC_FN inline V log_sigmoid(V z, V low) {
  return min(V(0.0f), z) - log1p_unit(exp_minus_abs_above(z, low));
}

// du/dz = sigmoid(-z)
template <typename V>
LSC_FN inline V log_sigmoid_slope(V z, V low) {
  const V e = exp_minus_abs_above(z, low);
  return select(z < V(0.0f), V(1.0f), e) / (V(1.0f) + e);
}

// The rate f at which a judge is wrong, in the forms the transform needs it in.
template <typename V>
struct Floor {
  V rate, complement;     // f, 1 - f
  V log_rate, log_low;    // log f as a pair; anything finite where f = 0
};

// u = log(f + (1 - f) sigmoid(z)) and du/dz. With e = e^-|z|:
//
//     1 - sigmoid(z) is the odds w against, over 1 + w:   u = -log1p(w),
//     w = (1 - f) e / (1 + f e)  for z >= 0,   (1 - f) / (f + e)  for z < 0
//
// which is used while w <= 1. Beyond, z < 0 and u = log(f + e) - log1p(e), where log(f + e) is taken from the larger of
// its two terms, so that neither a tiny f nor a tiny e is lost:
//
//     log(f + e) = max(z, log f) + log1p(e^-|z - log f|)
//     du/dz = (1 - f) e / ((1 + e)(1 + f e))  for z >= 0,   (1 - f) share / (1 + e)  for z < 0,
//     share = e / (f + e) = sigmoid(z - log f)
//
// f = 0 is left to the plain transform, for the sake of z = -inf.
template <typename V>
LSC_FN inline Utility<V> log_sigmoid_with_floor(V z, V low, const Floor<V>& floor) {
  const V zero(0.0f), one(1.0f);
  const auto below = z < zero;
  const V e = exp_minus_abs(z, low);

  // z - log f with what the subtraction rounds away
  const V distance = z - floor.log_rate;
  const V back = distance - z;
  const V rounded = (z - (distance - back)) - (floor.log_rate + back);
  const V distance_low = select(abs(distance) < V(1e3f), rounded + low - floor.log_low, zero);
  const V smaller = exp_minus_abs(distance, distance_low);
  const V share = select(distance < zero, smaller, one) / (one + smaller);

  const V against = select(below, floor.complement / (floor.rate + e),
                           floor.complement * e / fma(floor.rate, e, one));
  const V far = max(floor.log_rate, z) + log1p_unit(smaller) - log1p_unit(e);
  const V value = select(one < against, far, zero - log1p_unit(min(one, against)));
  const V slope = floor.complement * select(below, share, e / fma(floor.rate, e, one)) / (one + e);
  const auto plain = floor.rate == zero;
  return {select(plain, min(zero, z) - log1p_unit(e), value),
          select(plain, select(below, one, e) / (one + e), slope)};
}

}  // namespace LSC_ISA
}  // namespace lsc
