// The tensors of token_rewards as the plain data of its kernels.
#pragma once

#include <algorithm>
#include <string>

#include "cpu/kernels/token_rewards.h"
#include "cpu/mask_tensor.h"

namespace lsc {

constexpr int64_t kTokensPerTask = 1 << 15;

// The arguments of a placement, held alive while the kernels run.
struct RewardTensors {
  Tensor utility, kl;
  std::optional<Tensor> mask, index, dense_rewards;
  RewardInputs kernel;

  RewardTensors(const Tensor& utilities, const Tensor& kls, const std::optional<Tensor>& masks, const std::optional<Tensor>& indices,
         const std::optional<Tensor>& denses, double beta, int64_t placement, double clip_low, double clip_high)
      : utility(dense(utilities)), kl(dense(kls)), mask(masks), index(dense(indices)), dense_rewards(dense(denses)) {
    kernel.utility = typed(utility), kernel.kl = typed(kl), kernel.dense = typed(dense_rewards);
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

  [[noreturn]] void index_is_outside(const std::string& name, int64_t row) const {
    const int64_t given = kernel.index_is_int32 ? static_cast<const int32_t*>(kernel.index)[row]
                                                : static_cast<const int64_t*>(kernel.index)[row];
    throw std::out_of_range(name + " must be in [0, T) with T = " + std::to_string(kernel.length) + "; got " + std::to_string(given));
  }
};

}  // namespace lsc
