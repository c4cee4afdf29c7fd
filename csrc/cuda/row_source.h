// Columns of a row of logits, a few per thread, on their way from memory to floats.
//
// A step of a block is a tile of kTile columns. Which thread takes which columns of it depends on the dtype alone, not on
// where the row lies in memory, so that a row gives the same bits wherever it lies. Whole tiles are read in loads of 16
// bytes (cuda/tile_ring.h); what is left at a row's end, and rows of two dtypes that are not aligned, element by element.
#pragma once

#include "arguments/rows.h"
#include "cuda/device.h"

namespace lsc {
namespace LSC_ISA {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocksAtOnce = 4;  // on a multiprocessor: 128 registers a thread
constexpr int kColumns = 8;  // of a thread, in a tile
constexpr int kTile = kThreads * kColumns;

// Two models of different dtypes, each known at run time only.
struct Mixed {};

// Neighbouring columns of a thread: 16 bytes of a 16-bit type, and of float. A tile of floats has two such groups.
template <typename T>
constexpr int kGroup = 4;
template <>
inline constexpr int kGroup<BFloat16> = 8;
template <>
inline constexpr int kGroup<Half> = 8;

template <typename T>
LSC_DEVICE int64_t column_of(int64_t tile, int i) {
  return tile + (i / kGroup<T>)*kThreads * kGroup<T> + thread_index() * kGroup<T> + i % kGroup<T>;
}

template <typename T>
LSC_DEVICE T excluded() {
  if constexpr (sizeof(T) == 4) {
    return T(-INFINITY);
  } else {
    T value;
    from_float(-INFINITY, &value);
    return value;
  }
}

// A thread's columns of a few tiles on their way through the block's memory: 128 bytes a thread and model. Each thread reads
// what it copied itself, so there is nothing to wait for but the copy.
constexpr int kStageBytes = 128 * kThreads;
template <typename T>
constexpr int kStages = kStageBytes / (kThreads * 32);
template <>
inline constexpr int kStages<BFloat16> = kStageBytes / (kThreads * 16);
template <>
inline constexpr int kStages<Half> = kStageBytes / (kThreads * 16);

// Words of 16 bytes that lie behind those of a warp's threads: of each warp, group and tile.
constexpr int kBehindBytes = kStageBytes / kWarp;

LSC_DEVICE unsigned char* staged_group(unsigned char* stage, int group) {
  return stage + (group * kThreads + int(thread_index())) * 16;
}

// Starts copying kCount columns from `column` on; what lies at `end` or beyond becomes -inf.
template <typename T, int kCount>
LSC_DEVICE void copy_group(const T* row, int64_t column, int64_t end, bool wide, unsigned char* to) {
  if (wide && column + kCount <= end) {
    copy_async<int(sizeof(T)) * kCount>(to, row + column);
  } else {
    T* group = reinterpret_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < kCount; ++i) group[i] = column + i < end ? row[column + i] : excluded<T>();
  }
}

// The 16 bytes that begin `bytes`, a multiple of kUnit below 16, into `first` or end so many into `second`: 16 aligned bytes each.
template <int kUnit>
LSC_DEVICE Words4 words_within(const unsigned char* first, const unsigned char* second, unsigned bytes) {
  uint32_t words[8];
  memcpy(words, __builtin_assume_aligned(first, 16), 16), memcpy(words + 4, __builtin_assume_aligned(second, 16), 16);
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = bytes & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = bytes & 4 ? words[i + 1] : words[i];
  if constexpr (kUnit < 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = shift_down(words[i], words[i + 1], bytes % 4 * 8);
  }
  return {words[0], words[1], words[2], words[3]};
}

// A whole tile of a row that is aligned. `from` is the thread's first group of it.
template <typename T>
LSC_DEVICE void copy_wide(const T* from, unsigned char* stage) {
#pragma unroll
  for (int i = 0; i < kColumns / kGroup<T>; ++i) copy_async<16>(staged_group(stage, i), from + i * kThreads * kGroup<T>);
}

// The floats of kGroup columns. Of two bf16 in a word one is a shift away, the other a mask.
template <typename T, int kCount>
LSC_DEVICE void to_floats(const T (&group)[kCount], float* x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t words[kCount / 2];
    memcpy(words, group, sizeof words);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      x[i] = bits_to_float(words[i / 2] << 16);
      x[i + 1] = bits_to_float(words[i / 2] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(group[i]);
  }
}

// One model's row.
template <typename T>
class RowSource {
 public:
  LSC_DEVICE RowSource(const Rows& rows, int64_t offset)
      : row_(static_cast<const T*>(rows.data) + offset), wide_(reinterpret_cast<uintptr_t>(row_) % 16 == 0) {}

