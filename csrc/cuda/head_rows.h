// The scores of one row of hidden: what reward_head and shaped_rewards share on the device.
//
// A block scores an output. Its threads share out the row's columns, and each multiplies its own with four weights at a time;
// the sums over the block are taken in double. Where the position of the row is the last counted one, the block finds it in
// the mask itself. An index outside [0, S), or a segment that does not lie in hidden, scores NaN.
#pragma once

#include "arguments/hidden.h"
#include "cuda/mask.h"
#include "cuda/transform.h"

namespace lsc {
namespace LSC_ISA {

// Which row of hidden each output is scored at.
struct HeadPositions {
  bool every;
  MaskRows mask;            // of `every`: [1, R]; else [B, S]
  const void* index;        // [B], or null
  const void* segments;     // cu_seqlens [B+1], or null
  bool index_is_int32, segments_are_int32;
  int64_t length, tokens;   // S; the rows of packed hidden
};

struct HeadForward {
  HiddenRows hidden;
  HeadPositions positions;
  int64_t properties;
  TypedData weight, bias;  // [K, H], [K] or null
  float* scores;
};

constexpr int kWeightsAtOnce = 4;

template <int kBlockThreads>
struct HeadMemory {
  LastCountedMemory last;
  double sums[kBlockThreads / kWarp][kWeightsAtOnce];
};

// Block: the row of hidden that an output is scored at, -1 for none.
template <int kBlockThreads>
LSC_DEVICE int64_t find_row(LastCountedMemory& memory, const HeadPositions& p, int64_t output) {
  if (p.every) return is_counted(p.mask, 0, output) ? output : -1;
  if (p.segments) {
    const int64_t first = integer_at(p.segments, p.segments_are_int32, output), end = integer_at(p.segments, p.segments_are_int32, output + 1);
    return first < 0 || first >= end || end > p.tokens ? -1 : end - 1;
  }
  if (p.index) {
    const int64_t place = integer_at(p.index, p.index_is_int32, output);
    return place < 0 || place >= p.length ? -1 : output * p.length + place;
  }
  const int64_t last = last_counted<kBlockThreads>(memory, p.mask, output, p.length);
  return last < 0 ? -1 : output * p.length + last;
}

LSC_DEVICE int64_t hidden_offset(const HiddenRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.leading - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

// Block: the K scores of an output.
template <int kBlockThreads>
LSC_DEVICE void score_output(HeadMemory<kBlockThreads>& memory, const HeadForward& a, int64_t output) {
  const int64_t row = find_row<kBlockThreads>(memory.last, a.positions, output), width = a.hidden.width;
  float* scores = a.scores + output * a.properties;
  if (row < 0) {
    for (int64_t k = thread_index(); k < a.properties; k += kBlockThreads) scores[k] = a.positions.every ? 0.0f : NAN;
    return;
  }
  const int64_t offset = hidden_offset(a.hidden, row);
  for (int64_t first = 0; first < a.properties; first += kWeightsAtOnce) {
    const int count = int(a.properties - first < kWeightsAtOnce ? a.properties - first : kWeightsAtOnce);
    double sums[kWeightsAtOnce] = {};
    for (int64_t h = thread_index(); h < width; h += kBlockThreads) {
      const double value = load_one(a.hidden.dtype, a.hidden.data, offset + h * a.hidden.column_stride);
#pragma unroll
      for (int i = 0; i < kWeightsAtOnce; ++i) {
        if (i < count) sums[i] += value * load_one(a.weight.dtype, a.weight.data, (first + i) * width + h);
      }
    }
    const double sum = warp_sums4(sums);
    sync_block();  // the sums before these have been read
    if (lane_index() % (kWarp / kWeightsAtOnce) == 0) memory.sums[warp_index()][lane_index() / (kWarp / kWeightsAtOnce)] = sum;
    sync_block();
    const int own = int(thread_index());
    if (own < count) {
      double score = 0;
      for (const auto& of_warp : memory.sums) score += of_warp[own];
      scores[first + own] = float(score + (a.bias.data ? load_one(a.bias.dtype, a.bias.data, first + own) : 0.0f));
    }
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
