// lsc_transform on CUDA: a thread a score. Reads the score and what is not broadcast against it, writes u; backward reads
// the upstream gradient too and writes the gradients that are wanted.
#include "cuda/transform_tensors.h"
#include "cuda/upstream.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

struct TransformForward {
  DeviceScores in;
  float* utility;
};

struct TransformBackward {
  DeviceScores in;
  Upstream grad;
  DeviceGradients out;
};

LSC_KERNEL(kElementThreads, 4) transform_forward(LSC_ARGUMENT TransformForward a) {
  const int64_t i = block_index() * kElementThreads + thread_index();
  if (i >= a.in.rows * a.in.columns) return;
  a.utility[i] = value_of(a.in, load_one(a.in.dtype, a.in.scores, i), i / a.in.columns, i % a.in.columns);
}

LSC_KERNEL(kElementThreads, 4) transform_backward(LSC_ARGUMENT TransformBackward a) {
  const int64_t i = block_index() * kElementThreads + thread_index();
  if (i >= a.in.rows * a.in.columns) return;
  write_score_gradients(a.in, a.out, i / a.in.columns, i % a.in.columns, upstream_at(a.grad, i));
}

static Tensor forward(
    Tensor reward, std::optional<Tensor> reference_reward, double reference_number, std::optional<Tensor> scale,
    double scale_number, std::optional<Tensor> floor, double floor_number) {
  const ScoreTensors inputs(reward, reference_reward, reference_number, scale, scale_number, floor, floor_number, std::nullopt, false);
  const Tensor utility = floats_on(reward, inputs.scores.sizes());
  launch(&transform_forward, element_blocks(utility.numel()), kElementThreads, reward, TransformForward{inputs.kernel, floats(utility)});
  return utility;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor reward, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    bool want_reference, bool want_scale) {
  const ScoreTensors inputs(reward, reference_reward, reference_number, scale, scale_number, floor, floor_number, std::nullopt, false);
  const UpstreamTensor upstream(grad);
  const Tensor to_reward = empty_on(reward, inputs.scores.sizes(), reward.scalar_type());
  const Tensor to_reference = wanted_on(want_reference, inputs.scores), to_scale = wanted_on(want_scale, inputs.scores);
  const DeviceGradients out{to_reward.data_ptr(), want_reference ? floats(to_reference) : nullptr,
                            want_scale ? floats(to_scale) : nullptr, nullptr};
  launch(&transform_backward, element_blocks(inputs.scores.numel()), kElementThreads, reward,
         TransformBackward{inputs.kernel, upstream.kernel, out});
  return {to_reward, to_reference, to_scale};
}

LSC_CUDA_OPS(m) {
  m.impl("lsc_transform_forward", TORCH_BOX(&forward));
  m.impl("lsc_transform_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
