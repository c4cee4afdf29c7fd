// The tensors of token_rewards as the plain data of its kernels.
#pragma once

#include "arguments/token_rewards.h"
#include "tensors/mask.h"

namespace lsc {

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
};

}  // namespace lsc
