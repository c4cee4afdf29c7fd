// The tensors of aggregate_rewards as the plain data of its kernels.
#pragma once

#include "cpu/kernels/aggregate_rewards.h"
#include "cpu/transform_operands.h"
#include "tensors/program.h"

namespace lsc {

// The arguments of an aggregation, held alive while its kernels run.
struct AggregateTensors {
  Program program;
  Tensor scores;
  OperandTensor reference, scale, floor, weights;
  TransformInputs kernel;
  Aggregation how;
  int64_t rows;

  AggregateTensors(const Tensor& given, const std::optional<Tensor>& reference_reward, double reference_number,
                   const std::optional<Tensor>& scales, double scale_number, const std::optional<Tensor>& floors,
                   double floor_number, const std::optional<Tensor>& given_weights, bool ignore_missing,
                   const ProgramNumbers& numbers)
      : program(program_of(numbers, given.size(given.dim() - 1))),
        scores(dense(given)),
        reference(operand_of(reference_reward, reference_number, scores)),
        scale(operand_of(scales, scale_number, scores)),
        floor(operand_of(floors, floor_number, scores)),
        weights(operand_of(given_weights, 1.0, scores)) {
    kernel = {scores.data_ptr(), dtype_of(scores), scores.size(scores.dim() - 1), reference.operand, scale.operand,
              floor.operand};
    how = {weights.operand, ignore_missing, program.length ? &program : nullptr};
    rows = scores.numel() == 0 ? 0 : scores.numel() / kernel.columns;
  }
  AggregateTensors(const AggregateTensors&) = delete;  // `how` points into it
};

}  // namespace lsc
