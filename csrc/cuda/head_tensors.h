// The tensors of reward_head as the plain data of its kernels.
#pragma once

#include "cuda/head_rows.h"
#include "cuda/tensors.h"
#include "tensors/hidden.h"
#include "tensors/mask.h"

namespace lsc {
namespace cuda {

// What says which rows are read, held alive while a launch is prepared.
struct PositionTensors {
  std::optional<Tensor> mask, index, segments;
  HeadPositions kernel;
  int64_t outputs;

  PositionTensors(const Tensor& hidden, const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& indices,
                  const std::optional<Tensor>& cu_seqlens, bool every)
      : mask(every ? dense(attention_mask) : attention_mask), index(dense(indices)), segments(dense(cu_seqlens)) {
    const auto is_int32 = [](const std::optional<Tensor>& t) { return t && t->scalar_type() == torch::headeronly::ScalarType::Int; };
    const int64_t width = hidden.size(hidden.dim() - 1);
    kernel.every = every;
    if (every) {
      outputs = 1;
      for (int64_t d = 0; d + 1 < hidden.dim(); ++d) outputs *= hidden.size(d);
      kernel.mask = flat_mask(mask);
    } else {
      outputs = segments ? segments->size(0) - 1 : hidden.size(0);
      kernel.mask = mask_rows(segments ? std::nullopt : mask);
    }
    kernel.index = data_or_null<void>(index), kernel.index_is_int32 = is_int32(index);
    kernel.segments = every ? nullptr : data_or_null<void>(segments), kernel.segments_are_int32 = is_int32(segments);
    kernel.length = hidden.dim() > 1 && !kernel.segments ? hidden.size(hidden.dim() - 2) : 0;
    kernel.tokens = width ? hidden.numel() / width : hidden.size(0);
  }
};

}  // namespace cuda
}  // namespace lsc
