#pragma once

#include "arguments/groups.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Groups [begin, end). The weighted sum of the columns' scores, one per row, to one of `advantages` and `sums`.
    void group_forward(const GroupColumns&, float* advantages, double* sums, int64_t begin, int64_t end);
    // From the gradient to that sum, one of `grad` and `grad_of_sums`, the gradient to the table: of its dtype, or doubles where it
    // is `sums`.
    void group_backward(const GroupColumns&, const float* grad, const double* grad_of_sums, void* out, int64_t begin, int64_t end);)

}  // namespace lsc
