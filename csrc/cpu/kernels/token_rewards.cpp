// token_rewards: one pass over kl, mask and dense rewards, one write of the rewards. What follows the last counted position
// of a row is only looked at in the mask.
//
// The sum is formed in fp64 and rounded once: the op waits for memory, not for arithmetic.
#include "cpu/kernels/token_rewards.h"

#include <algorithm>

#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/upstream.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 512;
constexpr int64_t kNowhere = -1, kOutside = -2;

int64_t position_of(const RewardInputs& in, int64_t row, int64_t last) {
  if (last < 0) return kNowhere;
  switch (in.placement) {
    case Placement::last: break;
    case Placement::eos_plus_one: return std::min(last + 1, in.length - 1);
    case Placement::before_last: {
      const int64_t before = last_counted(in.mask, row, last);
      return before < 0 ? last : before;
    }
    case Placement::index: {
      const int64_t index = in.index_is_int32 ? static_cast<const int32_t*>(in.index)[row]
                                              : static_cast<const int64_t*>(in.index)[row];
      return index < 0 || index >= in.length ? kOutside : index;
    }
  }
  return last;
}

// dense - beta kl at the n positions from `first` of a row, 0 where the mask leaves out. Beta 0 keeps even a NaN KL out.
void per_token(const RewardInputs& in, int64_t row, int64_t first, int n, float* out) {
  alignas(64) float kl[kTile], dense[kTile];
  const int64_t start = row * in.length + first;
  const bool with_kl = in.beta != 0;
  if (with_kl) load_tile(in.kl.dtype, in.kl.data, start, n, kl);
  if (in.dense.data) load_tile(in.dense.dtype, in.dense.data, start, n, dense);
  if (with_kl && in.dense.data) {
    for (int i = 0; i < n; ++i) out[i] = float(double(dense[i]) - in.beta * double(kl[i]));
  } else if (with_kl) {
    for (int i = 0; i < n; ++i) out[i] = float(0.0 - in.beta * double(kl[i]));
  } else if (in.dense.data) {
    std::copy_n(dense, n, out);
  } else {
    std::fill_n(out, n, 0.0f);
  }
  clear_uncounted(in.mask, row, first, n, out);
}

double clipped_utility(const RewardInputs& in, int64_t row) {
  const double utility = load_one(in.utility.dtype, in.utility.data, row);
  return utility < in.clip_low ? in.clip_low : utility > in.clip_high ? in.clip_high : utility;
}

// What is at the utility's position before it comes, unrounded.
double before_utility(const RewardInputs& in, int64_t row, int64_t place) {
  if (!is_counted(in.mask, row, place)) return 0;
  const int64_t at = row * in.length + place;
  const double dense = in.dense.data ? load_one(in.dense.dtype, in.dense.data, at) : 0;
  return in.beta == 0 ? dense : dense - in.beta * double(load_one(in.kl.dtype, in.kl.data, at));
}

}  // namespace

int64_t token_rewards_forward(const RewardInputs& in, float* rewards, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* out = rewards + row * in.length;
    const int64_t last = last_counted(in.mask, row, in.length);
    const int64_t place = position_of(in, row, last);
    if (place == kOutside) return row;
    for (int64_t first = 0; first <= last; first += kTile) {
      per_token(in, row, first, int(std::min<int64_t>(kTile, last + 1 - first)), out + first);
    }
    std::fill(out + last + 1, out + in.length, 0.0f);
    if (place >= 0) out[place] = float(before_utility(in, row, place) + clipped_utility(in, row));
  }
  return -1;
}

void token_rewards_backward(const RewardInputs& in, const Upstream& grad, const RewardGradients& out, int64_t begin, int64_t end) {
  UpstreamTile<kTile> given(grad);
  alignas(64) float to_dense[kTile] = {}, to_kl[kTile] = {};
  for (int64_t row = begin; row < end; ++row) {
    if (out.utility) {
      const double utility = load_one(in.utility.dtype, in.utility.data, row);
      const int64_t place = position_of(in, row, last_counted(in.mask, row, in.length));
      const bool counts = place >= 0 && !(utility < in.clip_low || utility > in.clip_high);
      store_one(in.utility.dtype, out.utility, row, counts ? *given.along(row * in.length + place, 1) : 0.0f);
    }
    if (!out.kl && !out.dense) continue;
    for (int64_t first = 0; first < in.length; first += kTile) {
      const int n = int(std::min<int64_t>(kTile, in.length - first));
      const int64_t start = row * in.length + first;
      std::copy_n(given.along(start, n), n, to_dense);
      clear_uncounted(in.mask, row, first, n, to_dense);
      if (out.dense) store_tile(in.dense.dtype, out.dense, start, n, to_dense);
      if (!out.kl) continue;
      for (int i = 0; i < n; ++i) to_kl[i] = to_dense[i] == 0 ? 0.0f : float(-in.beta * double(to_dense[i]));
      if (in.beta == 0) std::fill_n(to_kl, n, 0.0f);
      store_tile(in.kl.dtype, out.kl, start, n, to_kl);
    }
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
