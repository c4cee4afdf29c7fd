// Integers of either dtype and a mask of any dtype and strides, on the device; and a block's search for the last position that counts.
#pragma once

#include "arguments/mask_rows.h"
#include "cuda/device.h"

namespace lsc {
namespace LSC_ISA {

LSC_DEVICE int64_t integer_at(const void* data, bool is_int32, int64_t i) {
  return is_int32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

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

// Block of kBlockThreads: the last position before `end` for which counted(position), -1 if there is none. It looks from the
// end, as far as it must.
template <int kBlockThreads, typename Counted>
LSC_DEVICE int64_t last_where(LastCountedMemory& memory, int64_t end, const Counted& counted) {
  for (; end > 0; end -= kBlockThreads) {
    const int64_t t = end - kBlockThreads + thread_index();
    const uint32_t found = ballot(t >= 0 && counted(t));
    const bool writes = found ? found >> lane_index() == 1 : lane_index() == 0;
    sync_block();  // the last answer has been read
    if (writes) memory.last[warp_index()] = found ? t : -1;
    sync_block();
    int64_t last = -1;
    for (int w = 0; w < kBlockThreads / kWarp; ++w) last = last < memory.last[w] ? memory.last[w] : last;
    if (last >= 0) return last;
  }
  return -1;
}

// The same of a mask's row.
template <int kBlockThreads>
LSC_DEVICE int64_t last_counted(LastCountedMemory& memory, const MaskRows& mask, int64_t row, int64_t end) {
  if (!mask.data) return end - 1;
  return last_where<kBlockThreads>(memory, end, [&](int64_t t) { return is_counted(mask, row, t); });
}

}  // namespace LSC_ISA
}  // namespace lsc
