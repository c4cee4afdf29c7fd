// aggregate_rewards on CUDA: a thread a row of K scores; backward without a formula, a thread a score. Reads a score and what
// is not broadcast against it, writes one u per row; backward reads one upstream gradient per row too and writes the
// gradients that are wanted.
//
// A formula is interpreted in double, a thread a row, with the values of its parts in the block's memory, which holds as many
// rows as the formula's length allows: from all 128 for a few properties to 5 for the longest formula. In the threads' own
// memory every thread of the device would have to have room for the longest, 2.6 GB on an H200.
#include "cuda/formula_rows.h"
#include "cuda/transform_tensors.h"
#include "cuda/upstream.h"
#include "tensors/program.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

constexpr int kFormulaThreads = 128;

struct FormulaMemory {
  unsigned char bytes[48 << 10];
};

// A row's part of the block's memory.
struct FormulaRow {
  Judged<Log>* judged;
  Judgement<Log>* values;
  Slope<Log>* slopes;
  Visited<Log>* visited;
};

// How the block's memory is shared out to rows.
struct FormulaRoom {
  int properties = 0, length = 0, bytes = 0, rows = 0;

  FormulaRoom(const Program& program, bool slopes) : length(program.length) {
    for (int i = 0; i < length; ++i) properties += program.instructions[i].kind == Instruction::Kind::property;
    bytes = properties * int(sizeof(Judged<Log>)) + length * int(sizeof(Judgement<Log>));
    if (slopes) bytes += length * int(sizeof(Slope<Log>)) + properties * int(sizeof(Visited<Log>));
    if (length) rows = std::min(kFormulaThreads, int(sizeof(FormulaMemory)) / bytes);
  }

  int64_t blocks(int64_t row_count) const { return (row_count + rows - 1) / rows; }

  LSC_DEVICE FormulaRow row(FormulaMemory& memory) const {
    unsigned char* at = memory.bytes + int(thread_index()) * bytes;
    auto* judged = reinterpret_cast<Judged<Log>*>(at);
    auto* values = reinterpret_cast<Judgement<Log>*>(judged + properties);
    auto* slopes = reinterpret_cast<Slope<Log>*>(values + length);
    return {judged, values, slopes, reinterpret_cast<Visited<Log>*>(slopes + length)};
  }
};

struct AggregateForward {
  DeviceScores in;
  float* utility;
  Program program;
  FormulaRoom room;
};

struct AggregateBackward {
  DeviceScores in;
  Upstream grad;
  DeviceGradients out;
  Program program;
  FormulaRoom room;
};

LSC_KERNEL(kElementThreads, 2) aggregate_forward(LSC_ARGUMENT AggregateForward a) {
  const int64_t row = block_index() * kElementThreads + thread_index();
  if (row >= a.in.rows) return;
  a.utility[row] = aggregate_row(a.in, row, [&](int64_t k) { return score_at(a.in, row, k); });
}

// -1 for a thread without a row.
LSC_DEVICE int64_t formula_row(const FormulaRoom& room, int64_t rows) {
  const int64_t row = block_index() * room.rows + thread_index();
  return int(thread_index()) < room.rows && row < rows ? row : -1;
}

LSC_KERNEL(kFormulaThreads, 2) aggregate_forward_formula(LSC_ARGUMENT AggregateForward a) {
  FormulaMemory& memory = block_memory<FormulaMemory>();
  const int64_t row = formula_row(a.room, a.in.rows);
  if (row < 0) return;
  const FormulaRow own = a.room.row(memory);
  judge_row(a.in, a.program, row, own.judged);
  a.utility[row] = float(evaluate(a.program, own.judged, own.values).good.log);
}

LSC_KERNEL(kElementThreads, 4) aggregate_backward(LSC_ARGUMENT AggregateBackward a) {
  const int64_t i = block_index() * kElementThreads + thread_index();
  if (i >= a.in.rows * a.in.columns) return;
  write_score_gradients(a.in, a.out, i / a.in.columns, i % a.in.columns, upstream_at(a.grad, i / a.in.columns));
}

