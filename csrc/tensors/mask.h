// A mask tensor as the kernels read it: no copy, whatever its dtype and strides.
#pragma once

#include "arguments/mask_rows.h"
#include "tensors/tensor.h"

namespace lsc {

inline MaskType mask_type(torch::headeronly::ScalarType dtype, int64_t bytes) {
  switch (dtype) {
    case torch::headeronly::ScalarType::BFloat16:
    case torch::headeronly::ScalarType::Half: return MaskType::float16;
    case torch::headeronly::ScalarType::Float: return MaskType::float32;
    case torch::headeronly::ScalarType::Double: return MaskType::float64;
    default: break;
  }
  switch (bytes) {
    case 1: return MaskType::bits8;
    case 2: return MaskType::bits16;
    case 4: return MaskType::bits32;
    case 8: return MaskType::bits64;
    default: throw std::invalid_argument("a mask must be bool, int or float");
  }
}

// [B, T], or nothing.
inline MaskRows mask_rows(const std::optional<Tensor>& mask) {
  if (!mask) return {nullptr, MaskType::bits8, 0, 0};
  return {mask->data_ptr(), mask_type(mask->scalar_type(), mask->element_size()), mask->stride(0), mask->stride(1)};
}

// Contiguous, of any shape, as one row.
inline MaskRows flat_mask(const std::optional<Tensor>& mask) {
  if (!mask) return mask_rows(mask);
  return {mask->data_ptr(), mask_type(mask->scalar_type(), mask->element_size()), 0, 1};
}

// [N] of packed sequences, or nothing: the row is a sequence's first token, and its stride that of a column.
inline MaskRows packed_mask(const std::optional<Tensor>& mask) {
  if (!mask) return mask_rows(mask);
  return {mask->data_ptr(), mask_type(mask->scalar_type(), mask->element_size()), mask->stride(0), mask->stride(0)};
}

}  // namespace lsc
