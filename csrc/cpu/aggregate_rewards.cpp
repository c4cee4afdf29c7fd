// aggregate_rewards on the CPU. The operands come broadcast to one of three forms; their gradients leave at the scores'
// shape, in float32.
#include <torch/csrc/stable/library.h>

#include "cpu/aggregate_tensors.h"
#include "tensors/upstream.h"

namespace lsc {

namespace {

Sizes without_last(const Tensor& tensor) { return {tensor.sizes().data(), size_t(tensor.dim() - 1)}; }

}  // namespace

static Tensor forward(
    Tensor scores, std::optional<Tensor> reference_reward, double reference_number, std::optional<Tensor> scale,
    double scale_number, std::optional<Tensor> floor, double floor_number, std::optional<Tensor> weights,
    bool ignore_missing, ProgramNumbers program) {
  const AggregateTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights,
                                ignore_missing, program);
  const Tensor utility = empty_large(without_last(inputs.scores), torch::headeronly::ScalarType::Float);
  float* out = floats(utility);
  auto* kernel = LSC_DISPATCH_ISA(aggregate_forward);
  torch::stable::parallel_for(0, inputs.rows, rows_per_task(inputs.kernel.columns), [&](int64_t begin, int64_t end) {
    kernel(inputs.kernel, inputs.how, out, begin, end);
  });
  return utility;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor scores, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    std::optional<Tensor> weights, bool ignore_missing, ProgramNumbers program, bool want_reference, bool want_scale,
    bool want_weights) {
  const AggregateTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights,
                                ignore_missing, program);
  const UpstreamTensor upstream(grad);
  const Tensor to_scores = empty_large(inputs.scores.sizes(), scores.scalar_type());
  const Tensor to_reference = wanted_like(want_reference, inputs.scores);
  const Tensor to_scale = wanted_like(want_scale, inputs.scores);
  const Tensor to_weights = wanted_like(want_weights, inputs.scores);
  const TransformGradients out{to_scores.data_ptr(), want_reference ? floats(to_reference) : nullptr,
                               want_scale ? floats(to_scale) : nullptr, want_weights ? floats(to_weights) : nullptr};
  auto* kernel = LSC_DISPATCH_ISA(aggregate_backward);
  torch::stable::parallel_for(0, inputs.rows, rows_per_task(inputs.kernel.columns), [&](int64_t begin, int64_t end) {
    kernel(inputs.kernel, inputs.how, upstream.kernel, out, begin, end);
  });
  return {to_scores, to_reference, to_scale, to_weights};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("aggregate_rewards_forward(Tensor scores, Tensor? reference_reward, float reference_number, Tensor? scale,"
        " float scale_number, Tensor? floor, float floor_number, Tensor? weights, bool ignore_missing, int[]? program)"
        " -> Tensor");
  m.def("aggregate_rewards_backward(Tensor grad, Tensor scores, Tensor? reference_reward, float reference_number,"
        " Tensor? scale, float scale_number, Tensor? floor, float floor_number, Tensor? weights, bool ignore_missing,"
        " int[]? program, bool want_reference, bool want_scale, bool want_weights) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("aggregate_rewards_forward", TORCH_BOX(&forward));
  m.impl("aggregate_rewards_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
