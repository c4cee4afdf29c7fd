// KL estimators from log-probabilities, element by element, in double: per-token tensors are small beside the logits
// they came from.
#include "cpu/kernels/kl_from_logprobs.h"

#include "math/kl_arguments.h"

namespace lsc {
namespace LSC_ISA {

void kl_forward(const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* kl, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    kl[i] = mask && !mask[i] ? 0.0f : float(value_at(logprobs[i], ref_logprobs[i], arguments, i).kl);
  }
}

void kl_backward(const float* grad, const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments& arguments, float* to_logprobs, float* to_ref, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    to_logprobs[i] = to_ref[i] = 0;
    if ((mask && !mask[i]) || grad[i] == 0) continue;
    const KLValue<double> value = value_at(logprobs[i], ref_logprobs[i], arguments, i);
    to_logprobs[i] = float(grad[i] * value.on_logprob);
    to_ref[i] = float(-grad[i] * value.on_ratio);
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
