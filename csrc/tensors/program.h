// A formula's program, checked.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "math/program.h"

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

}  // namespace lsc
