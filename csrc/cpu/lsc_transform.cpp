// lsc_transform on the CPU. The operands come broadcast to one of three forms; their gradients leave at the scores' shape,
// in float32.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/lsc_transform.h"
#include "cpu/transform_operands.h"
#include "tensors/upstream.h"

namespace lsc {

namespace {

struct Inputs {
  Tensor reward;
  OperandTensor reference, scale, floor;
  TransformInputs kernel;
  int64_t rows;

  Inputs(const Tensor& given, const std::optional<Tensor>& reference_reward, double reference_number,
         const std::optional<Tensor>& scales, double scale_number, const std::optional<Tensor>& floors, double floor_number)
      : reward(dense(given)),
        reference(operand_of(reference_reward, reference_number, reward)),
        scale(operand_of(scales, scale_number, reward)),
        floor(operand_of(floors, floor_number, reward)) {
    const bool columns = has_columns(reference) || has_columns(scale) || has_columns(floor);
    kernel = {reward.data_ptr(), dtype_of(reward), columns ? reward.size(reward.dim() - 1) : 1,
              reference.operand, scale.operand, floor.operand};
    rows = reward.numel() == 0 ? 0 : reward.numel() / kernel.columns;
  }
};

}  // namespace

static Tensor forward(
    Tensor reward, std::optional<Tensor> reference_reward, double reference_number, std::optional<Tensor> scale,
    double scale_number, std::optional<Tensor> floor, double floor_number) {
  const Inputs inputs(reward, reference_reward, reference_number, scale, scale_number, floor, floor_number);
  const Tensor utility = empty_large(inputs.reward.sizes(), torch::headeronly::ScalarType::Float);
  float* out = floats(utility);
  auto* kernel = LSC_DISPATCH_ISA(lsc_transform_forward);
  torch::stable::parallel_for(0, inputs.rows, rows_per_task(inputs.kernel.columns), [&](int64_t begin, int64_t end) {
    kernel(inputs.kernel, out, begin, end);
  });
  return utility;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor reward, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    bool want_reference, bool want_scale) {
  const Inputs inputs(reward, reference_reward, reference_number, scale, scale_number, floor, floor_number);
  const UpstreamTensor upstream(grad);
  const Tensor to_reward = empty_large(inputs.reward.sizes(), reward.scalar_type());
  const Tensor to_reference = wanted_like(want_reference, inputs.reward);
  const Tensor to_scale = wanted_like(want_scale, inputs.reward);
  const TransformGradients out{to_reward.data_ptr(), want_reference ? floats(to_reference) : nullptr,
                               want_scale ? floats(to_scale) : nullptr, nullptr};
  auto* kernel = LSC_DISPATCH_ISA(lsc_transform_backward);
  torch::stable::parallel_for(0, inputs.rows, rows_per_task(inputs.kernel.columns), [&](int64_t begin, int64_t end) {
    kernel(inputs.kernel, upstream.kernel, out, begin, end);
  });
  return {to_reward, to_reference, to_scale};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("lsc_transform_forward(Tensor reward, Tensor? reference_reward, float reference_number, Tensor? scale,"
        " float scale_number, Tensor? floor, float floor_number) -> Tensor");
  m.def("lsc_transform_backward(Tensor grad, Tensor reward, Tensor? reference_reward, float reference_number,"
        " Tensor? scale, float scale_number, Tensor? floor, float floor_number, bool want_reference, bool want_scale)"
        " -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("lsc_transform_forward", TORCH_BOX(&forward));
  m.impl("lsc_transform_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
