// Plain data that token_rewards hands to its kernels.
#pragma once

#include "arguments/mask_rows.h"
#include "arguments/rows.h"

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

}  // namespace lsc
