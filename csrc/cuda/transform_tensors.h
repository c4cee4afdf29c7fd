// Tensors of lsc_transform and aggregate_rewards as the plain data of their kernels.
#pragma once

#include "cuda/tensors.h"
#include "cuda/transform.h"

namespace lsc {
namespace cuda {

constexpr int kElementThreads = 256;
inline int64_t element_blocks(int64_t count) { return (count + kElementThreads - 1) / kElementThreads; }

// Scores and what is broadcast against them, held alive while a launch is prepared.
struct ScoreTensors {
  Tensor scores;
  std::optional<Tensor> reference, scale, floor, weights;
  DeviceScores kernel;

  ScoreTensors(
      const Tensor& given, const std::optional<Tensor>& references, double reference_number, const std::optional<Tensor>& scales,
      double scale_number, const std::optional<Tensor>& floors, double floor_number, const std::optional<Tensor>& all_weights,
      bool ignore_missing)
      : scores(dense(given)), reference(dense(references)), scale(dense(scales)), floor(dense(floors)), weights(dense(all_weights)) {
    const int64_t columns = scores.dim() == 0 ? 1 : scores.size(scores.dim() - 1);
    kernel = {scores.data_ptr(), dtype_of(scores), columns == 0 ? 0 : scores.numel() / columns, columns,
              operand(reference, reference_number), operand(scale, scale_number), operand(floor, floor_number),
              operand(weights, 1.0), ignore_missing};
  }

 private:
  // A number, or a tensor that is a scalar, [columns], or of the scores' shape.
  DeviceOperand operand(const std::optional<Tensor>& tensor, double number) const {
    if (!tensor) return {number, nullptr, 0, 0};
    const float* data = floats(*tensor);
    if (tensor->dim() == 0) return {0, data, 0, 0};
    const bool full = tensor->dim() == scores.dim() && tensor->numel() == scores.numel();
    return {0, data, full ? scores.size(scores.dim() - 1) : 0, 1};
  }
};

inline Tensor wanted_on(bool wanted, const Tensor& scores) {
  return wanted ? floats_on(scores, scores.sizes()) : nothing_on(scores);
}

}  // namespace cuda
}  // namespace lsc
