// Rows of scores through a formula, one after another, in double: once per sequence, where nothing is worth a vector.
#pragma once

#include <algorithm>

#include "cpu/kernels/aggregate_rewards.h"
#include "cpu/kernels/tiles.h"
#include "math/formula.h"

namespace lsc {
namespace LSC_ISA {

namespace {

template <typename T>
class FormulaRows {
 public:
  FormulaRows(const TransformInputs& inputs, const Aggregation& how) : inputs_(inputs), how_(how), program_(*how.program) {
    for (int i = 0; i < program_.length; ++i) {
      if (program_.instructions[i].kind == Instruction::Kind::property) instruction_[properties_++] = i;
    }
  }

  float value(int64_t row) {
    judge_all(row);
    return float(evaluate(program_, judged_, values_).good);
  }

  // A row of every gradient that is wanted: 0 for the columns that the formula does not name, and for all of them where
  // nobody asked.
  void gradients(int64_t row, double upstream, const TransformGradients& out) {
    const int64_t columns = inputs_.columns, first = row * columns;
    T* to_scores = static_cast<T*>(out.scores) + first;
    for (int64_t column = 0; column < columns; ++column) from_float(0.0f, to_scores + column);
    for (float* each : {out.reference, out.scale, out.weights}) {
      if (each) std::fill_n(each + first, columns, 0.0f);
    }
    if (upstream == 0) return;
    judge_all(row);
    evaluate(program_, judged_, values_);
    differentiate(program_, values_, slopes_, visited_);
    for (int i = 0; i < properties_; ++i) {
      const int64_t at = first + column_of(i);
      const PropertyGradient<double> of_property = gradient(judged_[i], slopes_[instruction_[i]]);
      const double to_score = upstream * of_property.z / at_score(inputs_.scale, at);
      from_float(float(to_score), static_cast<T*>(out.scores) + at);
      if (out.reference) out.reference[at] = float(-to_score);
      if (out.scale) out.scale[at] = to_score == 0 ? 0.0f : float(-to_score * centred(at));
      if (out.weights) out.weights[at] = float(upstream * of_property.weight);
    }
  }

 private:
  int64_t column_of(int property) const { return program_.instructions[instruction_[property]].operand; }

  double at_score(const Operand& operand, int64_t at) const {
    switch (operand.layout) {
      case Operand::Layout::column: return operand.data[at % inputs_.columns];
      case Operand::Layout::full: return operand.data[at];
      case Operand::Layout::number: break;
    }
    return operand.number;
  }

  double score(int64_t at) const { return to_float(static_cast<const T*>(inputs_.scores)[at]); }

  double centred(int64_t at) const {
    return (score(at) - at_score(inputs_.reference, at)) / at_score(inputs_.scale, at);
  }

  void judge_all(int64_t row) {
    for (int i = 0; i < properties_; ++i) {
      const int64_t at = row * inputs_.columns + column_of(i);
      const double given = score(at);
      judged_[i] = how_.ignore_missing && given != given
                       ? certainly_good<double>()
                       : judge(centred(at), at_score(inputs_.floor, at), at_score(how_.weights, at));
    }
  }

  const TransformInputs& inputs_;
  const Aggregation& how_;
  const Program& program_;
  int properties_ = 0, instruction_[kMaxProperties];
  Judged<double> judged_[kMaxProperties];
  Judgement<double> values_[kMaxInstructions];
  Slope<double> slopes_[kMaxInstructions];
  Visited<double> visited_[kMaxProperties];
};

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
