// KL estimators from log-probabilities, a vector of tokens at a time. What lies beyond the last whole vector goes through one
// of its own, so that a token's bits do not depend on where it stands.
//
// In fp32, where d's own rounding is what the promise allows. In fp64, lane by lane, where that is not enough: a ratio whose
// powers may overflow before they are weighted, and what is clamped, or so near a limit that rounding would decide it.
#include "cpu/kernels/kl_from_logprobs.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/doubles.h"
#include "cpu/kernels/upstream.h"
#include "cpu/kernels/vec.h"
#include "math/kl_arguments.h"
#include "math/log_ratio.h"
#include "math/log_sigmoid.h"

namespace lsc {
namespace LSC_ISA {

constexpr float kLargestRatio = 40, kLargestLogWeight = 4;  // in fp32: their powers and their products are finite

// What math/kl.h asks of a vector of floats, and its k3 with the series of fp32.
inline Vec exponential(Vec a) { return exp_pair(min(Vec(2 * kLargestRatio), a), Vec(0.0f)); }

inline K3<Vec> k3(Vec d) {
  const Mask small = abs(d) < Vec(kSmallLogRatio);
  const Vec series = d * d * expm1_remainder(d);
  if (all(small)) return {series, d - series};
  const Vec one(1.0f), e = exponential(Vec(0.0f) - d);
  return {select(small, series, (e - one) + d), select(small, d - series, one - e)};
}

namespace {

constexpr int kTile = 512, kLanes = Vec::kLanes;

// Tokens one after the other; each null where it is not given.
struct Tokens {
  const float *logprobs, *ref_logprobs, *old_logprobs, *grad;
  const bool* mask;

  Tokens from(int64_t first) const {
    const auto at = [&](const auto* start) { return start ? start + first : nullptr; };
    return {at(logprobs), at(ref_logprobs), at(old_logprobs), at(grad), at(mask)};
  }
  Mask counted() const { return mask ? load(mask) : Vec(0.0f) == Vec(0.0f); }
};

Tokens tokens_of(const LogprobInputs& in) { return {in.logprobs, in.ref_logprobs, in.how.old_logprobs, nullptr, in.mask}; }

// The last n < kLanes tokens, in arrays that hold a whole vector. What follows them does not count.
struct Remainder {
  float logprobs[kLanes] = {}, ref_logprobs[kLanes] = {}, old_logprobs[kLanes] = {}, grad[kLanes] = {};
  bool mask[kLanes] = {};

  Tokens copied(const Tokens& from, int n) {
    const auto copy = [&](const auto* source, auto* here) {
      if (source) std::copy_n(source, n, here);
      return source ? here : nullptr;
    };
    if (!from.mask) std::fill_n(mask, n, true);
    copy(from.mask, mask);
    return {copy(from.logprobs, logprobs), copy(from.ref_logprobs, ref_logprobs), copy(from.old_logprobs, old_logprobs),
            copy(from.grad, grad), mask};
  }
};

// Calls each(tokens, number of the first, how many) for a vector of them at a time.
template <typename Each>
inline void for_each_vector(const Tokens& tokens, int64_t count, const Each& each) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) each(tokens.from(i), i, kLanes);
  if (i == count) return;
  Remainder remainder;
  each(remainder.copied(tokens.from(i), int(count - i)), i, int(count - i));
}

inline void write(float* to, int n, Vec values) { n == kLanes ? store(to, values) : store_first(to, n, values); }

inline void bring(const float* from, Vec& lanes) { lanes = load(from); }
inline void bring(const float* from, Doubles& lanes) { lanes = load_doubles(from); }

template <typename V>
inline KLValue<V> value_at(const Tokens& in, const KLOptions& options) {
  V logprob, ref_logprob, old;
  bring(in.logprobs, logprob), bring(in.ref_logprobs, ref_logprob);
  if (in.old_logprobs) bring(in.old_logprobs, old);
  return kl_of_logprobs(logprob, ref_logprob, in.old_logprobs ? &old : nullptr, options);
}

// What a clamp leaves as it is, whichever way x was rounded.
class Unclamped {
 public:
  Unclamped(double low, double high) : low_(float(low + margin(low))), high_(float(high - margin(high))) {}

  Mask holds(Vec x) const { return both(low_ < x, x < high_); }

 private:
  static double margin(double limit) { return std::isfinite(limit) ? 1e-5 * std::fabs(limit) : 0.0; }

