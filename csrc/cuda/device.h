// The thin layer the kernels are written against: who am I, barriers, shuffles, votes, memory of a block, wide loads.
//
// Two bodies. nvcc reads the one with CUDA's intrinsics. With LSC_EMULATION the same kernel source is plain C++: a thread is
// a fiber of tests/emulation, and barriers, shuffles and votes are where it waits for the others.
//
// Barriers, shuffles and votes are for all threads of the block, or all 32 lanes of the warp, that have not been left out
// by a branch which all of them took: a kernel never calls one in a branch that only some take.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "math/half.h"

#ifdef LSC_EMULATION

#include <stdexcept>

#include "emulation.h"

#define LSC_KERNEL(threads, blocks) void
#define LSC_ARGUMENT const
#define LSC_DEVICE inline
#define LSC_COLD inline
#define LSC_HERE , const emulation::Place& place = emulation::Place::current()
#define LSC_HERE_ALONE const emulation::Place& place = emulation::Place::current()

#else

#define LSC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Read where the launch has put it, not from a copy of each thread's own.
#define LSC_ARGUMENT const __grid_constant__
#define LSC_DEVICE __device__ __forceinline__
#define LSC_COLD inline __device__ __noinline__
#define LSC_HERE
#define LSC_HERE_ALONE

#endif

namespace lsc {
namespace LSC_ISA {

constexpr int kWarp = 32;

#ifdef LSC_EMULATION

inline unsigned thread_index() { return emulation::thread_index(); }
inline unsigned thread_index_anew() { return emulation::thread_index(); }
inline int64_t block_index() { return emulation::block_index(); }
inline void sync_block(LSC_HERE_ALONE) { emulation::sync_block(place); }
inline void sync_warp(LSC_HERE_ALONE) { emulation::ballot(true, place); }
inline bool any_lane(bool vote LSC_HERE) { return emulation::ballot(vote, place) != 0; }
inline uint32_t ballot(bool vote LSC_HERE) { return emulation::ballot(vote, place); }
template <typename T>
inline T shuffle_xor(T value, int mask LSC_HERE) {
  return emulation::shuffle(value, (thread_index() % kWarp) ^ unsigned(mask), place);
}
template <typename T>
inline T shuffle(T value, int lane LSC_HERE) {
  return emulation::shuffle(value, unsigned(lane), place);
}
template <typename Memory>
inline Memory& block_memory() {
  return *static_cast<Memory*>(emulation::block_memory(sizeof(Memory)));
}
// Counts to `last`, then from 0 again; what it was before.
inline unsigned atomic_count(unsigned* counter, unsigned last) {
  const unsigned before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void publish() {}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
// 2^x with an error like that of the hardware's approximation, which is up to 2^-22.5 of the result; 0 below the smallest
// normal number.
inline float exp2_fast(float x) {
  const double exact = std::exp2(double(x));
  if (!(exact >= 0x1p-126)) return exact != exact ? NAN : 0.0f;
  if (x == std::floor(x)) return float(exact);
  return float(exact * (float_to_bits(x) & 1 ? 1 + 1e-7 : 1 - 1e-7));
}
inline uint32_t largest3(uint32_t a, uint32_t b, uint32_t c) { return a < b ? (b < c ? c : b) : (a < c ? c : a); }
// The low word of the two moved down by so many bits, fewer than 32.
inline uint32_t shift_down(uint32_t low, uint32_t high, unsigned bits) { return uint32_t((uint64_t(high) << 32 | low) >> bits); }
// NaN where either is
inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a < b ? b : a; }

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Words2 {
  uint32_t x, y;
};
// From memory to the block's memory while the thread goes on; there once wait_copies<n>() has returned, which leaves n
// batches under way.
template <int kBytes>
inline void copy_async(void* to, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % kBytes || reinterpret_cast<uintptr_t>(to) % kBytes) {
    throw std::logic_error("a wide copy that is not aligned");
  }
  emulation::copy_later(to, from, kBytes);
}
inline void copy_async_if(bool wanted, void* to, const void* from) {
  if (wanted) copy_async<16>(to, from);
}
inline void end_batch() { emulation::end_batch(); }
template <int kUnderWay>
inline void wait_copies() {
  emulation::wait_batches(kUnderWay);
}
// What another block has written.
inline uint64_t load_fresh(const uint64_t* from) { return *from; }
template <typename Words>
inline void store_once(void* to, Words words) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Words)) throw std::logic_error("a wide store that is not aligned");
  *static_cast<Words*>(to) = words;
}

