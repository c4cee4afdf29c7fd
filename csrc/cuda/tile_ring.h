// Tiles of a row of one or two models' logits on their way through the block's memory: a few are being copied while one is
// worked on, in turn into the places of a ring. A thread reads what it copied itself, so it waits for nobody.
//
// Nothing in the loop has to do with the end of a row but one comparison; what is seldom needed lies in the block's memory,
// since a thread's registers are short.
#pragma once

#include "cuda/row_source.h"

namespace lsc {
namespace LSC_ISA {

struct RingMemory {
  alignas(16) unsigned char stages[2][kStageBytes];
  alignas(16) unsigned char sources[2][16];
  int64_t begin, end;
};

template <typename T, int kModels>
class TileRing {
 public:
  // Columns [begin, end) of rows of kModels models; by the whole block.
  LSC_DEVICE TileRing(RingMemory& memory, const RowSource<T>& main, const RowSource<T>& other, int64_t begin, int64_t end)
      : memory_(memory), main_first_(main.group(begin)), other_first_(other.group(begin)),
        wide_tiles_(main.wide() && other.wide() ? int((end - begin) / kTile) : 0) {
    static_assert(sizeof main <= sizeof memory.sources[0]);
    if (thread_index() == 0) {
      source(0) = main, source(1) = other;
      memory.begin = begin, memory.end = end;
    }
    sync_block();
  }

  // Begins with this tile. Copies that are still under way must be waited for first.
  LSC_DEVICE void begin_at(int tile) {
    copied_ = tile, stage_ = 0;
#pragma unroll 1
    for (unsigned i = 0; i + 1 < kStages<T>; ++i) copy(i * kTileBytes);
  }

  // For the first tile that has not been passed, while the others go on.
  LSC_DEVICE void wait() { wait_copies<kStages<T> - 2>(); }
  LSC_DEVICE void wait_for_all() { wait_copies<0>(); }

  // Into the place of the tile before this one.
  LSC_DEVICE void copy_next() { copy((stage_ - kTileBytes) % kStageBytes); }
  LSC_DEVICE void pass() { stage_ = (stage_ + kTileBytes) % kStageBytes; }

  LSC_DEVICE void unpack(int model, float (&x)[kColumns]) const { source(model).unpack(staged(model, stage_), x); }

  LSC_DEVICE int64_t columns() const { return memory_.end - memory_.begin; }

 private:
  static constexpr unsigned kTileBytes = kStageBytes / kStages<T>;

  LSC_DEVICE RowSource<T>& source(int model) const { return *reinterpret_cast<RowSource<T>*>(memory_.sources[model]); }
  LSC_DEVICE unsigned char* staged(int model, unsigned stage) const { return memory_.stages[model] + stage; }

  LSC_DEVICE void copy(unsigned stage) {
    if (!std::is_same_v<T, Mixed> && copied_ < wide_tiles_) {
      copy_wide(main_first_ + int64_t(copied_) * kTile, staged(0, stage));
      if constexpr (kModels == 2) copy_wide(other_first_ + int64_t(copied_) * kTile, staged(1, stage));
    } else if (const int64_t tile = memory_.begin + int64_t(copied_) * kTile; tile < memory_.end) {
      source(0).copy(tile, memory_.end, staged(0, stage));
      if constexpr (kModels == 2) source(1).copy(tile, memory_.end, staged(1, stage));
    }
    ++copied_;
    end_batch();
  }

  RingMemory& memory_;
  const T *main_first_, *other_first_;  // this thread's part of the first tile
  const int wide_tiles_;                // that can be copied in loads of 16 bytes
  int copied_;
  unsigned stage_;  // where the first tile lies that has not been passed, in bytes
};

}  // namespace LSC_ISA
}  // namespace lsc
