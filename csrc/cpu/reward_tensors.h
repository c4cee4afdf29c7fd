// What the ops that place rewards share on the CPU.
#pragma once

#include <algorithm>
#include <string>

#include "cpu/kernels/token_rewards.h"
#include "cpu/tensors.h"
#include "tensors/rewards.h"

namespace lsc {

constexpr int64_t kTokensPerTask = 1 << 15;

// Calls rows(begin, end), by several threads.
template <typename Rows>
void over_rows(const RewardTensors& tensors, const Rows& rows) {
  const int64_t per_task = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, tensors.kernel.length));
  torch::stable::parallel_for(0, tensors.kl.size(0), per_task, rows);
}

[[noreturn]] inline void index_is_outside(const RewardInputs& in, const std::string& name, int64_t row) {
  const int64_t given = in.index_is_int32 ? static_cast<const int32_t*>(in.index)[row] : static_cast<const int64_t*>(in.index)[row];
  throw std::out_of_range(name + " must be in [0, T) with T = " + std::to_string(in.length) + "; got " + std::to_string(given));
}

}  // namespace lsc
