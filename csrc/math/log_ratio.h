// The log ratio of two logits about a centre, exactly, and the series that keep small log ratios small.
// Templated over float and the vector type of the instruction set.
#pragma once

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

// (x - y) - c, c in two floats, with one rounding at the end: e is what the subtraction x - y rounded away. Neither
// (x - c) - y nor x - (y + c) is safe, and no compiler may reassociate this.
template <typename F>
LSC_FN inline F centred_difference(F x, F y, F c, F c_low) {
  const F s = x - y;
  const F t = s - x;
  const F e = (x - (s - t)) - (y + t);
  return (s - c) + (e - c_low);
}

// |delta| below which the series holds
constexpr float kSmallLogRatio = 0.7f;

// P(delta) = (expm1(-delta) + delta) / delta^2 for |delta| < 0.7: minimax, relative error 2e-7.
template <typename F>
LSC_FN inline F expm1_remainder(F delta) {
  F p = fma(F(-0x1.a18294p-13f), delta, F(0x1.70e0bap-10f));
  p = fma(p, delta, F(-0x1.1114eap-7f));
  p = fma(p, delta, F(0x1.554e54p-5f));
  p = fma(p, delta, F(-0x1.55554ap-3f));
  return fma(p, delta, F(0x1.000004p-1f));
}

// The same for |delta| < 0.5, with one multiply-add less: relative error 8e-7.
constexpr float kSmallerLogRatio = 0.5f;

template <typename F>
LSC_FN inline F expm1_remainder_of_smaller(F delta) {
  F p = fma(F(0x1.6cc3a8p-10f), delta, F(-0x1.1319d0p-7f));
  p = fma(p, delta, F(0x1.555708p-5f));
  p = fma(p, delta, F(-0x1.55534ep-3f));
  return fma(p, delta, F(0x1.fffffep-2f));
}

}  // namespace LSC_ISA
}  // namespace lsc
