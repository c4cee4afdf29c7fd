#pragma once

#include "arguments/transform.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"
#include "math/program.h"

namespace lsc {

struct Aggregation {
  Operand weights;
  bool ignore_missing;
  const Program* program;  // null: all properties
};

LSC_DECLARE_KERNELS(
    // Rows [begin, end). Forward writes one u per row; backward reads the upstream gradient of every row.
    void aggregate_forward(const TransformInputs&, const Aggregation&, float* utility, int64_t begin, int64_t end);
    void aggregate_backward(const TransformInputs&, const Aggregation&, const Upstream&, const TransformGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
