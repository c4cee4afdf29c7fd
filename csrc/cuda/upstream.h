// The upstream gradient of one element.
#pragma once

#include "arguments/upstream.h"
#include "cuda/device.h"

namespace lsc {
namespace LSC_ISA {

LSC_DEVICE float upstream_at(const Upstream& grad, int64_t i) {
  if (grad.outer_stride == grad.inner * grad.inner_stride) return grad.data[i * grad.inner_stride];  // without a division
  return grad.data[i / grad.inner * grad.outer_stride + i % grad.inner * grad.inner_stride];
}

}  // namespace LSC_ISA
}  // namespace lsc
