// A vector of floats as wide as the instruction set this file is compiled for.
//
// One interface, three bodies: AVX-512, AVX2 with FMA, and GCC/Clang vector extensions of 16 bytes, which become
// SSE2, NEON or plain code. Everything stands inside namespace LSC_ISA, so that the builds of one header do not meet
// at link time.
//
// NaN travels: max(limit, x) is NaN where x is. Comparisons with NaN are false.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "math/half.h"

namespace lsc {
namespace LSC_ISA {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 value) : v(value) {}
  explicit Vec(float value) : v(_mm512_set1_ps(value)) {}
};
using Mask = __mmask16;

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a.v, b.v, c.v); }
inline Vec max(Vec limit, Vec x) { return _mm512_max_ps(limit.v, x.v); }
inline Vec min(Vec limit, Vec x) { return _mm512_min_ps(limit.v, x.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return a | b; }
inline bool all(Mask a) { return a == 0xffff; }
inline bool any(Mask a) { return a != 0; }
inline Mask complement(Mask a) { return Mask(~a); }
inline Vec select(Mask where, Vec yes, Vec no) { return _mm512_mask_blend_ps(where, no.v, yes.v); }
// a, elsewhere 0
inline Vec only(Mask where, Vec a) { return _mm512_maskz_mov_ps(where, a.v); }
inline Vec add_where(Mask where, Vec sum, Vec a) { return _mm512_mask_add_ps(sum.v, where, sum.v, a.v); }
// The larger of |a| and |b|; where one of them is NaN, perhaps the other.
inline Vec max_abs(Vec a, Vec b) { return _mm512_range_ps(a.v, b.v, 0xb); }
// u where it is in [-bound, bound], else the end it is beyond; where it is NaN, anything.
inline Vec within(Vec bound, Vec u) { return _mm512_range_ps(u.v, bound.v, 0x2); }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }
// a * 2^n for whole n in [kExp2Floor, 127]; 0 at kExp2Floor
constexpr float kExp2Floor = -160.0f;
inline Vec scale2(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Mask load(const bool* p) {
  return _mm512_test_epi32_mask(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), _mm512_set1_epi32(-1));
}

inline void load_two(const BFloat16* p, Vec& a, Vec& b) {
  const __m512i pairs = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}

inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
// bfloat16 in the upper half of each lane
inline __m512i rounded_to_bfloat16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
inline void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bfloat16(a), 16)));
}
inline void store_two(BFloat16* p, Vec a, Vec b) {
  const __m512i upper = _mm512_and_si512(rounded_to_bfloat16(b), _mm512_set1_epi32(int(0xffff0000)));
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_srli_epi32(rounded_to_bfloat16(a), 16), upper));
}
inline void store(Half* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Doubles, one for two lanes: where float sums of a few vectors are gathered.
struct WideSum {
  __m512d lanes = _mm512_setzero_pd();

  void add(Vec a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    lanes = _mm512_add_pd(lanes, _mm512_add_pd(low, high));
  }
  double total() const { return _mm512_reduce_add_pd(lanes); }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 value) : v(value) {}
  explicit Vec(float value) : v(_mm256_set1_ps(value)) {}
};
struct Mask {
  __m256 v;
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a.v, b.v, c.v); }
inline Vec max(Vec limit, Vec x) { return _mm256_max_ps(limit.v, x.v); }
inline Vec min(Vec limit, Vec x) { return _mm256_min_ps(limit.v, x.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask both(Mask a, Mask b) { return {_mm256_and_ps(a.v, b.v)}; }
inline Mask either(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
inline bool all(Mask a) { return _mm256_movemask_ps(a.v) == 0xff; }
inline bool any(Mask a) { return _mm256_movemask_ps(a.v) != 0; }
inline Mask complement(Mask a) { return {_mm256_xor_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
inline Vec select(Mask where, Vec yes, Vec no) { return _mm256_blendv_ps(no.v, yes.v, where.v); }
inline Vec only(Mask where, Vec a) { return _mm256_and_ps(where.v, a.v); }
inline Vec add_where(Mask where, Vec sum, Vec a) { return sum + only(where, a); }
inline Vec max_abs(Vec a, Vec b) { return max(abs(a), abs(b)); }
inline Vec within(Vec bound, Vec u) { return max(Vec(_mm256_xor_ps(bound.v, _mm256_set1_ps(-0.0f))), min(bound, u)); }
constexpr float kExp2Floor = -127.0f;
inline Vec scale2(Vec a, Vec n) {
  const __m256i exponent = _mm256_cvtps_epi32(n.v);
  const __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  return _mm256_mul_ps(a.v, power);
}
inline Vec low_bits_to_exponent(Vec a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23)); }
inline float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float max_lane(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Mask load(const bool* p) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
}

inline void load_two(const BFloat16* p, Vec& a, Vec& b) {
  const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
// bfloat16 in the upper half of each lane
inline __m256i rounded_to_bfloat16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
}
inline void store(BFloat16* p, Vec a) {
  const __m256i kept = _mm256_srli_epi32(rounded_to_bfloat16(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_two(BFloat16* p, Vec a, Vec b) {
  const __m256i lower = _mm256_srli_epi32(rounded_to_bfloat16(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(lower, rounded_to_bfloat16(b), 0xaa));
}
inline void store(Half* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct WideSum {
  __m256d lanes = _mm256_setzero_pd();

  void add(Vec a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
    lanes = _mm256_add_pd(lanes, _mm256_add_pd(low, high));
  }
  double total() const {
    const __m128d pair = _mm_add_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd(lanes, 1));
    return _mm_cvtsd_f64(_mm_add_sd(pair, _mm_unpackhi_pd(pair, pair)));
  }
};

#else

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  static constexpr int kLanes = 4;
  Float4 v;
  Vec() = default;
  Vec(Float4 value) : v(value) {}
  explicit Vec(float value) : v{value, value, value, value} {}
};
struct Mask {
  Int4 v;
};

inline Vec select(Mask where, Vec yes, Vec no) { return Vec(Float4(((Int4)yes.v & where.v) | ((Int4)no.v & ~where.v))); }
inline Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
inline Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
inline Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
inline Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return Vec(a.v * b.v + c.v); }
inline Vec fms(Vec a, Vec b, Vec c) { return Vec(a.v * b.v - c.v); }
inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
inline Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
inline Mask both(Mask a, Mask b) { return {a.v & b.v}; }
inline Mask either(Mask a, Mask b) { return {a.v | b.v}; }
inline bool all(Mask a) { return (a.v[0] & a.v[1] & a.v[2] & a.v[3]) != 0; }
inline bool any(Mask a) { return (a.v[0] | a.v[1] | a.v[2] | a.v[3]) != 0; }
inline Mask complement(Mask a) { return {~a.v}; }
inline Vec max(Vec limit, Vec x) { return select(x < limit, limit, x); }
inline Vec min(Vec limit, Vec x) { return select(limit < x, limit, x); }
inline Vec abs(Vec a) { return Vec(Float4((Int4)a.v & 0x7fffffff)); }
inline Vec only(Mask where, Vec a) { return Vec(Float4((Int4)a.v & where.v)); }
inline Vec add_where(Mask where, Vec sum, Vec a) { return sum + only(where, a); }
inline Vec max_abs(Vec a, Vec b) { return max(abs(a), abs(b)); }
inline Vec within(Vec bound, Vec u) { return max(Vec(-bound.v), min(bound, u)); }
// right for |a| < 2^22; exp2 stays within
inline Vec round(Vec a) {
  const Float4 magic = Vec(0x1.8p23f).v;
  return Vec((a.v + magic) - magic);
}
constexpr float kExp2Floor = -127.0f;
inline Vec scale2(Vec a, Vec n) {
  return Vec(a.v * Float4((__builtin_convertvector(n.v, Int4) + 127) << 23));
}
inline Vec low_bits_to_exponent(Vec a) { return Vec(Float4((Int4)a.v << 23)); }
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float max_lane(Vec a) {
  float largest = a.v[0];
  for (int i = 1; i < 4; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}

template <typename T>
inline Vec load(const T* p) {
  return Vec(Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])});
}
inline Mask load(const bool* p) { return {Int4{-p[0], -p[1], -p[2], -p[3]}}; }
template <typename T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}

struct WideSum {
  double lanes[2] = {0, 0};

  void add(Vec a) {
    for (int i = 0; i < 2; ++i) lanes[i] += double(a.v[i]) + a.v[i + 2];
  }
  double total() const { return lanes[0] + lanes[1]; }
};

#endif

// Two vectors of elements at p, in an order that depends on T alone.
template <typename T>
inline void load_two(const T* p, Vec& a, Vec& b) {
  a = load(p), b = load(p + Vec::kLanes);
}
template <typename T>
inline void store_two(T* p, Vec a, Vec b) {
  store(p, a), store(p + Vec::kLanes, b);
}

// The first n lanes from p, the others `fill`; never reads past p[n-1].
template <typename T>
inline Vec load_first(const T* p, int n, float fill) {
  float lanes[Vec::kLanes];
  for (int i = 0; i < Vec::kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return load(lanes);
}
template <typename T>
inline void store_first(T* p, int n, Vec a) {
  float lanes[Vec::kLanes];
  store(lanes, a);
  for (int i = 0; i < n; ++i) from_float(lanes[i], p + i);
}

// What turns raw differences u into powers of two.
struct PowerScale {
  float inverse;         // 1/T
  float factor;          // log2(e)/T
  float step, step_low;  // T ln(2) in two floats, the first with 12 bits: n step is exact
  float lowest;          // the u below which the power is 0

  explicit PowerScale(double temperature) {
    const double ln2 = 0.69314718055994530942 * temperature;
    inverse = float(1 / temperature), factor = float(1.4426950408889634074 / temperature);
    step = bits_to_float(float_to_bits(float(ln2)) & 0xfffff000u), step_low = float(ln2 - step);
    lowest = float(-127 * ln2);
  }
};

// Whether fma and fms round once.
#if defined(__FMA__)
constexpr bool kFusedProducts = true;
#else
constexpr bool kFusedProducts = false;
#endif

// u log2(e)/T - n, without rounding the product
inline Vec reduced(Vec u, Vec n, const PowerScale& scale) {
  if constexpr (kFusedProducts) return fms(u, Vec(scale.factor), n);
  return ((u - n * Vec(scale.step)) - n * Vec(scale.step_low)) * Vec(scale.factor);
}

// e^(u/T) of a u that is NaN or in [lowest, -lowest]. e^0 is exactly 1 and e^lowest 0. The relative error is 1.5e-7 beyond what the
// rounding of log2(e)/T makes of u.
#if defined(__AVX512F__)
// 2^(j/16) less j 2^19 in its bits
alignas(64) constexpr uint32_t kSixteenths[16] = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};

// u log2(e)/T = n + j/16 + f with |f| <= 1/32; 2^(j/16) from a table, 2^f = 1 + f q(f) with q of degree 2. Half of the multiply-adds
// of what the others do: they are what this processor has one of each cycle.
inline Vec power(Vec u, const PowerScale& scale) {
  // a float of this size has no bits below 1/16, so adding it rounds; its own lowest bits are then 16 n + j
  const Vec shift(0x1.8p19f);
  const Vec shifted = fma(u, Vec(scale.factor), shift);
  const Vec f = reduced(u, shifted - shift, scale);
  const __m512i bits = _mm512_castps_si512(shifted.v);
  const __m512 sixteenth = _mm512_permutexvar_ps(bits, _mm512_load_ps(kSixteenths));
  const Vec p = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(sixteenth), _mm512_slli_epi32(bits, 19)));
  const Vec q = fma(fma(Vec(0x1.c6b348p-5f), f, Vec(0x1.ebfffap-3f)), f, Vec(0x1.62e430p-1f));
  return fma(p * f, q, p);
}
#else
// u log2(e)/T = n + f with n whole and |f| <= 1/2; 2^f = 1 + f g(f) with g a minimax polynomial of degree 4 (9e-8).
inline Vec power(Vec u, const PowerScale& scale) {
  // a float of this size has no bits below 1, so adding it rounds; its own lowest bits are then n + 127, the exponent of 2^n
  const Vec shift(0x1.8p23f + 127);
  const Vec shifted = fma(u, Vec(scale.factor), shift);
  const Vec f = reduced(u, shifted - shift, scale);
  Vec g = fma(Vec(0x1.5bba0ep-10f), f, Vec(0x1.3cea88p-7f));
  g = fma(g, f, Vec(0x1.c6b752p-5f));
  g = fma(g, f, Vec(0x1.ebf9bcp-3f));
  g = fma(g, f, Vec(0x1.62e42ap-1f));
  return fma(g, f, Vec(1.0f)) * low_bits_to_exponent(shifted);
}
#endif

// e^(u/T) for u <= -lowest, -inf included; NaN gives NaN. `u` comes back finite, so that power * u is never 0 * inf.
inline Vec exp_scaled(Vec& u, const PowerScale& scale) {
  u = max(Vec(scale.lowest), u);
  return power(u, scale);
}

// e^(u/T) of any u, as if those beyond [lowest, -lowest] were its ends; NaN gives anything. `u` comes back within.
inline Vec exp_within(Vec& u, const PowerScale& scale) {
  u = within(Vec(-scale.lowest), u);
  return power(u, scale);
}

}  // namespace LSC_ISA
}  // namespace lsc
