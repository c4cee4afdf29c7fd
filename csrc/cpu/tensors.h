// New tensors on the CPU.
#pragma once

#include <sys/mman.h>

#include "tensors/tensor.h"

namespace lsc {

inline Tensor empty(Sizes sizes, torch::headeronly::ScalarType dtype) {
  return empty_at(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

// For hundreds of megabytes. Its pages are asked for in large pieces: a fresh allocation of that size otherwise
// spends more time in page faults than in arithmetic.
inline Tensor empty_large(Sizes sizes, torch::headeronly::ScalarType dtype) {
  Tensor tensor = empty(sizes, dtype);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const auto first = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto begin = (first + page - 1) / page * page, end = (first + tensor.numel() * tensor.element_size()) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

inline Tensor nothing(torch::headeronly::ScalarType dtype = torch::headeronly::ScalarType::Float) {
  const int64_t zero = 0;
  return empty(Sizes(&zero, 1), dtype);
}

}  // namespace lsc
