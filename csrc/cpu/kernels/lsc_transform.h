#pragma once

#include "arguments/transform.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Rows [begin, end). Forward writes u of every score; backward reads the upstream gradient of every u.
    void lsc_transform_forward(const TransformInputs&, float* utility, int64_t begin, int64_t end);
    void lsc_transform_backward(const TransformInputs&, const Upstream&, const TransformGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
