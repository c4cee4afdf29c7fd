// KL estimators of one token, from d = log pi(a) - log pi_ref(a), and what their gradients need.
//
//     d clamped to log_ratio_clamp -> value -> clamped to kl_clamp -> times exp(log pi(a) - old)
#pragma once

#include <cmath>
#include <cstdint>

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

enum class Kind : int64_t { k1, abs, k2, k3, full, full_reverse };

struct KLOptions {
  Kind kind;
  bool straight_through;
  double ratio_low, ratio_high, kl_low, kl_high;

  LSC_FN bool divergence() const { return kind == Kind::full || kind == Kind::full_reverse; }
};

// The value, and the factors of the upstream gradient on the way to d, to the divergence, and to log pi(a): through d and
// through the weight. All are 0 where the element is clamped.
template <typename Real>
struct KLValue {
  Real kl, on_ratio, on_divergence, on_logprob;
};

template <typename Real>
LSC_FN inline Real clamp(Real value, Real low, Real high) {
  return value < low ? low : value > high ? high : value;
}

// expm1(-d) + d, without the cancellation of small d
template <typename Real>
LSC_FN inline Real k3(Real d) {
  if (std::fabs(d) < Real(0.01)) {
    return d * d * (Real(0.5) + d * (Real(-1) / 6 + d * (Real(1) / 24 + d * (Real(-1) / 120 + d * (Real(1) / 720 - d / 5040)))));
  }
  return std::isinf(d) ? Real(INFINITY) : std::expm1(-d) + d;
}

// `divergence` is the row's full KL where that is what was asked for; log_weight = log pi(a) - old, 0 for none.
template <typename Real>
LSC_FN inline KLValue<Real> evaluate_kl(Real d, Real divergence, const Real* log_weight, const KLOptions& options) {
  const bool ratio_outside = d < Real(options.ratio_low) || d > Real(options.ratio_high);
  const Real ratio = clamp(d, Real(options.ratio_low), Real(options.ratio_high));
  Real value = divergence, slope = 0;
  switch (options.kind) {
    case Kind::k1: value = ratio, slope = 1; break;
    case Kind::abs: value = std::fabs(ratio), slope = Real((ratio > 0) - (ratio < 0)); break;
    case Kind::k2: value = ratio * ratio / 2, slope = ratio; break;
    case Kind::k3: value = k3(ratio), slope = -std::expm1(-ratio); break;
    case Kind::full:
    case Kind::full_reverse: break;
  }
  const bool sampled = options.straight_through || !options.divergence();
  if (options.straight_through) slope = ratio;
  const bool inside = !ratio_outside && !(value < Real(options.kl_low)) && !(value > Real(options.kl_high));
  const Real weight = log_weight ? std::exp(*log_weight) : Real(1);
  const Real kl = clamp(value, Real(options.kl_low), Real(options.kl_high)) * weight;
  if (!inside) return {kl, 0, 0, 0};
  const Real on_ratio = sampled ? weight * slope : 0;
  Real on_logprob = log_weight ? on_ratio + kl : on_ratio;
  // slope and value, which for a negative d are huge and cancel
  if (log_weight && options.kind == Kind::k3 && !options.straight_through) on_logprob = weight * ratio;
  return {kl, on_ratio, sampled ? 0 : weight, on_logprob};
}

}  // namespace LSC_ISA
}  // namespace lsc
