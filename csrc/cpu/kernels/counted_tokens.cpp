// One pass over a mask of any dtype and over the actions: the tokens that both leave in.
#include "cpu/kernels/counted_tokens.h"

#include "cpu/kernels/mask_reader.h"
#include "math/token_row.h"

namespace lsc {
namespace LSC_ISA {

namespace {

template <typename Id>
void drop_ignored(const Id* actions, int64_t n, uint8_t* counted) {
  for (int64_t i = 0; i < n; ++i) counted[i] &= actions[i] != kIgnoreIndex;
}

}  // namespace

void counted_tokens(const MaskRows& mask, const void* actions, bool actions_are_int32, int64_t length, bool* counted, int64_t begin, int64_t end) {
  static_assert(sizeof(bool) == 1);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t first = row * length;
    uint8_t* out = reinterpret_cast<uint8_t*>(counted) + first;
    read_counted(mask, row, 0, int(length), out);
    if (!actions) continue;
    if (actions_are_int32) {
      drop_ignored(static_cast<const int32_t*>(actions) + first, length, out);
    } else {
      drop_ignored(static_cast<const int64_t*>(actions) + first, length, out);
    }
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
