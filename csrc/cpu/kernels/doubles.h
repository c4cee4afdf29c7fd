// A vector of doubles as wide as the instruction set this file is compiled for: fp32 tensors of one number per token wait
// for memory, so what is computed of them is computed in fp64. Comparisons with NaN are false.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

#if defined(__AVX512F__)
constexpr int kDoubles = 8;
#elif defined(__AVX2__)
constexpr int kDoubles = 4;
#else
constexpr int kDoubles = 2;
#endif

typedef double DoubleLanes __attribute__((vector_size(8 * kDoubles)));
typedef int64_t BitLanes __attribute__((vector_size(8 * kDoubles)));
typedef uint64_t UnsignedLanes __attribute__((vector_size(8 * kDoubles)));

struct Doubles {
  static constexpr int kLanes = kDoubles;
  DoubleLanes v;
  Doubles() = default;
  Doubles(DoubleLanes lanes) : v(lanes) {}
  explicit Doubles(double value) : v(value - DoubleLanes{}) {}
};
struct Chosen {
  BitLanes v;  // -1 or 0
};

inline Doubles operator+(Doubles a, Doubles b) { return a.v + b.v; }
inline Doubles operator-(Doubles a, Doubles b) { return a.v - b.v; }
inline Doubles operator*(Doubles a, Doubles b) { return a.v * b.v; }
inline Doubles operator/(Doubles a, Doubles b) { return a.v / b.v; }
inline Chosen operator<(Doubles a, Doubles b) { return {a.v < b.v}; }
inline Chosen operator==(Doubles a, Doubles b) { return {a.v == b.v}; }
inline Chosen is_nan(Doubles a) { return {a.v != a.v}; }
inline Chosen either(Chosen a, Chosen b) { return {a.v | b.v}; }
inline bool all(Chosen a) {
#if defined(__AVX512F__)
  return _mm512_movepi64_mask((__m512i)a.v) == 0xff;
#elif defined(__AVX2__)
  return _mm256_movemask_pd((__m256d)a.v) == 0xf;
#else
  return (a.v[0] & a.v[1]) != 0;
#endif
}
inline Doubles select(Chosen where, Doubles yes, Doubles no) { return Doubles(where.v ? yes.v : no.v); }
inline Doubles smaller_of(Doubles a, Doubles b) { return select(a < b, a, b); }
// 0 where one of them is.
inline Doubles quotient(Doubles a, Doubles b) {
  const Doubles zero(0.0);
  return select(either(a == zero, b == zero), zero, a / b);
}
inline Doubles abs(Doubles a) { return Doubles(DoubleLanes((BitLanes)a.v & INT64_MAX)); }

// a b + c
inline Doubles fma(Doubles a, Doubles b, Doubles c) {
#if defined(__AVX512F__)
  return Doubles(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__AVX2__)
  return Doubles(_mm256_fmadd_pd(a.v, b.v, c.v));
#else
  return a * b + c;
#endif
}

// Lanes n, n + 1 ... of a, then the first n of b; 0 < n < kLanes.
template <int n>
inline Doubles window(Doubles a, Doubles b) {
#if defined(__AVX512F__)
  return Doubles((DoubleLanes)_mm512_alignr_epi64((__m512i)b.v, (__m512i)a.v, n));
#elif defined(__AVX2__)
  if constexpr (n == 2) return Doubles(_mm256_permute2f128_pd(a.v, b.v, 0x21));
  constexpr int lanes_of_b = (1 << n) - 1, turned = n == 1 ? 0x39 : 0x93;
  return Doubles(_mm256_permute4x64_pd(_mm256_blend_pd(a.v, b.v, lanes_of_b), turned));
#else
  return Doubles(DoubleLanes{a.v[1], b.v[0]});
#endif
}

// The first lane, or the last, in every lane.
template <bool kLast>
inline Doubles repeated_end(Doubles a) {
#if defined(__AVX512F__)
  return Doubles(_mm512_permutexvar_pd(_mm512_set1_epi64(kLast ? 7 : 0), a.v));
#elif defined(__AVX2__)
  return Doubles(_mm256_permute4x64_pd(a.v, kLast ? 0xff : 0));
#else
  return Doubles(a.v[kLast]);
#endif
}

#if defined(__AVX512F__)
inline Doubles load_doubles(const float* p) { return Doubles(_mm512_cvtps_pd(_mm256_loadu_ps(p))); }
inline void store_rounded(float* p, Doubles a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }
#elif defined(__AVX2__)
inline Doubles load_doubles(const float* p) { return Doubles(_mm256_cvtps_pd(_mm_loadu_ps(p))); }
inline void store_rounded(float* p, Doubles a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }
#else
inline Doubles load_doubles(const float* p) { return Doubles(DoubleLanes{p[0], p[1]}); }
inline void store_rounded(float* p, Doubles a) { p[0] = float(a.v[0]), p[1] = float(a.v[1]); }
#endif

