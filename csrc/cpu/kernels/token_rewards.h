#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/mask_rows.h"
#include "cpu/kernels/rows.h"

namespace lsc {

// In the order of PLACEMENTS in native/token_rewards.py.
enum class Placement : int64_t { last, eos_plus_one, before_last, index };

struct RewardInputs {
  TypedData utility, kl, dense;  // [B], [B, T], [B, T]
  MaskRows mask;
  const void* index;             // [B]
  bool index_is_int32;
  int64_t length;                // T
  double beta;
  Placement placement;
  double clip_low, clip_high;
};

// To be written, contiguous, each null where it is not wanted; of the dtypes of the inputs.
struct RewardGradients {
  void *utility, *kl, *dense;
};

LSC_DECLARE_KERNELS(
    // Rows [begin, end). Forward writes [B, T] rewards; it returns a row whose index is outside of it, which is left
    // unwritten, or -1. Backward reads the upstream gradient of the rewards.
    int64_t token_rewards_forward(const RewardInputs&, float* rewards, int64_t begin, int64_t end);
    void token_rewards_backward(const RewardInputs&, const float* grad, const RewardGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
