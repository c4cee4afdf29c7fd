// AVX-512 intrinsics on a processor that has AVX2, FMA and F16C: SIMDe's, and by hand what SIMDe lacks or does otherwise
// than the processor. Included ahead of a file of csrc/cpu/kernels/, which then finds AVX-512 as its compiler would
// announce it.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lsc_avx512 {
namespace {

template <typename To, typename From>
inline To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// A register of 64 bytes as the two halves that AVX2 works on.
template <typename Half>
struct Halves {
  Half low, high;
};
template <typename Half, typename Whole>
inline Halves<Half> halves(const Whole& whole) {
  return bits<Halves<Half>>(whole);
}
template <typename Whole, typename Half>
inline Whole whole(Half low, Half high) {
  return bits<Whole>(Halves<Half>{low, high});
}

inline __m512i cvtepu16_epi32(__m256i a) {
  return whole<__m512i>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)));
}
inline __m512i cvtepu8_epi32(__m128i a) {
  return whole<__m512i>(_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8)));
}
// of the low 8 bytes
inline __m512i cvtepu8_epi64(__m128i a) {
  return whole<__m512i>(_mm256_cvtepu8_epi64(a), _mm256_cvtepu8_epi64(_mm_srli_si128(a, 4)));
}
// truncates
inline __m256i cvtepi32_epi16(__m512i a) {
  const auto from = bits<Halves<int32_t[8]>>(a);
  int16_t to[16];
  for (int i = 0; i < 8; ++i) to[i] = int16_t(from.low[i]), to[8 + i] = int16_t(from.high[i]);
  return bits<__m256i>(to);
}
inline __m512 cvtph_ps(__m256i a) {
  return whole<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)));
}
template <int rounding>
inline __m256i cvtps_ph(__m512 a) {
  const auto [low, high] = halves<__m256>(a);
  return _mm256_set_m128i(_mm256_cvtps_ph(high, rounding), _mm256_cvtps_ph(low, rounding));
}
inline __m512d cvtps_pd(__m256 a) {
  return whole<__m512d>(_mm256_cvtps_pd(_mm256_castps256_ps128(a)), _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)));
}
inline __m256 cvtpd_ps(__m512d a) {
  const auto [low, high] = halves<__m256d>(a);
  return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low));
}
template <int half>
inline __m256 extractf32x8_ps(__m512 a) {
  static_assert(half == 0 || half == 1);
  return half ? halves<__m256>(a).high : halves<__m256>(a).low;
}

// Elements n, n + 1 ... of `low`, then the first n of `high`.
template <int n>
inline __m512i alignr_epi64(__m512i high, __m512i low) {
  int64_t both[16], to[8];
  std::memcpy(both, &low, 64), std::memcpy(both + 8, &high, 64);
  for (int i = 0; i < 8; ++i) to[i] = both[i + n % 8];
  return bits<__m512i>(to);
}

// a 2^floor(b), rounded once: SIMDe rounds twice, and takes what is not normal for 0.
__attribute__((noinline)) __m512 scalef_ps(__m512 a, __m512 b) {
  float value[16], power[16];
  std::memcpy(value, &a, 64), std::memcpy(power, &b, 64);
  for (int i = 0; i < 16; ++i) {
    if (std::isinf(power[i])) {
      value[i] *= power[i] > 0 ? power[i] : 0.0f;
    } else if (std::isnan(power[i])) {
      value[i] = power[i];
    } else {
      const float whole = std::fmax(-400.0f, std::fmin(400.0f, std::floor(power[i])));  // enough for any float
      value[i] = float(value[i] * bits<double>((int64_t(whole) + 1023) << 52));
    }
  }
  return bits<__m512>(value);
}

// As GCC does it: halves are joined, the upper one as the first operand, until one element is left.
template <typename T, typename Whole, typename Join>
inline T reduced(const Whole& whole, const Join& join) {
  constexpr int n = sizeof(Whole) / sizeof(T);
  T lanes[n];
  std::memcpy(lanes, &whole, sizeof lanes);
  for (int left = n / 2; left >= 1; left /= 2) {
    for (int i = 0; i < left; ++i) lanes[i] = join(lanes[i + left], lanes[i]);
  }
  return lanes[0];
}
template <typename T>
inline T larger(T a, T b) {
  return a > b ? a : b;  // b where one of them is NaN, as the instructions have it
}
template <typename T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
inline T added(T a, T b) {
  return a + b;
}

}  // namespace
}  // namespace lsc_avx512

#undef _mm512_cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu8_epi64
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtph_ps
#undef _mm512_cvtps_ph
#undef _mm512_cvtps_pd
#undef _mm512_cvtpd_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_alignr_epi64
#undef _mm512_scalef_ps
#undef _mm512_reduce_add_ps
#undef _mm512_reduce_add_pd
#undef _mm512_reduce_max_ps
#undef _mm512_reduce_max_epi32
#undef _mm512_reduce_min_epu32
#define _mm512_cvtepu16_epi32 lsc_avx512::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 lsc_avx512::cvtepu8_epi32
#define _mm512_cvtepu8_epi64 lsc_avx512::cvtepu8_epi64
#define _mm512_cvtepi32_epi16 lsc_avx512::cvtepi32_epi16
#define _mm512_cvtph_ps lsc_avx512::cvtph_ps
#define _mm512_cvtps_ph(a, rounding) lsc_avx512::cvtps_ph<rounding>(a)
#define _mm512_cvtps_pd lsc_avx512::cvtps_pd
#define _mm512_cvtpd_ps lsc_avx512::cvtpd_ps
#define _mm512_extractf32x8_ps(a, half) lsc_avx512::extractf32x8_ps<half>(a)
#define _mm512_alignr_epi64(high, low, n) lsc_avx512::alignr_epi64<n>(high, low)
#define _mm512_scalef_ps lsc_avx512::scalef_ps
#define _mm512_reduce_add_ps(a) lsc_avx512::reduced<float>(a, lsc_avx512::added<float>)
#define _mm512_reduce_add_pd(a) lsc_avx512::reduced<double>(a, lsc_avx512::added<double>)
#define _mm512_reduce_max_ps(a) lsc_avx512::reduced<float>(a, lsc_avx512::larger<float>)
#define _mm512_reduce_max_epi32(a) lsc_avx512::reduced<int32_t>(a, lsc_avx512::larger<int32_t>)
#define _mm512_reduce_min_epu32(a) lsc_avx512::reduced<uint32_t>(a, lsc_avx512::smaller<uint32_t>)

// Emulated vectors are too much code to be inlined everywhere.
#define flatten noinline

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
