// A gradient that comes from above, where it lies. Autograd often hands over one value for all elements (of a sum, of a mean)
// or one for each row, expanded: a dense copy of that would be a pass over memory, and pages, for nothing.
#pragma once

#include <cstdint>

namespace lsc {

// Element i is data[(i / inner) * outer_stride + (i % inner) * inner_stride].
struct Upstream {
  const float* data;  // null where there is none
  int64_t inner, outer_stride, inner_stride;  // the last is 0 or 1
};

}  // namespace lsc
