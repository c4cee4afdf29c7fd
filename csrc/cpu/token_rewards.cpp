// token_rewards on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "cpu/kernels/token_rewards.h"
#include "cpu/mask_tensor.h"

namespace lsc {

namespace {

constexpr int64_t kTokensPerTask = 1 << 15;

// The arguments, held alive while the kernels run.
struct Inputs {
  Tensor utility, kl;
  std::optional<Tensor> mask, index, dense_rewards;
  RewardInputs kernel;

  Inputs(const Tensor& utilities, const Tensor& kls, const std::optional<Tensor>& masks, const std::optional<Tensor>& indices,
         const std::optional<Tensor>& denses, double beta, int64_t placement, double clip_low, double clip_high)
      : utility(dense(utilities)), kl(dense(kls)), mask(masks), index(dense(indices)), dense_rewards(dense(denses)) {
    kernel.utility = {utility.data_ptr(), dtype_of(utility)};
    kernel.kl = {kl.data_ptr(), dtype_of(kl)};
    kernel.dense = dense_rewards ? TypedData{dense_rewards->data_ptr(), dtype_of(*dense_rewards)} : TypedData{nullptr, DType::float32};
    kernel.mask = mask_rows(mask);
    kernel.index = data_or_null<void>(index);
    kernel.index_is_int32 = index && index->scalar_type() == torch::headeronly::ScalarType::Int;
    kernel.length = kl.size(1);
    kernel.beta = beta;
    kernel.placement = Placement(placement);
    kernel.clip_low = clip_low, kernel.clip_high = clip_high;
  }

  template <typename Rows>
  void over_rows(const Rows& rows) const {
    const int64_t per_task = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, kernel.length));
    torch::stable::parallel_for(0, kl.size(0), per_task, rows);
  }

  [[noreturn]] void index_is_outside(int64_t row) const {
    const int64_t given = kernel.index_is_int32 ? static_cast<const int32_t*>(kernel.index)[row]
                                                : static_cast<const int64_t*>(kernel.index)[row];
    throw std::out_of_range("index must be in [0, T) with T = " + std::to_string(kernel.length) + "; got " + std::to_string(given));
  }
};

}  // namespace

static Tensor forward(
    Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index, std::optional<Tensor> dense_rewards,
    double beta, int64_t placement, double clip_low, double clip_high) {
  const Inputs inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const Tensor rewards = empty_large(kl.sizes(), torch::headeronly::ScalarType::Float);
  auto* rows = LSC_DISPATCH_ISA(token_rewards_forward);
  std::atomic<int64_t> outside{-1};  // an exception does not travel out of a parallel region
  inputs.over_rows([&](int64_t begin, int64_t end) {
    const int64_t row = rows(inputs.kernel, floats(rewards), begin, end);
    if (row >= 0) outside = row;
  });
  if (outside >= 0) inputs.index_is_outside(outside);
  return rewards;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index,
    std::optional<Tensor> dense_rewards, double beta, int64_t placement, double clip_low, double clip_high, bool want_utility, bool want_kl, bool want_dense) {
  const Inputs inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const Tensor upstream = dense(grad);
  const Tensor to_utility = want_utility ? empty(utility.sizes(), utility.scalar_type()) : nothing();
  const Tensor to_kl = want_kl ? empty_large(kl.sizes(), kl.scalar_type()) : nothing();
  const Tensor to_dense = want_dense ? empty_large(kl.sizes(), dense_rewards->scalar_type()) : nothing();
  const RewardGradients out{want_utility ? to_utility.data_ptr() : nullptr, want_kl ? to_kl.data_ptr() : nullptr,
                            want_dense ? to_dense.data_ptr() : nullptr};
  auto* rows = LSC_DISPATCH_ISA(token_rewards_backward);
  inputs.over_rows([&](int64_t begin, int64_t end) { rows(inputs.kernel, floats(upstream), out, begin, end); });
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