#else

__device__ __forceinline__ unsigned thread_index() { return threadIdx.x; }
// Read where it is needed: nothing that follows from it takes up a register throughout a loop that has none to spare.
__device__ __forceinline__ unsigned thread_index_anew() {
  unsigned index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ bool any_lane(bool vote) { return __any_sync(0xffffffffu, vote); }
__device__ __forceinline__ uint32_t ballot(bool vote) { return __ballot_sync(0xffffffffu, vote); }
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <typename T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename Memory>
__device__ __forceinline__ Memory& block_memory() {
  __shared__ alignas(16) unsigned char bytes[sizeof(Memory)];
  return *reinterpret_cast<Memory*>(bytes);
}
__device__ __forceinline__ unsigned atomic_count(unsigned* counter, unsigned last) { return atomicInc(counter, last); }
// What this thread has written is seen by whoever sees what it writes next.
__device__ __forceinline__ void publish() { __threadfence(); }

__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}
__device__ __forceinline__ uint32_t largest3(uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u32(a, b, c); }
__device__ __forceinline__ uint32_t shift_down(uint32_t low, uint32_t high, unsigned bits) { return __funnelshift_r(low, high, bits); }
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

using Words4 = uint4;
using Words2 = uint2;
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(from), "n"(kBytes) : "memory");
  }
}
// 16 bytes, without a branch.
__device__ __forceinline__ void copy_async_if(bool wanted, void* to, const void* from) {
  const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile(
      "{.reg .pred wanted; setp.ne.b32 wanted, %2, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(shared), "l"(from),
      "r"(int(wanted))
      : "memory");
}
__device__ __forceinline__ void end_batch() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kUnderWay>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kUnderWay) : "memory");
}
__device__ __forceinline__ uint64_t load_fresh(const uint64_t* from) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(from));
}
// Written once: not to be kept in the caches for long.
template <typename Words>
__device__ __forceinline__ void store_once(void* to, Words words) {
  __stcs(static_cast<Words*>(to), words);
}

#endif

LSC_DEVICE unsigned lane_index() { return thread_index_anew() % kWarp; }
LSC_DEVICE unsigned warp_index() { return thread_index_anew() / kWarp; }

LSC_DEVICE float warp_max(float value) {
  for (int mask = kWarp / 2; mask; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = value < other ? other : value;
  }
  return value;
}

// Lanes exchange halves of their kHalf * 2 values, and each adds what it was given to what it kept.
template <int kHalf, typename Real>
LSC_DEVICE void halve(Real* values, int mask) {
  const bool upper = lane_index() & unsigned(mask);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const Real give = upper ? values[i] : values[i + kHalf], keep = upper ? values[i + kHalf] : values[i];
    values[i] = keep + shuffle_xor(give, mask);
  }
}

// The sums over the warp of eight values of each lane: lane l ends up with that of values[l / 4]. A quarter of the shuffles
// of eight sums.
template <typename Real>
LSC_DEVICE Real warp_sums8(Real (&values)[8]) {
  halve<4>(values, 16), halve<2>(values, 8), halve<1>(values, 4);
  Real sum = values[0];
  sum += shuffle_xor(sum, 2);
  return sum + shuffle_xor(sum, 1);
}

// The same of four values: lane l ends up with that of values[l / 8].
template <typename Real>
LSC_DEVICE Real warp_sums4(Real (&values)[4]) {
  halve<2>(values, 16), halve<1>(values, 8);
  Real sum = values[0];
  sum += shuffle_xor(sum, 4);
  sum += shuffle_xor(sum, 2);
  return sum + shuffle_xor(sum, 1);
}

// Block of kThreads: the sum over its threads, which all of them get, always added in the same order.
template <int kThreads>
struct BlockSum {
  double of_warp[kThreads / kWarp];
};
template <int kThreads>
LSC_DEVICE double block_sum(BlockSum<kThreads>& memory, double value) {
  for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  sync_block();  // the last sum has been read
  if (lane_index() == 0) memory.of_warp[warp_index()] = value;
  sync_block();
  double sum = 0;
  for (double each : memory.of_warp) sum += each;
  return sum;
}

}  // namespace LSC_ISA
}  // namespace lsc
