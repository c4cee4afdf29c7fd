// Plain data that reward_head hands to its kernels.
#pragma once

#include <cstdint>

#include "arguments/rows.h"

namespace lsc {

// hidden [..., H] of any strides; a row is named by its number among the leading dimensions.
constexpr int kMaxHiddenLeading = 8;
struct HiddenRows {
  const void* data;
  DType dtype;
  int64_t width, column_stride;  // H
  int leading;
  int64_t sizes[kMaxHiddenLeading], strides[kMaxHiddenLeading];
};

}  // namespace lsc
