// A formula over properties as instructions in postfix order: plain data, without code.
//
// lsc_kernels/formula.py writes programs; math/formula.h interprets them.
#pragma once

#include <cstdint>

namespace lsc {

constexpr int kMaxProperties = 32;
// 32 properties, 31 connectives of two or more, and a complement of each
constexpr int kMaxInstructions = 128;

struct Instruction {
  enum class Kind : int32_t { property, complement, all, any, at_least, weakest } kind;
  int32_t operand;  // the property's column, or how many parts are connected
  int32_t least;    // of at_least
  int32_t size;     // how many instructions make this part, itself included: the part before it ends `size` earlier
};

struct Program {
  int32_t length = 0;  // 0: no formula
  Instruction instructions[kMaxInstructions];
};

}  // namespace lsc
