#pragma once

#include "arguments/transform.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"

namespace lsc {

// Pairs of scores of one dtype, contiguous.
struct PairInputs {
  const void *chosen, *rejected;
  DType dtype;
  Operand margin;  // a number, or one per pair
  double center;
};

// Written for every pair, contiguous; each null where it is not wanted.
struct PairGradients {
  void *chosen, *rejected;
  float* margin;
};

LSC_DECLARE_KERNELS(
    // Pairs [begin, end). Forward returns the sum of their losses, and writes them where `losses` is not null; backward
    // multiplies each gradient by `factor`, and by `grad` of its pair where it has data.
    double bradley_terry_forward(const PairInputs&, float* losses, int64_t begin, int64_t end);
    void bradley_terry_backward(const PairInputs&, const Upstream& grad, double factor, const PairGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
