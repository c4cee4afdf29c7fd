// The tensors of aggregate_rewards as the plain data of its kernels.
#pragma once

#include <string>

#include "cpu/kernels/aggregate_rewards.h"
#include "cpu/transform_operands.h"

namespace lsc {

using ProgramNumbers = std::optional<std::vector<int64_t>>;

// A program from three numbers per instruction. One that would leave its stack or the scores' columns is refused.
inline Program program_of(const ProgramNumbers& numbers, int64_t columns) {
  using Kind = Instruction::Kind;
  Program program;
  if (!numbers) return program;
  const auto refuse = [](const char* why) { throw std::invalid_argument(std::string("program: ") + why); };
  if (numbers->empty() || numbers->size() % 3 || numbers->size() > 3 * kMaxInstructions) refuse("1 to 128 instructions of 3 numbers are wanted");
  program.length = int32_t(numbers->size() / 3);
  int32_t sizes[kMaxProperties], depth = 0, properties = 0;
  for (int32_t i = 0; i < program.length; ++i) {
    const int64_t *number = numbers->data() + 3 * i, operand = number[1];
    if (number[0] < 0 || number[0] > int64_t(Kind::weakest)) refuse("an unknown instruction");
    const Kind kind = Kind(number[0]);
    int32_t size = 1;
    if (kind == Kind::property) {
      if (operand < 0 || operand >= columns) refuse("a column that scores does not have");
      if (++properties > kMaxProperties) refuse("more than 32 properties");
    } else {
      const int64_t takes = kind == Kind::complement ? 1 : operand;
      if (takes < 1 || takes > depth) refuse("an instruction lacks its operands");
      if (kind == Kind::at_least && (number[2] < 1 || number[2] > operand)) refuse("at_least is out of range");
      for (int64_t n = 0; n < takes; ++n) size += sizes[--depth];
    }
    sizes[depth++] = size;
    program.instructions[i] = {kind, int32_t(operand), int32_t(number[2]), size};
  }
  if (depth != 1) refuse("values are left over");
  return program;
}

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
