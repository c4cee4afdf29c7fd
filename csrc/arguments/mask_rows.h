// A mask [B, T] of any dtype, read as it is: nonzero counts.
#pragma once

#include <cstdint>

namespace lsc {

// How an element is stored; of a floating-point number only the sign of zero must be kept apart from nonzero.
enum class MaskType : int32_t { bits8, bits16, bits32, bits64, float16, float32, float64 };

struct MaskRows {
  const void* data;  // null: everything counts
  MaskType type;
  int64_t row_stride, column_stride;
};

}  // namespace lsc
