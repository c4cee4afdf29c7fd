// Plain data that lsc_transform and aggregate_rewards hand to their kernels.
#pragma once

#include <cstdint>

#include "arguments/rows.h"

namespace lsc {

// One of reference reward, scale, floor, weights: a number, one per column, or one per score.
struct Operand {
  enum class Layout { number, column, full } layout;
  double number;
  const float* data;
};

// Scores as rows of `columns`, contiguous.
struct TransformInputs {
  const void* scores;
  DType dtype;
  int64_t columns;
  Operand reference, scale, floor;
};

// Written for every score, contiguous; each null where it is not wanted. `scores` is of the scores' dtype.
struct TransformGradients {
  void* scores;
  float *reference, *scale, *weights;
};

}  // namespace lsc