  Vec low_, high_;
};

class Estimator {
 public:
  explicit Estimator(const KLArguments& how)
      : options_(options_of(how)), ratio_(how.ratio_low, how.ratio_high), estimate_(how.kl_low, how.kl_high) {}

  Vec kl(const Tokens& in, Mask counted) const {
    const KLValue<Vec> value = value_at<Vec>(in, options_);
    const Mask settled = suits(in, value, counted);
    if (all(settled)) return value.kl;
    float exact[kLanes];
    for_doubles(in, [&](const KLValue<Doubles>& value, int at) { store_rounded(exact + at, value.kl); });
    return select(settled, value.kl, load(exact));
  }

  struct Gradients {
    Vec logprob, ref;
  };
  Gradients gradients(const Tokens& in, Mask counted) const {
    const KLValue<Vec> value = value_at<Vec>(in, options_);
    const Vec zero(0.0f), grad = load(in.grad);
    Gradients to{grad * value.on_logprob, zero - grad * value.on_ratio};
    const Mask settled = suits(in, value, counted);
    if (!all(settled)) {
      float logprob[kLanes], ref[kLanes];
      for_doubles(in, [&](const KLValue<Doubles>& value, int at) {
        const Doubles grad = load_doubles(in.grad + at);
        store_rounded(logprob + at, grad * value.on_logprob);
        store_rounded(ref + at, Doubles(0.0) - grad * value.on_ratio);
      });
      to = {select(settled, to.logprob, load(logprob)), select(settled, to.ref, load(ref))};
    }
    // an overflowed slope that nobody asked for is not NaN
    const Mask unasked = grad == zero;
    return {select(unasked, zero, to.logprob), select(unasked, zero, to.ref)};
  }

 private:
  // Where fp32 will do, or nothing counts.
  Mask suits(const Tokens& in, const KLValue<Vec>& value, Mask counted) const {
    const Vec zero(0.0f), logprob = load(in.logprobs), ref_logprob = load(in.ref_logprobs);
    const Vec d = select(logprob == ref_logprob, zero, logprob - ref_logprob);
    Mask suits = both(abs(d) < Vec(kLargestRatio), both(ratio_.holds(d), estimate_.holds(value.estimate)));
    if (in.old_logprobs) suits = both(suits, abs(logprob - load(in.old_logprobs)) < Vec(kLargestLogWeight));
    return in.mask ? either(suits, select(counted, Vec(1.0f), zero) == zero) : suits;
  }

  template <typename Each>
  void for_doubles(const Tokens& in, const Each& each) const {
    for (int at = 0; at < kLanes; at += Doubles::kLanes) each(value_at<Doubles>(in.from(at), options_), at);
  }

  const KLOptions options_;
  const Unclamped ratio_, estimate_;
};

}  // namespace

void kl_forward(const LogprobInputs& in, const LogprobOutputs& out, int64_t begin, int64_t end) {
  const Estimator estimator(in.how);
  const Vec zero(0.0f);
  for_each_vector(tokens_of(in).from(begin), end - begin, [&](const Tokens& here, int64_t at, int n) {
    const Mask counted = here.counted();
    const auto put = [&](float* to, Vec values) {
      if (to) write(to + begin + at, n, select(counted, values, zero));
    };
    put(out.kl, any(counted) ? estimator.kl(here, counted) : zero);
    put(out.logprobs, load(here.logprobs));
    put(out.ref_logprobs, load(here.ref_logprobs));
  });
}

void kl_backward(const LogprobInputs& in, const Upstream& grad, const LogprobGradients& out, int64_t begin, int64_t end) {
  const Estimator estimator(in.how);
  const Vec zero(0.0f);
  UpstreamTile<kTile> given(grad);
  for (int64_t first = begin; first < end; first += kTile) {
    const int count = int(std::min<int64_t>(kTile, end - first));
    Tokens tile = tokens_of(in).from(first);
    tile.grad = given.along(first, count);
    for_each_vector(tile, count, [&](const Tokens& here, int64_t at, int n) {
      const Mask counted = here.counted();
      const auto to = any(counted) ? estimator.gradients(here, counted) : Estimator::Gradients{zero, zero};
      const auto put = [&](float* gradient, Vec values) {
        if (gradient) write(gradient + first + at, n, select(counted, values, zero));
      };
      put(out.logprobs, to.logprob);
      put(out.ref_logprobs, to.ref);
    });
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
