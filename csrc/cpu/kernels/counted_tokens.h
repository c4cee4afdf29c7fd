#pragma once

#include "arguments/mask_rows.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Sequences [begin, end) of `length` tokens: whether the mask, and the action where `actions` is not null, leaves each in.
    void counted_tokens(const MaskRows&, const void* actions, bool actions_are_int32, int64_t length, bool* counted, int64_t begin, int64_t end);)

}  // namespace lsc
