// aggregate_rewards on CUDA: a thread a row of K scores; backward without a formula, a thread a score. Reads a score and what
// is not broadcast against it, writes one u per row; backward reads one upstream gradient per row too and writes the
// gradients that are wanted. A formula is interpreted in double, with the values of its parts in the thread's own memory.
#include "cuda/formula_rows.h"
#include "cuda/transform_tensors.h"
#include "tensors/program.h"

namespace lsc {
namespace cuda {

struct AggregateForward {
  DeviceScores in;
  float* utility;
  Program program;
};

struct AggregateBackward {
  DeviceScores in;
  const float* grad;
  DeviceGradients out;
  Program program;
};

LSC_KERNEL(kElementThreads, 2) aggregate_forward(LSC_ARGUMENT AggregateForward a) {
  const int64_t row = block_index() * kElementThreads + thread_index();
  if (row >= a.in.rows) return;
  if (a.program.length == 0) {
    a.utility[row] = aggregate_row(a.in, row, [&](int64_t k) { return score_at(a.in, row, k); });
    return;
  }
  Judged<double> judged[kMaxProperties];
  Judgement<double> values[kMaxInstructions];
  judge_row(a.in, a.program, row, judged);
  a.utility[row] = float(evaluate(a.program, judged, values).good);
}

LSC_KERNEL(kElementThreads, 4) aggregate_backward(LSC_ARGUMENT AggregateBackward a) {
  const int64_t i = block_index() * kElementThreads + thread_index();
  if (i >= a.in.rows * a.in.columns) return;
  write_score_gradients(a.in, a.out, i / a.in.columns, i % a.in.columns, a.grad[i / a.in.columns]);
}

// 0 for the columns that the formula does not name, and for all of them where nobody asked.
LSC_KERNEL(kElementThreads, 2) aggregate_backward_formula(LSC_ARGUMENT AggregateBackward a) {
  const int64_t row = block_index() * kElementThreads + thread_index();
  if (row >= a.in.rows) return;
  const int64_t first = row * a.in.columns;
  for (int64_t at = first; at < first + a.in.columns; ++at) {
    store_one(a.in.dtype, a.out.scores, at, 0.0f);
    if (a.out.reference) a.out.reference[at] = 0;
    if (a.out.scale) a.out.scale[at] = 0;
    if (a.out.weights) a.out.weights[at] = 0;
  }
  const double upstream = a.grad[row];
  if (upstream == 0) return;
  Judged<double> judged[kMaxProperties];
  Judgement<double> values[kMaxInstructions];
  Slope<double> slopes[kMaxInstructions];
  judge_row(a.in, a.program, row, judged);
  evaluate(a.program, judged, values);
  differentiate(a.program, values, slopes);
  for (int i = 0, property = 0; i < a.program.length; ++i) {
    if (a.program.instructions[i].kind != Instruction::Kind::property) continue;
    const int64_t column = a.program.instructions[i].operand, at = first + column;
    const PropertyGradient<double> own = gradient(judged[property++], slopes[i]);
    const double to_score = upstream * own.z / a.in.scale.at(row, column);
    store_one(a.in.dtype, a.out.scores, at, float(to_score));
    if (a.out.reference) a.out.reference[at] = float(-to_score);
    if (a.out.scale) a.out.scale[at] = to_score == 0 ? 0.0f : float(-to_score * centred_at(a.in, row, column));
    if (a.out.weights) a.out.weights[at] = float(upstream * own.weight);
  }
}

static Tensor forward(
    Tensor scores, std::optional<Tensor> reference_reward, double reference_number, std::optional<Tensor> scale,
    double scale_number, std::optional<Tensor> floor, double floor_number, std::optional<Tensor> weights,
    bool ignore_missing, ProgramNumbers numbers) {
  const ScoreTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights, ignore_missing);
  const Tensor utility = floats_on(scores, Sizes(inputs.scores.sizes().data(), size_t(scores.dim() - 1)));
  const AggregateForward a{inputs.kernel, floats(utility), program_of(numbers, inputs.kernel.columns)};
  launch(&aggregate_forward, element_blocks(utility.numel()), kElementThreads, scores, a);
  return utility;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor scores, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    std::optional<Tensor> weights, bool ignore_missing, ProgramNumbers numbers, bool want_reference, bool want_scale,
    bool want_weights) {
  const ScoreTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights, ignore_missing);
  const Tensor upstream = dense(grad), to_scores = empty_on(scores, inputs.scores.sizes(), scores.scalar_type());
  const Tensor to_reference = wanted_on(want_reference, inputs.scores), to_scale = wanted_on(want_scale, inputs.scores);
  const Tensor to_weights = wanted_on(want_weights, inputs.scores);
  const AggregateBackward a{inputs.kernel, floats(upstream),
                            {to_scores.data_ptr(), want_reference ? floats(to_reference) : nullptr,
                             want_scale ? floats(to_scale) : nullptr, want_weights ? floats(to_weights) : nullptr},
                            program_of(numbers, inputs.kernel.columns)};
  const bool formula = a.program.length != 0;
  launch(formula ? &aggregate_backward_formula : &aggregate_backward,
         element_blocks(formula ? a.in.rows : a.in.rows * a.in.columns), kElementThreads, scores, a);
  return {to_scores, to_reference, to_scale, to_weights};
}

LSC_CUDA_OPS(m) {
  m.impl("aggregate_rewards_forward", TORCH_BOX(&forward));
  m.impl("aggregate_rewards_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
