// A block of threads on the host: what csrc/cuda/device.h needs so that the kernels' own source runs without a GPU.
//
// Every thread of a block is a fiber with a stack of its own. One runs at a time, until it reaches a barrier, a shuffle or
// a vote, where it waits for the others; blocks run one after another. The order in which threads and blocks get their
// turn is ascending, or a permutation drawn from a seed: a result that depends on it is a missing barrier.
//
// What is reported as an error instead of being waited for: lanes of a warp that meet in different collectives, and
// threads that wait where others have left. Shared memory is filled with NaN before each block, and so is the target of an
// asynchronous copy until its batch has been waited for: what is read too early, or written over too early, shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

namespace lsc {
namespace emulation {

using Place = std::source_location;

constexpr unsigned kWarpSize = 32;
constexpr size_t kSlotBytes = 16;
struct Slot {
  alignas(16) unsigned char bytes[kSlotBytes];
};

unsigned thread_index();
int64_t block_index();

// Waits for every thread of the block.
void sync_block(const Place& place);
// Leaves a value for the warp, waits for all 32 lanes, and returns what they left.
const Slot* exchange(const void* value, size_t bytes, const Place& place);
// Memory that the threads of a block share.
void* block_memory(size_t bytes);

// A thread's own copies: in batches, each of which is there once at most so many later ones are under way.
void copy_later(void* to, const void* from, size_t bytes);
void end_batch();
void wait_batches(uint64_t under_way);

// body() once for every thread of every block.
void run(int64_t blocks, unsigned threads, const std::function<void()>& body);

template <typename T>
T shuffle(T value, unsigned from_lane, const Place& place) {
  static_assert(sizeof(T) <= kSlotBytes);
  T result;
  std::memcpy(&result, exchange(&value, sizeof value, place)[from_lane % kWarpSize].bytes, sizeof result);
  return result;
}

uint32_t ballot(bool vote, const Place& place);

}  // namespace emulation
}  // namespace lsc
