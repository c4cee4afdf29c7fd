// Where a sequence's utility goes, and the reward of a token: what token_rewards and shaped_rewards share on the device. Sums
// are formed in fp64 and rounded once.
#pragma once

#include "arguments/token_rewards.h"
#include "cuda/mask.h"
#include "cuda/transform.h"

namespace lsc {
namespace LSC_ISA {

constexpr int64_t kNowhere = -1, kOutside = -2;

// Block: the position of the utility, given which positions count.
template <int kBlockThreads, typename Counted>
LSC_DEVICE int64_t place_of(LastCountedMemory& memory, const RewardInputs& in, int64_t row, const Counted& counted) {
  const int64_t last = last_where<kBlockThreads>(memory, in.length, counted);
  if (last < 0) return kNowhere;
  switch (in.placement) {
    case Placement::last: break;
    case Placement::eos_plus_one: return last + 1 < in.length ? last + 1 : in.length - 1;
    case Placement::before_last: {
      const int64_t before = last_where<kBlockThreads>(memory, last, counted);
      return before < 0 ? last : before;
    }
    case Placement::index: {
      const int64_t index = integer_at(in.index, in.index_is_int32, row);
      return index < 0 || index >= in.length ? kOutside : index;
    }
  }
  return last;
}

LSC_DEVICE float reward_at(const RewardInputs& in, int64_t row, int64_t t, bool counted, int64_t place) {
  const int64_t at = row * in.length + t;
  double reward = 0;
  if (counted) {
    if (in.dense.data) reward = load_one(in.dense.dtype, in.dense.data, at);
    // beta 0 keeps even a NaN KL out
    if (in.beta != 0) reward -= in.beta * double(load_one(in.kl.dtype, in.kl.data, at));
  }
  if (t == place) {
    const double utility = load_one(in.utility.dtype, in.utility.data, row);
    reward += utility < in.clip_low ? in.clip_low : utility > in.clip_high ? in.clip_high : utility;
  }
  return place == kOutside ? NAN : float(reward);
}

}  // namespace LSC_ISA
}  // namespace lsc
