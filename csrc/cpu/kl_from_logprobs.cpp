// kl_from_logprobs on the CPU, from float32 log-probabilities.
//
// Forward reads 2 floats and writes 1 per token; backward reads 3 and writes 2.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/kl_from_logprobs.h"
#include "cpu/tensors.h"

namespace lsc {

constexpr int64_t kTokensPerTask = 2048;

static Tensor kl_from_logprobs_forward(
    Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, int64_t kind,
    bool straight_through, double ratio_low, double ratio_high, double kl_low, double kl_high) {
  const Tensor policy = dense(logprobs), ref = dense(ref_logprobs);
  const auto counted = dense(mask), old = dense(old_logprobs);
  const KLArguments options{kind, straight_through, ratio_low, ratio_high, kl_low, kl_high, data_or_null<float>(old)};
  const Tensor kl = empty_large(policy.sizes(), torch::headeronly::ScalarType::Float);
  auto* forward = LSC_DISPATCH_ISA(kl_forward);
  torch::stable::parallel_for(0, kl.numel(), kTokensPerTask, [&](int64_t begin, int64_t end) {
    forward(static_cast<float*>(policy.data_ptr()), static_cast<float*>(ref.data_ptr()), data_or_null<bool>(counted), options,
            static_cast<float*>(kl.data_ptr()), begin, end);
  });
  return kl;
}

static std::tuple<Tensor, Tensor> kl_from_logprobs_backward(
    Tensor grad, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs,
    int64_t kind, bool straight_through, double ratio_low, double ratio_high, double kl_low, double kl_high) {
  const Tensor upstream = dense(grad), policy = dense(logprobs), ref = dense(ref_logprobs);
  const auto counted = dense(mask), old = dense(old_logprobs);
  const KLArguments options{kind, straight_through, ratio_low, ratio_high, kl_low, kl_high, data_or_null<float>(old)};
  const Tensor to_logprobs = empty_large(policy.sizes(), torch::headeronly::ScalarType::Float);
  const Tensor to_ref = empty_large(policy.sizes(), torch::headeronly::ScalarType::Float);
  auto* backward = LSC_DISPATCH_ISA(kl_backward);
  torch::stable::parallel_for(0, upstream.numel(), kTokensPerTask, [&](int64_t begin, int64_t end) {
    backward(static_cast<float*>(upstream.data_ptr()), static_cast<float*>(policy.data_ptr()), static_cast<float*>(ref.data_ptr()),
             data_or_null<bool>(counted), options, static_cast<float*>(to_logprobs.data_ptr()),
             static_cast<float*>(to_ref.data_ptr()), begin, end);
  });
  return {to_logprobs, to_ref};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("kl_from_logprobs_forward(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? old_logprobs, int kind,"
        " bool straight_through, float ratio_low, float ratio_high, float kl_low, float kl_high) -> Tensor");
  m.def("kl_from_logprobs_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask,"
        " Tensor? old_logprobs, int kind, bool straight_through, float ratio_low, float ratio_high, float kl_low,"
        " float kl_high) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("kl_from_logprobs_forward", TORCH_BOX(&kl_from_logprobs_forward));
  m.impl("kl_from_logprobs_backward", TORCH_BOX(&kl_from_logprobs_backward));
}

}  // namespace lsc