// 0 for the columns that the formula does not name, and for all of them where nobody asked.
LSC_KERNEL(kFormulaThreads, 2) aggregate_backward_formula(LSC_ARGUMENT AggregateBackward a) {
  FormulaMemory& memory = block_memory<FormulaMemory>();
  const int64_t row = formula_row(a.room, a.in.rows);
  if (row < 0) return;
  const int64_t first = row * a.in.columns;
  for (int64_t at = first; at < first + a.in.columns; ++at) {
    store_one(a.in.dtype, a.out.scores, at, 0.0f);
    if (a.out.reference) a.out.reference[at] = 0;
    if (a.out.scale) a.out.scale[at] = 0;
    if (a.out.weights) a.out.weights[at] = 0;
  }
  const double upstream = upstream_at(a.grad, row);
  if (upstream == 0) return;
  const FormulaRow own = a.room.row(memory);
  judge_row(a.in, a.program, row, own.judged);
  evaluate(a.program, own.judged, own.values);
  differentiate(a.program, own.values, own.slopes, own.visited);
  for (int i = 0, property = 0; i < a.program.length; ++i) {
    if (a.program.instructions[i].kind != Instruction::Kind::property) continue;
    const int64_t column = a.program.instructions[i].operand, at = first + column;
    const PropertyGradient of_property = gradient(own.judged[property++], own.slopes[i]);
    const double to_score = upstream * of_property.z / a.in.scale.at(row, column);
    store_one(a.in.dtype, a.out.scores, at, float(to_score));
    if (a.out.reference) a.out.reference[at] = float(-to_score);
    if (a.out.scale) a.out.scale[at] = to_score == 0 ? 0.0f : float(-to_score * centred_at(a.in, row, column));
    if (a.out.weights) a.out.weights[at] = float(upstream * of_property.weight);
  }
}

static Tensor forward(
    Tensor scores, std::optional<Tensor> reference_reward, double reference_number, std::optional<Tensor> scale,
    double scale_number, std::optional<Tensor> floor, double floor_number, std::optional<Tensor> weights,
    bool ignore_missing, ProgramNumbers numbers) {
  const ScoreTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights, ignore_missing);
  const Tensor utility = floats_on(scores, Sizes(inputs.scores.sizes().data(), size_t(scores.dim() - 1)));
  const Program program = program_of(numbers, inputs.kernel.columns);
  const AggregateForward a{inputs.kernel, floats(utility), program, FormulaRoom(program, false)};
  if (program.length) {
    launch(&aggregate_forward_formula, a.room.blocks(a.in.rows), kFormulaThreads, scores, a);
  } else {
    launch(&aggregate_forward, element_blocks(a.in.rows), kElementThreads, scores, a);
  }
  return utility;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor scores, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    std::optional<Tensor> weights, bool ignore_missing, ProgramNumbers numbers, bool want_reference, bool want_scale,
    bool want_weights) {
  const ScoreTensors inputs(scores, reference_reward, reference_number, scale, scale_number, floor, floor_number, weights, ignore_missing);
  const UpstreamTensor upstream(grad);
  const Tensor to_scores = empty_on(scores, inputs.scores.sizes(), scores.scalar_type());
  const Tensor to_reference = wanted_on(want_reference, inputs.scores), to_scale = wanted_on(want_scale, inputs.scores);
  const Tensor to_weights = wanted_on(want_weights, inputs.scores);
  const Program program = program_of(numbers, inputs.kernel.columns);
  const AggregateBackward a{inputs.kernel, upstream.kernel,
                            {to_scores.data_ptr(), want_reference ? floats(to_reference) : nullptr,
                             want_scale ? floats(to_scale) : nullptr, want_weights ? floats(to_weights) : nullptr},
                            program, FormulaRoom(program, true)};
  if (program.length) {
    launch(&aggregate_backward_formula, a.room.blocks(a.in.rows), kFormulaThreads, scores, a);
  } else {
    launch(&aggregate_backward, element_blocks(a.in.rows * a.in.columns), kElementThreads, scores, a);
  }
  return {to_scores, to_reference, to_scale, to_weights};
}

LSC_CUDA_OPS(m) {
  m.impl("aggregate_rewards_forward", TORCH_BOX(&forward));
  m.impl("aggregate_rewards_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
