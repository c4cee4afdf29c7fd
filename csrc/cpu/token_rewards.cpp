// token_rewards on the CPU.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/reward_tensors.h"
#include "tensors/upstream.h"

namespace lsc {

static Tensor forward(
    Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index, std::optional<Tensor> dense_rewards,
    double beta, int64_t placement, double clip_low, double clip_high) {
  const RewardTensors inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const Tensor rewards = empty_large(kl.sizes(), torch::headeronly::ScalarType::Float);
  auto* rows = LSC_DISPATCH_ISA(token_rewards_forward);
  std::atomic<int64_t> outside{-1};  // an exception does not travel out of a parallel region
  over_rows(inputs, [&](int64_t begin, int64_t end) {
    const int64_t row = rows(inputs.kernel, floats(rewards), begin, end);
    if (row >= 0) outside = row;
  });
  if (outside >= 0) index_is_outside(inputs.kernel, "index", outside);
  return rewards;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index,
    std::optional<Tensor> dense_rewards, double beta, int64_t placement, double clip_low, double clip_high, bool want_utility, bool want_kl, bool want_dense) {
  const RewardTensors inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const UpstreamTensor upstream(grad);
  const Tensor to_utility = want_utility ? empty(utility.sizes(), utility.scalar_type()) : nothing();
  const Tensor to_kl = want_kl ? empty_large(kl.sizes(), kl.scalar_type()) : nothing();
  const Tensor to_dense = want_dense ? empty_large(kl.sizes(), dense_rewards->scalar_type()) : nothing();
  const RewardGradients out{want_utility ? to_utility.data_ptr() : nullptr, want_kl ? to_kl.data_ptr() : nullptr,
                            want_dense ? to_dense.data_ptr() : nullptr};
  auto* rows = LSC_DISPATCH_ISA(token_rewards_backward);
  over_rows(inputs, [&](int64_t begin, int64_t end) { rows(inputs.kernel, upstream.kernel, out, begin, end); });
  return {to_utility, to_kl, to_dense};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("token_rewards_forward(Tensor utility, Tensor kl, Tensor? mask, Tensor? index, Tensor? dense, float beta,"
        " int placement, float clip_low, float clip_high) -> Tensor");
  m.def("token_rewards_backward(Tensor grad, Tensor utility, Tensor kl, Tensor? mask, Tensor? index, Tensor? dense,"
        " float beta, int placement, float clip_low, float clip_high, bool want_utility, bool want_kl, bool want_dense)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("token_rewards_forward", TORCH_BOX(&forward));
  m.impl("token_rewards_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
