// token_logprobs on the CPU: log-probability of the action and entropy.
//
// Forward reads N V logits, writes 2 N floats and what backward needs, [N, 14]. Backward reads N V, writes N V.
#include <torch/csrc/stable/library.h>

#include "cpu/token_tensors.h"

namespace lsc {

static std::tuple<Tensor, Tensor, Tensor> token_logprobs_forward(
    Tensor logits, Tensor actions, std::optional<Tensor> mask, std::optional<Tensor> temperatures, double temperature) {
  const TokenTensors tensors(logits, std::nullopt, actions, mask, temperatures, temperature);
  check_actions(tensors);
  constexpr auto fp32 = torch::headeronly::ScalarType::Float;
  const Tensor logprobs = empty(tensors.sizes(), fp32), entropy = empty(tensors.sizes(), fp32);
  const Tensor saved = empty_saved(tensors.count);
  forward_rows(tensors, nullptr, {nullptr, floats(logprobs), nullptr, floats(entropy), floats(saved)});
  return {logprobs, entropy, saved};
}

static Tensor token_logprobs_backward(
    std::optional<Tensor> grad_logprobs, std::optional<Tensor> grad_entropy, Tensor logits, Tensor actions,
    std::optional<Tensor> mask, std::optional<Tensor> temperatures, double temperature, Tensor saved) {
  const TokenTensors tensors(logits, std::nullopt, actions, mask, temperatures, temperature);
  const auto to_logprobs = dense(grad_logprobs), to_entropy = dense(grad_entropy);
  const Tensor gradient = empty_gradient(logits);
  backward_rows(tensors, nullptr, {nullptr, data_or_null<float>(to_logprobs), nullptr, data_or_null<float>(to_entropy),
                                   floats(saved), gradient.data_ptr(), nullptr});
  return gradient;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("token_logprobs_forward(Tensor logits, Tensor actions, Tensor? mask, Tensor? temperatures, float temperature)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor actions,"
        " Tensor? mask, Tensor? temperatures, float temperature, Tensor saved) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("token_logprobs_forward", TORCH_BOX(&token_logprobs_forward));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace lsc
