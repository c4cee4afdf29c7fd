// Which rows of hidden are read, found on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/kernels/reward_head.h"
#include "cpu/segments.h"
#include "cpu/tensors.h"
#include "tensors/hidden.h"
#include "tensors/mask.h"

namespace lsc {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 1 << 15;

inline int64_t outputs_per_task(const HeadInputs& inputs) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, inputs.hidden.width * inputs.properties));
}

// positions[b] is the row of hidden, as packed, that segment b ends in; -1 for an empty one.
inline void segment_ends(const Tensor& cu_seqlens, int64_t tokens, int64_t* positions) {
  const std::vector<int64_t> bounds = segment_bounds(cu_seqlens, tokens, "the rows of hidden");
  for (size_t b = 0; b + 1 < bounds.size(); ++b) positions[b] = bounds[b] < bounds[b + 1] ? bounds[b + 1] - 1 : -1;
}

inline void indexed(const Tensor& index, int64_t length, int64_t* positions) {
  int64_t b = 0;
  for (const int64_t place : integers_of(index)) {
    if (place < 0 || place >= length) {
      throw std::out_of_range("index must be in [0, S) with S = " + std::to_string(length) + "; got " + std::to_string(place));
    }
    positions[b] = b * length + place;
    ++b;
  }
}

inline Tensor new_positions(int64_t count) { return empty(Sizes(&count, 1), torch::headeronly::ScalarType::Long); }

inline int64_t* places(const Tensor& positions) { return static_cast<int64_t*>(positions.data_ptr()); }

// [R] which row each output is scored at, as HeadInputs wants it; empty where that is every row.
inline Tensor find_positions(const Tensor& hidden, const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& index,
                      const std::optional<Tensor>& cu_seqlens, bool every) {
  if (every) {
    if (!attention_mask) return new_positions(0);
    const Tensor mask = dense(*attention_mask);
    const MaskRows rows = flat_mask(mask);
    const Tensor positions = new_positions(mask.numel());
    auto* counted = LSC_DISPATCH_ISA(head_counted);
    torch::stable::parallel_for(0, mask.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      counted(rows, places(positions), begin, end);
    });
    return positions;
  }
  if (cu_seqlens) {
    const Tensor positions = new_positions(cu_seqlens->size(0) - 1);
    segment_ends(*cu_seqlens, hidden.size(0), places(positions));
    return positions;
  }
  const int64_t length = hidden.size(1);
  const Tensor positions = new_positions(hidden.size(0));
  if (index) {
    indexed(*index, length, places(positions));
    return positions;
  }
  const MaskRows mask = mask_rows(attention_mask);
  auto* last_counted = LSC_DISPATCH_ISA(head_last_counted);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, hidden.size(0), per_task, [&](int64_t begin, int64_t end) {
    last_counted(mask, length, places(positions), begin, end);
  });
  return positions;
}

inline HeadInputs inputs_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& positions,
                     bool every) {
  const bool all_rows = every && positions.numel() == 0;
  return {hidden_rows(hidden), all_rows ? nullptr : places(positions), every ? 0.0 : NAN,
          weight.size(0),      floats(weight),                        data_or_null<float>(bias)};
}

}  // namespace lsc
