// Tiles of a row of one or two models' logits on their way through the block's memory: a few are being copied while one is
// worked on, in turn into the places of a ring. Warps do not wait for one another, nor threads where rows are aligned: each
// reads what it copied itself.
//
// A row that does not begin on 16 bytes is copied in the aligned words that hold it, and moved into place when they are
// there: a thread's last columns are in the words of the lane after it.
//
// Nothing in the loop has to do with the end of a row but one comparison; what is seldom needed lies in the block's memory,
// since a thread's registers are short.
#pragma once

#include "cuda/row_source.h"

namespace lsc {
namespace LSC_ISA {

struct ModelRing {
  alignas(16) unsigned char stages[kStageBytes];
  alignas(16) unsigned char behind[kBehindBytes];
};

struct RingMemory {
  ModelRing models[2];
  alignas(16) unsigned char sources[2][16];
  int64_t begin, end;
  int shifted_tiles;  // that are copied in words of 16 bytes and moved into place
};

template <typename T, int kModels>
class TileRing {
 public:
  // Columns [begin, end) of rows of kModels models; by the whole block.
  LSC_DEVICE TileRing(RingMemory& memory, const RowSource<T>& main, const RowSource<T>& other, int64_t begin, int64_t end)
      : memory_(memory), main_(main.group(begin)), other_(other.group(begin)),
        wide_tiles_(main.wide() && other.wide() ? int((end - begin) / kTile) : 0) {
    static_assert(sizeof main <= sizeof memory.sources[0]);
    if (thread_index() == 0) {
      source(0) = main, source(1) = other;
      memory.begin = begin, memory.end = end;
      // the words behind the last columns are the row's too
      memory.shifted_tiles = kWords && wide_tiles_ == 0 ? int((end - begin - kGroup<T>) / kTile) : 0;
    }
    sync_block();
  }

  // The first tile is this one now. Copies that are still under way must be waited for before.
  LSC_DEVICE void begin_at(int tile) {
    copied_ = tile, stage_ = 0;
#pragma unroll 1
    for (int i = 0; i < kStages<T>; ++i) {
      if (is_wide()) {
        copy_wide_tile();
      } else {
        copy_other_tile();
      }
      end_copy();
    }
    wait_copies<kStages<T> - 1>();
    move_into_place();
  }

  // On to the next tile; what comes last takes the place of this one.
  LSC_DEVICE void pass() {
    if (is_wide()) {
      copy_wide_tile();
      end_copy();
      wait_copies<kStages<T> - 1>();
    } else {
      copy_other_tile();
      end_copy();
      wait_copies<kStages<T> - 1>();
      move_into_place();
    }
  }

  LSC_DEVICE void wait_for_all() { wait_copies<0>(); }

  // The first tile: its columns, how many there are, which of how many tiles it is.
  LSC_DEVICE void unpack(int model, float (&x)[kColumns]) const { source(model).unpack(staged(model), x); }
  LSC_DEVICE int columns_of_tile() const {
    const int64_t left = memory_.end - memory_.begin - int64_t(tile()) * kTile;
    return left < kTile ? int(left) : kTile;
  }
  LSC_DEVICE int tile() const { return copied_ - kStages<T>; }
  LSC_DEVICE int tiles() const { return int((memory_.end - memory_.begin + kTile - 1) / kTile); }
  // Grows by 1 from tile to tile.
  LSC_DEVICE int copied() const { return copied_; }
  // Where a warp may keep what it exchanges among its lanes, once they have unpacked it.
  LSC_DEVICE unsigned char* exchange() const { return staged(0); }

 private:
  static constexpr bool kWords = !std::is_same_v<T, Mixed>;
  static constexpr unsigned kTileBytes = kStageBytes / kStages<T>;

  LSC_DEVICE RowSource<T>& source(int model) const { return *reinterpret_cast<RowSource<T>*>(memory_.sources[model]); }
  LSC_DEVICE unsigned char* staged(int model) const { return memory_.models[model].stages + stage_; }
  // The 16 bytes behind those of a warp's lanes.
  LSC_DEVICE unsigned char* behind(int model, unsigned group) const {
    return memory_.models[model].behind + (stage_ + (group * kThreads + thread_index()) * 16) / (kWarp * 16) * 16;
  }

  // The tile that is copied next.
  LSC_DEVICE bool is_wide() const { return kWords && copied_ < wide_tiles_; }
  LSC_DEVICE void copy_wide_tile() {
    copy_wide(main_ + int64_t(copied_) * kTile, staged(0));
    if constexpr (kModels == 2) copy_wide(other_ + int64_t(copied_) * kTile, staged(1));
  }
  LSC_DEVICE void copy_other_tile() {
    if (kWords && copied_ < memory_.shifted_tiles) {
      copy_shifted(main_, 0);
      if constexpr (kModels == 2) copy_shifted(other_, 1);
    } else if (const int64_t tile = memory_.begin + int64_t(copied_) * kTile; tile < memory_.end) {
      source(0).copy(tile, memory_.end, staged(0));
      if constexpr (kModels == 2) source(1).copy(tile, memory_.end, staged(1));
    }
  }
  LSC_DEVICE void end_copy() {
    ++copied_;
    stage_ = (stage_ + kTileBytes) % kStageBytes;
    end_batch();
  }

  // The aligned words that hold a tile's columns.
  LSC_DEVICE void copy_shifted(const T* first, int model) {
    if constexpr (kWords) {
      const uintptr_t address = reinterpret_cast<uintptr_t>(first);
      const auto* words = reinterpret_cast<const unsigned char*>(address - address % 16) + int64_t(copied_) * int(kTile * sizeof(T));
#pragma unroll
      for (int i = 0; i < kColumns / kGroup<T>; ++i, words += kThreads * 16) {
        copy_async<16>(staged_group(staged(model), i), words);
        copy_async_if(lane_index() == kWarp - 1, behind(model, i), words + 16);
      }
    }
  }
  // How far a pointer is behind a multiple of 16 bytes.
  static LSC_DEVICE unsigned bytes_behind(const T* pointer) { return unsigned(reinterpret_cast<uintptr_t>(pointer) % 16); }

  LSC_DEVICE void move_into_place() {
    if (!kWords || tile() >= memory_.shifted_tiles) return;
    sync_warp();
    move_into_place(0, bytes_behind(main_));
    if constexpr (kModels == 2) move_into_place(1, bytes_behind(other_));
  }
  LSC_DEVICE void move_into_place(int model, unsigned bytes) {
#pragma unroll
    for (int i = 0; i < kColumns / kGroup<T>; ++i) {
      unsigned char* const own = staged_group(staged(model), i);
      const unsigned char* const after = lane_index() == kWarp - 1 ? behind(model, i) : own + 16;
      const Words4 words = words_within<sizeof(T)>(own, after, bytes);
      sync_warp();
      memcpy(__builtin_assume_aligned(own, 16), &words, 16);
    }
  }

  RingMemory& memory_;
  const T *main_, *other_;  // this thread's columns of the range's first tile
  const int wide_tiles_;    // in which they are aligned
  int copied_;              // so many; the next one goes where the first lies
  unsigned stage_;          // where that is, in bytes
};

}  // namespace LSC_ISA
}  // namespace lsc
