// token_kl on the CPU: KL, both log-probabilities and the entropy.
//
// Forward reads 2 N V logits, writes 4 N floats and what backward needs, [N, 14]. Backward reads N V (2 N V for a full
// divergence or a gradient to the reference) and writes each wanted gradient once.
#include <torch/csrc/stable/library.h>

#include "cpu/token_tensors.h"
#include "tensors/kl.h"

namespace lsc {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_kl_forward(
    Tensor policy_logits, Tensor ref_logits, Tensor actions, std::optional<Tensor> mask,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> temperatures, double temperature, int64_t kind,
    bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp) {
  const TokenTensors tensors(policy_logits, ref_logits, actions, mask, temperatures, temperature);
  check_actions(tensors);
  const auto old = dense(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);
  constexpr auto fp32 = torch::headeronly::ScalarType::Float;
  const Tensor kl = empty(tensors.sizes(), fp32), logprobs = empty(tensors.sizes(), fp32);
  const Tensor ref_logprobs = empty(tensors.sizes(), fp32), entropy = empty(tensors.sizes(), fp32);
  const Tensor saved = empty_saved(tensors.count);
  forward_rows(tensors, &options, {floats(kl), floats(logprobs), floats(ref_logprobs), floats(entropy), floats(saved)});
  return {kl, logprobs, ref_logprobs, entropy, saved};
}

static std::tuple<Tensor, Tensor> token_kl_backward(
    std::optional<Tensor> grad_kl, std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_ref_logprobs,
    std::optional<Tensor> grad_entropy, Tensor policy_logits, Tensor ref_logits, Tensor actions,
    std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, std::optional<Tensor> temperatures,
    double temperature, int64_t kind, bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp, Tensor saved,
    bool want_policy, bool want_ref) {
  const TokenTensors tensors(policy_logits, ref_logits, actions, mask, temperatures, temperature);
  const auto old = dense(old_logprobs), to_kl = dense(grad_kl), to_logprobs = dense(grad_logprobs);
  const auto to_ref_logprobs = dense(grad_ref_logprobs), to_entropy = dense(grad_entropy);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);
  const Tensor policy = want_policy ? empty_gradient(policy_logits) : nothing(policy_logits.scalar_type());
  const Tensor ref = want_ref ? empty_gradient(ref_logits) : nothing(ref_logits.scalar_type());
  backward_rows(tensors, &options, {data_or_null<float>(to_kl), data_or_null<float>(to_logprobs),
                                    data_or_null<float>(to_ref_logprobs), data_or_null<float>(to_entropy), floats(saved),
                                    want_policy ? policy.data_ptr() : nullptr, want_ref ? ref.data_ptr() : nullptr});
  return {policy, ref};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("token_kl_forward(Tensor policy_logits, Tensor ref_logits, Tensor actions, Tensor? mask, Tensor? old_logprobs,"
        " Tensor? temperatures, float temperature, int kind, bool straight_through, float[]? log_ratio_clamp,"
        " float[]? kl_clamp) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("token_kl_backward(Tensor? grad_kl, Tensor? grad_logprobs, Tensor? grad_ref_logprobs, Tensor? grad_entropy,"
        " Tensor policy_logits, Tensor ref_logits, Tensor actions, Tensor? mask, Tensor? old_logprobs,"
        " Tensor? temperatures, float temperature, int kind, bool straight_through, float[]? log_ratio_clamp,"
        " float[]? kl_clamp, Tensor saved, bool want_policy, bool want_ref) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("token_kl_forward", TORCH_BOX(&token_kl_forward));
  m.impl("token_kl_backward", TORCH_BOX(&token_kl_backward));
}

}  // namespace lsc
