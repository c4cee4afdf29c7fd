// A mask of any dtype and any strides, on the device; and a block's search for the last position that counts.
#pragma once

#include "cpu/kernels/mask_rows.h"
#include "cuda/device.h"

namespace lsc {
namespace LSC_ISA {

LSC_DEVICE bool is_counted(const MaskRows& mask, int64_t row, int64_t column) {
  if (!mask.data) return true;
  const int64_t at = row * mask.row_stride + column * mask.column_stride;
  switch (mask.type) {
    case MaskType::bits8: break;
    case MaskType::bits16: return static_cast<const uint16_t*>(mask.data)[at] != 0;
    case MaskType::bits32: return static_cast<const uint32_t*>(mask.data)[at] != 0;
    case MaskType::bits64: return static_cast<const uint64_t*>(mask.data)[at] != 0;
    case MaskType::float16: return (static_cast<const uint16_t*>(mask.data)[at] & 0x7fff) != 0;
    case MaskType::float32: return (static_cast<const uint32_t*>(mask.data)[at] << 1) != 0;
    case MaskType::float64: return (static_cast<const uint64_t*>(mask.data)[at] << 1) != 0;
  }
  return static_cast<const uint8_t*>(mask.data)[at] != 0;
}

struct LastCountedMemory {
  int64_t last[kWarp];
};

// Block of kBlockThreads: the last counted position before `end`, -1 if there is none.
template <int kBlockThreads>
LSC_DEVICE int64_t last_counted(LastCountedMemory& memory, const MaskRows& mask, int64_t row, int64_t end) {
  if (!mask.data) return end - 1;
  int64_t last = -1;
  for (int64_t t = thread_index(); t < end; t += kBlockThreads)
    if (is_counted(mask, row, t)) last = t;
  for (int step = kWarp / 2; step; step /= 2) {
    const int64_t other = shuffle_xor(last, step);
    last = last < other ? other : last;
  }
  sync_block();  // the last answer has been read
  if (lane_index() == 0) memory.last[warp_index()] = last;
  sync_block();
  for (int w = 0; w < kBlockThreads / kWarp; ++w) last = last < memory.last[w] ? memory.last[w] : last;
  return last;
}

}  // namespace LSC_ISA
}  // namespace lsc
