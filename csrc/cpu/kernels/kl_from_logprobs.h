#pragma once

#include "arguments/rows.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"

namespace lsc {

struct LogprobInputs {
  const float *logprobs, *ref_logprobs;
  const bool* mask;  // null: all counted
  KLArguments how;
};

// All that is written is 0 where the mask leaves out.
struct LogprobOutputs {
  float* kl;
  float *logprobs, *ref_logprobs;  // copies of what was read, each null where it is not wanted
};

struct LogprobGradients {
  float *logprobs, *ref_logprobs;  // each null where it is not wanted
};

LSC_DECLARE_KERNELS(
    // Elements [begin, end).
    void kl_forward(const LogprobInputs&, const LogprobOutputs&, int64_t begin, int64_t end);
    void kl_backward(const LogprobInputs&, const Upstream&, const LogprobGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
