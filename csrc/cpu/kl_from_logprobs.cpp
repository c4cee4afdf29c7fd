// kl_from_logprobs on the CPU, from float32 log-probabilities.
//
// Forward reads 2 floats and writes 1 per token; backward reads 3 and writes each wanted gradient.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/kl_from_logprobs.h"
#include "cpu/tensors.h"
#include "tensors/kl.h"
#include "tensors/upstream.h"

namespace lsc {

constexpr int64_t kTokensPerTask = 2048;

static Tensor kl_from_logprobs_forward(
    Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, int64_t kind,
    bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp) {
  const Tensor policy = dense(logprobs), ref = dense(ref_logprobs);
  const auto counted = dense(mask), old = dense(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);
  const Tensor kl = empty_large(policy.sizes(), torch::headeronly::ScalarType::Float);
  const LogprobInputs in{floats(policy), floats(ref), data_or_null<bool>(counted), options};
  auto* forward = LSC_DISPATCH_ISA(kl_forward);
  torch::stable::parallel_for(0, kl.numel(), kTokensPerTask, [&](int64_t begin, int64_t end) {
    forward(in, {floats(kl), nullptr, nullptr}, begin, end);
  });
  return kl;
}

static std::tuple<Tensor, Tensor> kl_from_logprobs_backward(
    Tensor grad, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs,
    int64_t kind, bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp, bool want_logprobs, bool want_ref) {
  const UpstreamTensor upstream(grad);
  const Tensor policy = dense(logprobs), ref = dense(ref_logprobs);
  const auto counted = dense(mask), old = dense(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);
  const auto gradient = [&](bool wanted) {
    return wanted ? empty_large(policy.sizes(), torch::headeronly::ScalarType::Float) : nothing();
  };
  const Tensor to_logprobs = gradient(want_logprobs), to_ref = gradient(want_ref);
  const LogprobInputs in{floats(policy), floats(ref), data_or_null<bool>(counted), options};
  const LogprobGradients out{want_logprobs ? floats(to_logprobs) : nullptr, want_ref ? floats(to_ref) : nullptr};
  auto* backward = LSC_DISPATCH_ISA(kl_backward);
  torch::stable::parallel_for(0, policy.numel(), kTokensPerTask, [&](int64_t begin, int64_t end) {
    backward(in, upstream.kernel, out, begin, end);
  });
  return {to_logprobs, to_ref};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("kl_from_logprobs_forward(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? old_logprobs, int kind,"
        " bool straight_through, float[]? log_ratio_clamp, float[]? kl_clamp) -> Tensor");
  m.def("kl_from_logprobs_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask,"
        " Tensor? old_logprobs, int kind, bool straight_through, float[]? log_ratio_clamp, float[]? kl_clamp,"
        " bool want_logprobs, bool want_ref) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("kl_from_logprobs_forward", TORCH_BOX(&kl_from_logprobs_forward));
  m.impl("kl_from_logprobs_backward", TORCH_BOX(&kl_from_logprobs_backward));
}

}  // namespace lsc
