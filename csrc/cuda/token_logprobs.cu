// token_logprobs on CUDA: log-probability of the action and entropy.
//
// Forward reads N V logits, writes 2 N floats and what backward needs, [N, 14]. Backward reads N V, writes N V. One launch
// each. The kernels are in cuda/token_rows.h.
#include "cuda/token_tensors.h"

namespace lsc {
namespace cuda {

static std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(
    Tensor logits, Tensor actions, std::optional<Tensor> mask, std::optional<Tensor> temperatures, double temperature) {
  TokenTensors tensors(logits, std::nullopt, actions, mask, temperatures, temperature);
  tensors.rows.ref.dtype = tensors.rows.policy.dtype;
  const Tensor logprobs = floats_on(logits, tensors.sizes()), entropy = floats_on(logits, tensors.sizes());
  const Tensor saved = saved_on(logits, tensors.count);
  TokenForward a = forward_arguments(tensors, nullptr, {nullptr, floats(logprobs), nullptr, floats(entropy), floats(saved)}, logits);
  const Workspace workspace(a, tensors, logits);
  with_logits(a.rows, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), Mixed>) {
      launch(&token_forward<decltype(type), Reading::alone>, tensors.count * a.blocks_per_row, kThreads, logits, a);
    }
  });
  return {logprobs, entropy, saved};
}

static Tensor token_logprobs_backward(
    std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits, Tensor actions,
    std::optional<Tensor> mask, std::optional<Tensor> temperatures, double temperature, Tensor saved) {
  TokenTensors tensors(logits, std::nullopt, actions, mask, temperatures, temperature);
  tensors.rows.ref.dtype = tensors.rows.policy.dtype;
  const auto to_logprobs = dense(grad_logprobs), to_entropy = dense(grad_entropy);
  const Tensor gradient = empty_on(logits, logits.sizes(), logits.scalar_type());
  const TokenBackward a = backward_arguments(
      tensors, nullptr,
      {nullptr, data_or_null<float>(to_logprobs), nullptr, data_or_null<float>(to_entropy), floats(saved), gradient.data_ptr(), nullptr},
      logits);
  with_logits(a.rows, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), Mixed>) {
      launch(&token_backward<decltype(type), false>, tensors.count * a.blocks_per_row, kThreads, logits, a);
    }
  });
  return gradient;
}

LSC_CUDA_OPS(m) {
  m.impl("token_logprobs_forward", TORCH_BOX(&token_logprobs_forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace cuda
}  // namespace lsc
