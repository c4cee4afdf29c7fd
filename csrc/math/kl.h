// KL estimators of one token, from d = log pi(a) - log pi_ref(a), and what their gradients need.
//
//     d clamped to log_ratio_clamp -> value -> clamped to kl_clamp -> times exp(log pi(a) - old)
#pragma once

#include <cmath>
#include <cstdint>

#include "math/fn.h"
#include "math/one_lane.h"

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
// through the weight. All are 0 where the element is clamped. `estimate` is the value before kl_clamp and weight.
template <typename V>
struct KLValue {
  V kl, on_ratio, on_divergence, on_logprob, estimate;
};

// NaN stays.
template <typename V>
LSC_FN inline V clamp(V value, V low, V high) {
  return select(value < low, low, select(high < value, high, value));
}

template <typename V>
struct K3 {
  V value, slope;  // expm1(-d) + d, -expm1(-d)
};

// For small d by the series of the value, whose two terms would cancel; the slope there is d - value.
template <typename V>
LSC_FN inline K3<V> k3(V d) {
  const auto small = abs(d) < V(0.25);
  V rest = V(1.0 / 720) - d * V(1.0 / 5040);
  rest = V(-1.0 / 120) + d * rest;
  rest = V(1.0 / 24) + d * rest;
  rest = V(-1.0 / 6) + d * rest;
  const V series = d * d * (V(0.5) + d * rest);
  if (all(small)) return {series, d - series};
  const V one(1.0), e = exponential(V(0.0) - d);
  const V value = select(abs(d) == V(INFINITY), V(INFINITY), (e - one) + d);
  return {select(small, series, value), select(small, d - series, one - e)};
}

// `divergence` is the row's full KL where that is what was asked for; log_weight = log pi(a) - old, null for none.
// V is double or a vector: what it needs is in math/one_lane.h, and its k3 above.
template <typename V>
LSC_FN inline KLValue<V> evaluate_kl(V d, V divergence, const V* log_weight, const KLOptions& options) {
  const V zero(0.0), one(1.0);
  const V ratio_low(options.ratio_low), ratio_high(options.ratio_high), kl_low(options.kl_low), kl_high(options.kl_high);
  const V ratio = clamp(d, ratio_low, ratio_high);
  V value = divergence, slope = zero;
  switch (options.kind) {
    case Kind::k1: value = ratio, slope = one; break;
    case Kind::abs: value = abs(ratio), slope = select(ratio < zero, V(-1.0), select(zero < ratio, one, zero)); break;
    case Kind::k2: value = V(0.5) * (ratio * ratio), slope = ratio; break;
    case Kind::k3: {
      const K3<V> both = k3(ratio);
      value = both.value, slope = both.slope;
      break;
    }
    case Kind::full:
    case Kind::full_reverse: break;
  }
  const bool sampled = options.straight_through || !options.divergence();
  if (options.straight_through) slope = ratio;
  const auto outside = either(either(d < ratio_low, ratio_high < d), either(value < kl_low, kl_high < value));
  const V weight = log_weight ? exponential(*log_weight) : one;
  const V kl = clamp(value, kl_low, kl_high) * weight;
  const V on_ratio = sampled ? weight * slope : zero;
  V on_logprob = log_weight ? on_ratio + kl : on_ratio;
  // slope and value, which for a negative d are huge and cancel
  if (log_weight && options.kind == Kind::k3 && !options.straight_through) on_logprob = weight * ratio;
  return {kl, select(outside, zero, on_ratio), sampled ? zero : select(outside, zero, weight), select(outside, zero, on_logprob), value};
}

}  // namespace LSC_ISA
}  // namespace lsc
