#pragma once

#include "arguments/rows.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Elements [begin, end). Forward writes kl; backward writes two gradients from `grad`, each null where it
    // is not wanted.
    void kl_forward(const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments&, float* kl, int64_t begin, int64_t end);
    void kl_backward(const float* grad, const float* logprobs, const float* ref_logprobs, const bool* mask, const KLArguments&, float* to_logprobs, float* to_ref, int64_t begin, int64_t end);)

}  // namespace lsc
