// Packed sequences: where each begins and ends, checked.
#pragma once

#include <string>

#include "tensors/tensor.h"

namespace lsc {

inline int64_t integer_at(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.scalar_type() == torch::headeronly::ScalarType::Int ? static_cast<const int32_t*>(tensor.data_ptr())[at]
                                                                    : static_cast<const int64_t*>(tensor.data_ptr())[at];
}

// The elements of cu_seqlens, which rise from 0 to `tokens`; `meaning` is how the error calls those.
inline std::vector<int64_t> segment_bounds(const Tensor& cu_seqlens, int64_t tokens, const std::string& meaning) {
  std::vector<int64_t> bounds(cu_seqlens.size(0));
  for (size_t b = 0; b < bounds.size(); ++b) bounds[b] = integer_at(cu_seqlens, int64_t(b));
  bool rises = bounds.front() == 0 && bounds.back() == tokens;
  for (size_t b = 0; b + 1 < bounds.size(); ++b) rises &= bounds[b] <= bounds[b + 1];
  if (rises) return bounds;
  std::string given;
  for (size_t b = 0; b < bounds.size(); ++b) given += (b ? ", " : "") + std::to_string(bounds[b]);
  throw std::invalid_argument("cu_seqlens must rise from 0 to N = " + std::to_string(tokens) + ", " + meaning + "; got [" + given + "]");
}

}  // namespace lsc
