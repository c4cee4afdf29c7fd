// Reading a mask of any dtype and any strides.
#pragma once

#include <cstring>

#include "arguments/mask_rows.h"

namespace lsc {
namespace LSC_ISA {

namespace {

// Calls with(row pointer, bits that make an element nonzero), the pointer being of unsigned integers.
template <typename With>
inline auto with_mask_row(const MaskRows& mask, int64_t row, const With& with) {
  const int64_t offset = row * mask.row_stride;
  switch (mask.type) {
    case MaskType::bits16: return with(static_cast<const uint16_t*>(mask.data) + offset, uint16_t(0xffff));
    case MaskType::bits32: return with(static_cast<const uint32_t*>(mask.data) + offset, uint32_t(0xffffffff));
    case MaskType::bits64: return with(static_cast<const uint64_t*>(mask.data) + offset, ~uint64_t(0));
    case MaskType::float16: return with(static_cast<const uint16_t*>(mask.data) + offset, uint16_t(0x7fff));
    case MaskType::float32: return with(static_cast<const uint32_t*>(mask.data) + offset, uint32_t(0x7fffffff));
    case MaskType::float64: return with(static_cast<const uint64_t*>(mask.data) + offset, ~uint64_t(0) >> 1);
    case MaskType::bits8: break;
  }
  return with(static_cast<const uint8_t*>(mask.data) + offset, uint8_t(0xff));
}

// The last counted position before `end`, -1 if there is none.
inline int64_t last_counted(const MaskRows& mask, int64_t row, int64_t end) {
  if (!mask.data) return end - 1;
  return with_mask_row(mask, row, [&](auto* values, auto nonzero) {
    int64_t place = end - 1;
    while (place >= 0 && !(values[place * mask.column_stride] & nonzero)) --place;
    return place;
  });
}

inline bool is_counted(const MaskRows& mask, int64_t row, int64_t column) {
  if (!mask.data) return true;
  return with_mask_row(mask, row, [&](auto* values, auto nonzero) { return (values[column * mask.column_stride] & nonzero) != 0; });
}

// counted[i] = whether position first + i counts; returns how many do.
inline int read_counted(const MaskRows& mask, int64_t row, int64_t first, int n, uint8_t* counted) {
  if (!mask.data) {
    std::memset(counted, 1, n);
    return n;
  }
  return with_mask_row(mask, row, [&](auto* elements, auto nonzero) {
    int count = 0;
    if (mask.column_stride == 1) {
      for (int i = 0; i < n; ++i) counted[i] = (elements[first + i] & nonzero) != 0, count += counted[i];
    } else {
      for (int i = 0; i < n; ++i) counted[i] = (elements[(first + i) * mask.column_stride] & nonzero) != 0, count += counted[i];
    }
    return count;
  });
}

// values[i] = 0 where position first + i is left out.
inline void clear_uncounted(const MaskRows& mask, int64_t row, int64_t first, int n, float* values) {
  if (!mask.data) return;
  with_mask_row(mask, row, [&](auto* elements, auto nonzero) {
    if (mask.column_stride == 1) {
      for (int i = 0; i < n; ++i) values[i] = elements[first + i] & nonzero ? values[i] : 0.0f;
    } else {
      for (int i = 0; i < n; ++i) values[i] = elements[(first + i) * mask.column_stride] & nonzero ? values[i] : 0.0f;
    }
  });
}

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