// Where bytes are not 0.
inline Chosen load_chosen(const void* p) {
#if defined(__AVX512F__)
  return {(BitLanes)_mm512_cvtepu8_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p))) != 0};
#elif defined(__AVX2__)
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return {(BitLanes)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes)) != 0};
#else
  const auto* bytes = static_cast<const uint8_t*>(p);
  return {BitLanes{-(bytes[0] != 0), -(bytes[1] != 0)}};
#endif
}

// a 2^n, |n| < 1023 and whole
inline Doubles scale2(Doubles a, Doubles n) {
  const DoubleLanes biased = n.v + (0x1.8p52 + 1023);  // n + 1023 in the lowest bits
  return a * Doubles((DoubleLanes)((BitLanes)biased << 52));
}

// p = m 2^-n, 1/sqrt(2) < m <= sqrt(2), for a p in (0, 1] that is no subnormal number.
constexpr int64_t kSqrt2 = 0x3ff6a09e667f3bcd;
inline Doubles negative_exponent(Doubles p) {
  const auto n = (BitLanes)((UnsignedLanes)(kSqrt2 - (BitLanes)p.v) >> 52);
  return Doubles((DoubleLanes)(n | 0x4330000000000000)) - Doubles(0x1p52);
}
inline Doubles mantissa(Doubles p) {
  const BitLanes bits = (BitLanes)p.v;
  return Doubles((DoubleLanes)(bits + ((kSqrt2 - bits) & -(int64_t(1) << 52))));
}

// e^a = 2^n (1 + r t)
struct Power {
  Doubles n, r, t;
};

// Of a in a range where 2^n is not yet infinity or 0.
inline Power power_of(Doubles a) {
  const Doubles magic(0x1.8p52);
  const Doubles n = (a * Doubles(1.4426950408889634) + magic) - magic;
  const Doubles r = fma(n, Doubles(-0x1.62e42fefa39efp-1), a);
  Doubles t(1.0 / 40320);
  for (const double coefficient : {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0}) t = fma(t, r, Doubles(coefficient));
  return {n, r, t};
}

// e^a to a relative 3e-10: what is rounded to fp32 asks for no more. e^0 is exactly 1.
inline Doubles exponential(Doubles a) {
  // far enough for infinity and 0; NaN stays
  const Power power = power_of(select(a < Doubles(-746.0), Doubles(-746.0), select(Doubles(710.0) < a, Doubles(710.0), a)));
  const Doubles magic(0x1.8p52), half = (power.n * Doubles(0.5) + magic) - magic;  // 2^n itself may be beyond the range
  return scale2(scale2(fma(power.t, power.r, Doubles(1.0)), half), power.n - half);
}

// The same for a <= 0, and 1 - e^a to a relative 2e-9. Below -700 as if it were that; NaN stays.
inline Power negative_power_of(Doubles a) {
  return power_of(select(a < Doubles(-700.0), Doubles(-700.0), a));
}
inline Doubles exponential_of_negative(Doubles a) {
  const Power power = negative_power_of(a);
  return scale2(fma(power.t, power.r, Doubles(1.0)), power.n);
}
struct ExponentialPair {
  Doubles power, rest;
};
inline ExponentialPair exponential_pair(Doubles a) {
  const Power power = negative_power_of(a);
  const Doubles two_to_n = scale2(Doubles(1.0), power.n), changed = two_to_n * (power.t * power.r);
  return {two_to_n + changed, (Doubles(1.0) - two_to_n) - changed};
}

// log p of p in [0, 1] with 1 - p, to a relative 2e-10. log 0 is -inf, NaN stays.
inline Doubles logarithm(Doubles p, Doubles rest) {
  const Doubles zero(0.0), one(1.0);
  const Doubles f = select(Doubles(0x1.6a09e667f3bcdp-1) < p, zero - rest, mantissa(p) - one);
  // log m = 2 atanh((m - 1) / (m + 1))
  const Doubles s = f / (Doubles(2.0) + f), square = s * s;
  Doubles series(1.0 / 11);
  for (const double coefficient : {1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0}) series = fma(series, square, Doubles(coefficient));
  const Doubles log = fma(negative_exponent(p), Doubles(-0x1.62e42fefa39efp-1), (s + s) * series);
  return select(zero < p, log, select(p == zero, Doubles(-INFINITY), p));
}

}  // namespace LSC_ISA
}  // namespace lsc
