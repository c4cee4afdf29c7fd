// Packed sequences: where each begins and ends, checked.
#pragma once

#include <string>

#include "tensors/tensor.h"

namespace lsc {

// The elements of a [N] index tensor.
inline std::vector<int64_t> integers_of(const Tensor& tensor) {
  std::vector<int64_t> result(tensor.size(0));
  const int64_t stride = tensor.stride(0);
  const auto read = [&](const auto* from) {
    for (size_t i = 0; i < result.size(); ++i) result[i] = from[int64_t(i) * stride];
  };
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Int) {
    read(static_cast<const int32_t*>(tensor.data_ptr()));
  } else {
    read(static_cast<const int64_t*>(tensor.data_ptr()));
  }
  return result;
}

// The elements of cu_seqlens, which rise from 0 to `tokens`; `meaning` is how the error calls those.
inline std::vector<int64_t> segment_bounds(const Tensor& cu_seqlens, int64_t tokens, const std::string& meaning) {
  const std::vector<int64_t> bounds = integers_of(cu_seqlens);
  bool rises = bounds.front() == 0 && bounds.back() == tokens;
  for (size_t b = 0; b + 1 < bounds.size(); ++b) rises &= bounds[b] <= bounds[b + 1];
  if (rises) return bounds;
  std::string given;
  for (size_t b = 0; b < bounds.size(); ++b) given += (b ? ", " : "") + std::to_string(bounds[b]);
  throw std::invalid_argument("cu_seqlens must rise from 0 to N = " + std::to_string(tokens) + ", " + meaning + "; got [" + given + "]");
}

}  // namespace lsc
