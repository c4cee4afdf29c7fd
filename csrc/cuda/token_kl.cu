// token_kl on CUDA: KL, both log-probabilities and the entropy.
//
// Forward reads 2 N V logits, writes 4 N floats and what backward needs, [N, 14]. Backward reads N V (2 N V for a full
// divergence or a gradient to the reference) and writes each wanted gradient once. One launch each. The kernels are in
// cuda/token_rows.h.
#include "cuda/token_tensors.h"
#include "tensors/kl.h"

namespace lsc {
namespace cuda {

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_kl_forward(
    Tensor policy_logits, Tensor ref_logits, Tensor actions, std::optional<Tensor> mask,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> temperatures, double temperature, int64_t kind,
    bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp) {
  const TokenTensors tensors(policy_logits, ref_logits, actions, mask, temperatures, temperature);
  const auto old = dense(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);
  const auto output = [&] { return floats_on(policy_logits, tensors.sizes()); };
  const Tensor kl = output(), logprobs = output(), ref_logprobs = output(), entropy = output();
  const Tensor saved = saved_on(policy_logits, tensors.count);
  TokenForward a = forward_arguments(
      tensors, &options, {floats(kl), floats(logprobs), floats(ref_logprobs), floats(entropy), floats(saved)}, policy_logits);
  const Workspace workspace(a, tensors, policy_logits);
  with_logits(a.rows, [&](auto type) {
    using T = decltype(type);
    launch(is_reverse(&options) ? &token_forward<T, Reading::pair_reversed> : &token_forward<T, Reading::pair>,
           tensors.count * a.blocks_per_row, kThreads, policy_logits, a);
  });
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
  const auto gradient = [](bool wanted, const Tensor& logits) {
    return wanted ? empty_on(logits, logits.sizes(), logits.scalar_type()) : nothing_on(logits, logits.scalar_type());
  };
  const Tensor policy = gradient(want_policy, policy_logits), ref = gradient(want_ref, ref_logits);
  const TokenBackward a = backward_arguments(
      tensors, &options,
      {data_or_null<float>(to_kl), data_or_null<float>(to_logprobs), data_or_null<float>(to_ref_logprobs),
       data_or_null<float>(to_entropy), floats(saved), want_policy ? policy.data_ptr() : nullptr, want_ref ? ref.data_ptr() : nullptr},
      policy_logits);
  with_logits(a.rows, [&](auto type) {
    launch(&token_backward<decltype(type), true>, tensors.count * a.blocks_per_row, kThreads, policy_logits, a);
  });
  return {policy, ref};
}

LSC_CUDA_OPS(m) {
  m.impl("token_kl_forward", TORCH_BOX(&token_kl_forward));
  m.impl("token_kl_backward", TORCH_BOX(&token_kl_backward));
}

}  // namespace cuda
}  // namespace lsc
