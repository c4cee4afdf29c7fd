// Tensors of lsc_transform and aggregate_rewards as the plain data of their kernels.
#pragma once

#include "arguments/transform.h"
#include "cpu/tensors.h"

namespace lsc {

// Holds the tensors that an Operand points into.
struct OperandTensor {
  std::optional<Tensor> tensor;
  Operand operand;
};

// A number, or a float32 tensor that is a scalar, [columns], or of the scores' shape.
inline OperandTensor operand_of(const std::optional<Tensor>& given, double number, const Tensor& scores) {
  if (!given) return {std::nullopt, {Operand::Layout::number, number, nullptr}};
  const Tensor tensor = dense(*given);
  const float* data = static_cast<const float*>(tensor.data_ptr());
  if (tensor.dim() == 0) return {std::nullopt, {Operand::Layout::number, double(*data), nullptr}};
  const bool full = tensor.dim() == scores.dim() && tensor.numel() == scores.numel();
  return {tensor, {full ? Operand::Layout::full : Operand::Layout::column, 0.0, data}};
}

inline bool has_columns(const OperandTensor& operand) { return operand.operand.layout == Operand::Layout::column; }

inline Tensor wanted_like(bool wanted, const Tensor& scores) {
  return wanted ? empty_large(scores.sizes(), torch::headeronly::ScalarType::Float) : nothing();
}

constexpr int64_t kScoresPerTask = 1 << 14;

inline int64_t rows_per_task(int64_t columns) {
  return std::max<int64_t>(1, kScoresPerTask / std::max<int64_t>(1, columns));
}

}  // namespace lsc
