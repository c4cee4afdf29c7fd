#pragma once

#include "arguments/token_rewards.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Rows [begin, end). Forward writes [B, T] rewards; it returns a row whose index is outside of it, which is left
    // unwritten, or -1. Backward reads the upstream gradient of the rewards.
    int64_t token_rewards_forward(const RewardInputs&, float* rewards, int64_t begin, int64_t end);
    void token_rewards_backward(const RewardInputs&, const Upstream&, const RewardGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
