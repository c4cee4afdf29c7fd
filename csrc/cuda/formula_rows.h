// A row of scores, as a formula reads it: what aggregate_rewards and shaped_rewards share on the device.
#pragma once

#include "cuda/transform.h"
#include "math/formula.h"

namespace lsc {
namespace LSC_ISA {

LSC_DEVICE float score_at(const DeviceScores& in, int64_t row, int64_t column) {
  return load_one(in.dtype, in.scores, row * in.columns + column);
}

LSC_DEVICE double centred_at(const DeviceScores& in, int64_t row, int64_t column) {
  return (double(score_at(in, row, column)) - in.reference.at(row, column)) / in.scale.at(row, column);
}

// Every `step`-th from `first` of the properties that a program names, in its order.
LSC_DEVICE void judge_row(
    const DeviceScores& in, const Program& program, int64_t row, Judged<Log>* judged, int first = 0, int step = 1) {
  for (int i = 0, property = 0; i < program.length; ++i) {
    if (program.instructions[i].kind != Instruction::Kind::property) continue;
    if (const int own = property++; own % step == first) {
      const int64_t column = program.instructions[i].operand;
      const float score = score_at(in, row, column);
      judged[own] = in.ignore_missing && score != score
                        ? certainly_good()
                        : judge(centred_at(in, row, column), in.floor.at(row, column), in.weights.at(row, column));
    }
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
