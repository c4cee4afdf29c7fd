// Between torch's stable ABI and the kernels' plain data.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "cpu/kernels/rows.h"

namespace lsc {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised and contiguous. The C function: going through the dispatcher takes five times as long.
inline Tensor empty(Sizes sizes, torch::headeronly::ScalarType dtype) {
  int64_t strides[64], stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides,
      int32_t(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

template <typename T>
inline const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return DType::float32;
    case torch::headeronly::ScalarType::BFloat16: return DType::bfloat16;
    case torch::headeronly::ScalarType::Half: return DType::float16;
    default: throw std::invalid_argument("the CPU kernels take float32, bfloat16 and float16");
  }
}

}  // namespace lsc
