// Between torch's stable ABI and the kernels' plain data, on any device.
#pragma once

#include "cuda/launch.h"
#include "cpu/token_tensors.h"

namespace lsc {
namespace cuda {

// Uninitialised and contiguous, on the device of `like`.
inline Tensor empty_on(const Tensor& like, Sizes sizes, torch::headeronly::ScalarType dtype) {
  int64_t strides[64], stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides,
      int32_t(torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype))), device_type, device_index, &handle));
  return Tensor(handle);
}

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

inline Tensor floats_on(const Tensor& like, Sizes sizes) { return empty_on(like, sizes, kFloat); }

inline Tensor nothing_on(const Tensor& like, torch::headeronly::ScalarType dtype = kFloat) {
  const int64_t zero = 0;
  return empty_on(like, Sizes(&zero, 1), dtype);
}

}  // namespace cuda
}  // namespace lsc
