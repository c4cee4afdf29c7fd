// Between torch's stable ABI and the kernels' plain data, on any device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "arguments/rows.h"

namespace lsc {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised and contiguous. The C function: going through the dispatcher takes five times as long.
inline Tensor empty_at(Sizes sizes, torch::headeronly::ScalarType dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[64], stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides,
      int32_t(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))), device_type, device_index, &handle));
  return Tensor(handle);
}

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

// The same in float32, whatever the dtype given.
inline std::optional<Tensor> dense_floats(const std::optional<Tensor>& tensor) {
  constexpr auto wanted = torch::headeronly::ScalarType::Float;
  if (!tensor) return std::nullopt;
  return dense(tensor->scalar_type() == wanted ? *tensor : torch::stable::to(*tensor, wanted));
}

// The first `count` dimensions of a tensor, those joined that lie as one; at least one is left. False if more than `most` are.
inline bool join_dimensions(const Tensor& tensor, int64_t count, int most, int& left, int64_t* sizes, int64_t* strides) {
  left = 1, sizes[0] = 1, strides[0] = 0;
  for (int64_t d = 0; d < count; ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    int64_t &inner_size = sizes[left - 1], &inner_stride = strides[left - 1];
    if (inner_size == 1 || inner_stride == size * stride) {
      inner_size *= size, inner_stride = stride;
    } else {
      if (left == most) return false;
      sizes[left] = size, strides[left] = stride;
      ++left;
    }
  }
  return true;
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
    default: throw std::invalid_argument("the kernels take float32, bfloat16 and float16");
  }
}

inline TypedData typed(const Tensor& contiguous) { return {contiguous.data_ptr(), dtype_of(contiguous)}; }

inline TypedData typed(const std::optional<Tensor>& contiguous) {
  return contiguous ? typed(*contiguous) : TypedData{nullptr, DType::float32};
}

}  // namespace lsc
