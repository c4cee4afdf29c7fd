// bf16 and fp16 as they lie in memory, and their conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

LSC_FN inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
LSC_FN inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

LSC_FN inline float to_float(float value) { return value; }
LSC_FN inline float to_float(BFloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
LSC_FN inline void from_float(float value, float* out) { *out = value; }

#if defined(__CUDA_ARCH__)

__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline void from_float(float value, BFloat16* out) { out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
__device__ inline void from_float(float value, Half* out) { out->bits = __half_as_ushort(__float2half_rn(value)); }

#else

LSC_FN inline float to_float(Half value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^-14 and below are subnormal halves: let the multiplication normalise them
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

LSC_FN inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = float_to_bits(value);
  out->bits = value != value ? 0x7fc0u : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
LSC_FN inline void from_float(float value, Half* out) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 1/2 leaves the multiple of 2^-24 in the low bits
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = uint16_t(sign | half);
}

#endif

}  // namespace LSC_ISA
}  // namespace lsc
