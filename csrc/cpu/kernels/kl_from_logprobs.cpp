// KL estimators from log-probabilities, a vector of tokens at a time. What lies beyond the last whole vector goes through one
// of its own, so that a token's bits do not depend on where it stands.
#include "cpu/kernels/kl_from_logprobs.h"

#include <algorithm>

#include "cpu/kernels/doubles.h"
#include "math/kl_arguments.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kLanes = Doubles::kLanes;

// Tokens one after the other; each null where it is not given.
struct Tokens {
  const float *logprobs, *ref_logprobs, *old_logprobs, *grad;
  const bool* mask;
};

struct Gradients {
  Doubles logprob, ref;
};

inline KLValue<Doubles> value_at(const Tokens& in, int64_t i, const KLOptions& options) {
  Doubles old;
  if (in.old_logprobs) old = load_doubles(in.old_logprobs + i);
  return kl_of_logprobs(
      load_doubles(in.logprobs + i), load_doubles(in.ref_logprobs + i), in.old_logprobs ? &old : nullptr, options);
}

inline Doubles kl_at(const Tokens& in, int64_t i, const KLOptions& options) {
  const Doubles kl = value_at(in, i, options).kl;
  return in.mask ? select(load_chosen(in.mask + i), kl, Doubles(0.0)) : kl;
}

inline Gradients gradients_at(const Tokens& in, int64_t i, const KLOptions& options) {
  const KLValue<Doubles> value = value_at(in, i, options);
  const Doubles zero(0.0), grad = load_doubles(in.grad + i);
  Gradients to{grad * value.on_logprob, zero - grad * value.on_ratio};
  // an overflowed slope that nobody asked for is not NaN
  const Chosen unasked = grad == zero;
  to = {select(unasked, zero, to.logprob), select(unasked, zero, to.ref)};
  if (!in.mask) return to;
  const Chosen counted = load_chosen(in.mask + i);
  return {select(counted, to.logprob, zero), select(counted, to.ref, zero)};
}

// The last n < kLanes tokens, in arrays that hold a whole vector.
struct Remainder {
  float logprobs[kLanes] = {}, ref_logprobs[kLanes] = {}, old_logprobs[kLanes] = {}, grad[kLanes] = {};
  bool mask[kLanes] = {};

  Tokens copied(const Tokens& from, int64_t first, int64_t n) {
    const auto copy = [&](const auto* source, auto* here) {
      if (source) std::copy_n(source + first, n, here);
      return source ? here : nullptr;
    };
    return {copy(from.logprobs, logprobs), copy(from.ref_logprobs, ref_logprobs), copy(from.old_logprobs, old_logprobs),
            copy(from.grad, grad), copy(from.mask, mask)};
  }
};

}  // namespace

void kl_forward(const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* kl, int64_t begin, int64_t end) {
  const KLOptions options = options_of(arguments);
  const Tokens in{logprobs, ref_logprobs, arguments.old_logprobs, nullptr, mask};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) store_rounded(kl + i, kl_at(in, i, options));
  if (i == end) return;
  Remainder remainder;
  float last[kLanes];
  store_rounded(last, kl_at(remainder.copied(in, i, end - i), 0, options));
  std::copy_n(last, end - i, kl + i);
}

void kl_backward(const float* grad, const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* to_logprobs, float* to_ref, int64_t begin, int64_t end) {
  const KLOptions options = options_of(arguments);
  const Tokens in{logprobs, ref_logprobs, arguments.old_logprobs, grad, mask};
  const auto write = [](const Gradients& to, float* logprob, float* ref) {
    if (logprob) store_rounded(logprob, to.logprob);
    if (ref) store_rounded(ref, to.ref);
  };
  const auto at = [](float* gradient, int64_t i) { return gradient ? gradient + i : nullptr; };
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) write(gradients_at(in, i, options), at(to_logprobs, i), at(to_ref, i));
  if (i == end) return;
  Remainder remainder;
  float last[kLanes], last_ref[kLanes];
  write(gradients_at(remainder.copied(in, i, end - i), 0, options), last, last_ref);
  if (to_logprobs) std::copy_n(last, end - i, to_logprobs + i);
  if (to_ref) std::copy_n(last_ref, end - i, to_ref + i);
}

}  // namespace LSC_ISA
}  // namespace lsc
