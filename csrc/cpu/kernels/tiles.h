// Short stretches of a row on their way between a tensor of any supported dtype and arrays of floats.
#pragma once

#include "arguments/rows.h"
#include "cpu/kernels/vec.h"

namespace lsc {
namespace LSC_ISA {

namespace {

// Calls run(T{}) for the type that `dtype` names.
template <typename Run>
inline void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::float32: return run(float{});
    case DType::bfloat16: return run(BFloat16{});
    case DType::float16: return run(Half{});
  }
}

// `out` has room for whole vectors; what lies beyond n becomes 0.
template <typename T>
inline void load_tile(const T* from, int n, float* out) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(out + i, load(from + i));
  if (i < n) store(out + i, load_first(from + i, n - i, 0.0f));
}

template <typename T>
inline void store_tile(T* out, const float* values, int n) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(out + i, load(values + i));
  if (i < n) store_first(out + i, n - i, load(values + i));
}

inline void load_tile(DType dtype, const void* data, int64_t first, int n, float* out) {
  for_dtype(dtype, [&](auto type) { load_tile(static_cast<const decltype(type)*>(data) + first, n, out); });
}

inline void store_tile(DType dtype, void* data, int64_t first, int n, const float* values) {
  for_dtype(dtype, [&](auto type) { store_tile(static_cast<decltype(type)*>(data) + first, values, n); });
}

inline float load_one(DType dtype, const void* data, int64_t index) {
  float value = 0;
  for_dtype(dtype, [&](auto type) { value = to_float(static_cast<const decltype(type)*>(data)[index]); });
  return value;
}

inline void store_one(DType dtype, void* data, int64_t index, float value) {
  for_dtype(dtype, [&](auto type) { from_float(value, static_cast<decltype(type)*>(data) + index); });
}

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
