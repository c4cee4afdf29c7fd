// KL estimators from log-probabilities, element by element, in double: per-token tensors are small beside the logits
// they came from.
#include "cpu/kernels/kl_from_logprobs.h"

#include "math/kl.h"

namespace lsc {
namespace LSC_ISA {

namespace {

KLValue<double> value_at(const float* logprobs, const float* ref_logprobs, const KLArguments& a, const KLOptions& options, int64_t i) {
  const double logprob = logprobs[i], ref_logprob = ref_logprobs[i];
  // equal log-probabilities give 0, also where both are -inf
  const double d = logprob == ref_logprob ? 0 : logprob - ref_logprob;
  const double log_weight = a.old_logprobs ? logprob - a.old_logprobs[i] : 0;
  return evaluate_kl<double>(d, 0, a.old_logprobs ? &log_weight : nullptr, options);
}

KLOptions options_of(const KLArguments& a) {
  return {Kind(a.kind), a.straight_through, a.ratio_low, a.ratio_high, a.kl_low, a.kl_high};
}

}  // namespace

void kl_forward(const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* kl, int64_t begin, int64_t end) {
  const KLOptions options = options_of(arguments);
  for (int64_t i = begin; i < end; ++i) {
    kl[i] = mask && !mask[i] ? 0.0f : float(value_at(logprobs, ref_logprobs, arguments, options, i).kl);
  }
}

void kl_backward(const float* grad, const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* to_logprobs, float* to_ref, int64_t begin, int64_t end) {
  const KLOptions options = options_of(arguments);
  for (int64_t i = begin; i < end; ++i) {
    to_logprobs[i] = to_ref[i] = 0;
    if ((mask && !mask[i]) || grad[i] == 0) continue;
    const KLValue<double> value = value_at(logprobs, ref_logprobs, arguments, options, i);
    to_logprobs[i] = float(grad[i] * (value.on_ratio + value.through_weight));
    to_ref[i] = float(-grad[i] * value.on_ratio);
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