  LSC_DEVICE void copy(int64_t tile, int64_t end, unsigned char* stage) const {
#pragma unroll
    for (int first = 0; first < kColumns; first += kGroup<T>) {
      copy_group<T, kGroup<T>>(row_, column_of<T>(tile, first), end, wide_, staged_group(stage, first / kGroup<T>));
    }
  }

  LSC_DEVICE void unpack(unsigned char* stage, float (&x)[kColumns]) const {
#pragma unroll
    for (int first = 0; first < kColumns; first += kGroup<T>) {
      T group[kGroup<T>];
      memcpy(group, __builtin_assume_aligned(staged_group(stage, first / kGroup<T>), 16), sizeof group);
      to_floats(group, x + first);
    }
  }

  LSC_DEVICE bool wide() const { return wide_; }
  // The thread's first columns of a tile.
  LSC_DEVICE const T* group(int64_t tile) const { return row_ + column_of<T>(tile, 0); }

  LSC_DEVICE float at(int64_t column) const { return to_float(row_[column]); }

 private:
  const T* row_;
  bool wide_;
};

template <>
class RowSource<Mixed> {
 public:
  LSC_DEVICE RowSource(const Rows& rows, int64_t offset)
      : row_(static_cast<const char*>(rows.data) + offset * (rows.dtype == DType::float32 ? 4 : 2)), dtype_(rows.dtype),
        wide_(reinterpret_cast<uintptr_t>(row_) % (rows.dtype == DType::float32 ? 16 : 8) == 0) {}

  LSC_DEVICE void copy(int64_t tile, int64_t end, unsigned char* stage) const {
    switch (dtype_) {
      case DType::float32: return copy_as<float>(tile, end, stage);
      case DType::bfloat16: return copy_as<BFloat16>(tile, end, stage);
      case DType::float16: return copy_as<Half>(tile, end, stage);
    }
  }

  // Aligned or not, it is read as what it is.
  LSC_DEVICE bool wide() const { return false; }
  LSC_DEVICE const Mixed* group(int64_t) const { return nullptr; }

  // Without a branch: three ways for each of two models are too much for a multiprocessor's registers.
  LSC_DEVICE void unpack(unsigned char* stage, float (&x)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(staged_group(stage, i / kGroup<Mixed>));
      const int column = i % kGroup<Mixed>;
      const uint16_t bits = uint16_t(words[column / 2] >> (column % 2 * 16));
      const float half = dtype_ == DType::bfloat16 ? to_float(BFloat16{bits}) : to_float(Half{bits});
      x[i] = dtype_ == DType::float32 ? bits_to_float(words[column]) : half;
    }
  }

  LSC_DEVICE float at(int64_t column) const {
    switch (dtype_) {
      case DType::bfloat16: return to_float(reinterpret_cast<const BFloat16*>(row_)[column]);
      case DType::float16: return to_float(reinterpret_cast<const Half*>(row_)[column]);
      case DType::float32: break;
    }
    return reinterpret_cast<const float*>(row_)[column];
  }

 private:
  template <typename T>
  LSC_DEVICE void copy_as(int64_t tile, int64_t end, unsigned char* stage) const {
#pragma unroll
    for (int first = 0; first < kColumns; first += kGroup<Mixed>) {
      copy_group<T, kGroup<Mixed>>(reinterpret_cast<const T*>(row_), column_of<Mixed>(tile, first), end, wide_,
                                   staged_group(stage, first / kGroup<Mixed>));
    }
  }
  const char* row_;
  DType dtype_;
  bool wide_;
};

}  // namespace LSC_ISA
}  // namespace lsc
