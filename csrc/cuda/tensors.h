// New tensors on a device.
#pragma once

#include "cuda/launch.h"
#include "tensors/logits.h"

namespace lsc {
namespace cuda {

// Uninitialised and contiguous, on the device of `like`.
inline Tensor empty_on(const Tensor& like, Sizes sizes, torch::headeronly::ScalarType dtype) {
  int32_t device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  return empty_at(sizes, dtype, device_type, device_index);
}

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

inline Tensor floats_on(const Tensor& like, Sizes sizes) { return empty_on(like, sizes, kFloat); }

inline Tensor nothing_on(const Tensor& like, torch::headeronly::ScalarType dtype = kFloat) {
  const int64_t zero = 0;
  return empty_on(like, Sizes(&zero, 1), dtype);
}

}  // namespace cuda
}  // namespace lsc
