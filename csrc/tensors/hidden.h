// hidden [..., H] of any strides as the plain data of the kernels.
#pragma once

#include "arguments/hidden.h"
#include "tensors/tensor.h"

namespace lsc {

inline HiddenRows hidden_rows(const Tensor& hidden) {
  HiddenRows rows{};
  rows.data = hidden.data_ptr();
  rows.dtype = dtype_of(hidden);
  rows.leading = int(hidden.dim() - 1);
  rows.width = hidden.size(rows.leading);
  rows.column_stride = hidden.stride(rows.leading);
  for (int d = 0; d < rows.leading; ++d) rows.sizes[d] = hidden.size(d), rows.strides[d] = hidden.stride(d);
  return rows;
}

// The kernels know leading dimensions up to a number; what has more is copied.
inline Tensor few_dimensions(const Tensor& hidden) {
  if (hidden.dim() - 1 <= kMaxHiddenLeading) return hidden;
  const Tensor contiguous = dense(hidden);
  const int64_t width = hidden.size(hidden.dim() - 1);
  return torch::stable::view(contiguous, {width ? hidden.numel() / width : 0, width});
}

}  // namespace lsc
