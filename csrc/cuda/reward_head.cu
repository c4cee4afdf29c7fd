// reward_head on CUDA.
//
// Forward: a block an output row, scored as cuda/head_rows.h says; nothing else of hidden is read. Backward to hidden: a block
// a row of hidden, which writes zeros, or the scaled sum of the weights if the row was read. Backward to weight and bias: a
// thread a column of H goes through a part of the outputs, and where there are several parts a second kernel adds them. How
// many depends on the sizes alone, and no two threads add to one place: the order of the additions is always the same.
//
// On a GPU an index outside [0, S), or a segment that does not lie in hidden, scores NaN and has no gradient.
#include "cuda/head_tensors.h"

namespace lsc {
namespace cuda {

constexpr int kHeadThreads = 128;
constexpr int64_t kOutputsPerPart = 64;
constexpr int64_t kMostSums = 1 << 20;  // several times the threads of a large GPU, and 8 MB

struct HeadBackward {
  HiddenRows hidden;
  HeadPositions positions;
  int64_t outputs, properties, rows;
  const float *weight, *grad;
  const int64_t* found;  // [outputs] the row each output was read from, -1 for none
  int64_t* find;         // the same, to be written
  void* to_hidden;
  float *to_weight, *to_bias;
  int64_t parts;
  double* sums;  // [parts, cells], where there are several parts

  // The weights and biases of a property are neighbours: [K, H + 1].
  LSC_FN int64_t cells() const { return properties * (hidden.width + 1); }
};

static LSC_FN int64_t blocks_of(int64_t cells) { return (cells + kHeadThreads - 1) / kHeadThreads; }

LSC_KERNEL(kHeadThreads, 4) head_forward(LSC_ARGUMENT HeadForward a) {
  score_output(block_memory<HeadMemory<kHeadThreads>>(), a, block_index());
}

LSC_KERNEL(kHeadThreads, 4) head_find(LSC_ARGUMENT HeadBackward a) {
  const int64_t row = find_row<kHeadThreads>(block_memory<LastCountedMemory>(), a.positions, block_index());
  if (thread_index() == 0) a.find[block_index()] = row;
}

// The output that was read at a row, -1 if none was.
LSC_DEVICE int64_t output_at(const HeadBackward& a, int64_t row) {
  if (a.positions.every) return a.found[row] < 0 ? -1 : row;
  if (!a.positions.segments) return a.found[row / a.positions.length] == row ? row / a.positions.length : -1;
  int64_t low = 0, high = a.outputs;  // the segment that holds the row
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (integer_at(a.positions.segments, a.positions.segments_are_int32, middle + 1) <= row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < a.outputs && a.found[low] == row ? low : -1;
}

LSC_KERNEL(kHeadThreads, 4) head_to_hidden(LSC_ARGUMENT HeadBackward a) {
  const int64_t row = block_index(), output = output_at(a, row), width = a.hidden.width;
  for (int64_t h = thread_index(); h < width; h += kHeadThreads) {
    float gradient = 0;
    if (output >= 0) {
      for (int64_t k = 0; k < a.properties; ++k) gradient = fma(a.grad[output * a.properties + k], a.weight[k * width + h], gradient);
    }
    store_one(a.hidden.dtype, a.to_hidden, row * width + h, gradient);
  }
}

LSC_DEVICE void write_cell(const HeadBackward& a, int64_t cell, double sum) {
  const int64_t width = a.hidden.width, k = cell / (width + 1), h = cell % (width + 1);
  if (h < width) {
    if (a.to_weight) a.to_weight[k * width + h] = float(sum);
  } else if (a.to_bias) {
    a.to_bias[k] = float(sum);
  }
}

LSC_KERNEL(kHeadThreads, 4) head_to_weight(LSC_ARGUMENT HeadBackward a) {
  const int64_t width = a.hidden.width, cells = a.cells(), blocks = blocks_of(cells);
  const int64_t part = block_index() / blocks, cell = block_index() % blocks * kHeadThreads + thread_index();
  if (cell >= cells) return;
  const int64_t k = cell / (width + 1), h = cell % (width + 1);
  double sum = 0;
  for (int64_t output = a.outputs * part / a.parts; output < a.outputs * (part + 1) / a.parts; ++output) {
    const float upstream = a.grad[output * a.properties + k];
    // a row without upstream gradient counts for nothing, even if it holds NaN
    if (a.found[output] < 0 || upstream == 0) continue;
    sum += h == width ? double(upstream)
                      : double(upstream) * load_one(a.hidden.dtype, a.hidden.data, hidden_offset(a.hidden, a.found[output]) + h * a.hidden.column_stride);
  }
  if (a.parts > 1) {
    a.sums[part * cells + cell] = sum;
  } else {
    write_cell(a, cell, sum);
  }
}

LSC_KERNEL(kHeadThreads, 4) head_add_parts(LSC_ARGUMENT HeadBackward a) {
  const int64_t cells = a.cells(), cell = block_index() * kHeadThreads + thread_index();
  if (cell >= cells) return;
  double sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) sum += a.sums[part * cells + cell];
  write_cell(a, cell, sum);
}

static int64_t parts_of(int64_t outputs, int64_t cells) {
  const int64_t wanted = (outputs + kOutputsPerPart - 1) / kOutputsPerPart, most = cells ? kMostSums / cells : 1;
  return std::max<int64_t>(1, std::min(wanted, most));
}

static Tensor forward(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> attention_mask, std::optional<Tensor> index,
    std::optional<Tensor> cu_seqlens, bool every) {
  const PositionTensors positions(hidden, attention_mask, index, cu_seqlens, every);
  const Tensor rows = few_dimensions(hidden), weights = dense(weight);
  const auto biases = dense(bias);
  const int64_t properties = weight.size(0);
  std::vector<int64_t> sizes{positions.outputs, properties};
  if (every) {
    sizes.assign(hidden.sizes().begin(), hidden.sizes().end());
    sizes.back() = properties;
  }
  const Tensor scores = floats_on(hidden, Sizes(sizes.data(), sizes.size()));
  launch(&head_forward, properties ? positions.outputs : 0, kHeadThreads, hidden,
         HeadForward{hidden_rows(rows), positions.kernel, properties, typed(weights), typed(biases), floats(scores)});
  return scores;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor hidden, Tensor weight, std::optional<Tensor> attention_mask, std::optional<Tensor> index,
    std::optional<Tensor> cu_seqlens, bool every, bool want_hidden, bool want_weight, bool want_bias) {
  const PositionTensors positions(hidden, attention_mask, index, cu_seqlens, every);
  const Tensor upstream = dense(grad), rows = few_dimensions(hidden), weights = dense(weight);
  const int64_t properties = weight.size(0), width = weight.size(1), outputs = positions.outputs;
  const Tensor found = empty_on(hidden, Sizes(&outputs, 1), torch::headeronly::ScalarType::Long);
  const Tensor to_hidden = want_hidden ? empty_on(hidden, hidden.sizes(), hidden.scalar_type()) : nothing_on(hidden);
  const Tensor to_weight = want_weight ? floats_on(hidden, weight.sizes()) : nothing_on(hidden);
  const Tensor to_bias = want_bias ? floats_on(hidden, Sizes(&properties, 1)) : nothing_on(hidden);
  int64_t hidden_rows_count = 1;
  for (int64_t d = 0; d + 1 < hidden.dim(); ++d) hidden_rows_count *= hidden.size(d);
  HeadBackward a{hidden_rows(rows), positions.kernel, outputs, properties, hidden_rows_count, floats(weights), floats(upstream),
                 static_cast<const int64_t*>(found.data_ptr()), static_cast<int64_t*>(found.data_ptr()), to_hidden.data_ptr(),
                 want_weight ? floats(to_weight) : nullptr, want_bias ? floats(to_bias) : nullptr, 1, nullptr};
  launch(&head_find, outputs, kHeadThreads, hidden, a);
  if (want_hidden) launch(&head_to_hidden, hidden_rows_count, kHeadThreads, hidden, a);
  if (want_weight || want_bias) {
    a.parts = parts_of(outputs, a.cells());
    const int64_t count = a.parts > 1 ? a.parts * a.cells() : 0;
    const Tensor sums = empty_on(hidden, Sizes(&count, 1), torch::headeronly::ScalarType::Double);
    a.sums = static_cast<double*>(sums.data_ptr());
    launch(&head_to_weight, a.parts * blocks_of(a.cells()), kHeadThreads, hidden, a);
    if (a.parts > 1) launch(&head_add_parts, blocks_of(a.cells()), kHeadThreads, hidden, a);
  }
  return {to_hidden, to_weight, to_bias};
}

LSC_CUDA_OPS(m) {
  m.impl("reward_head_forward", TORCH_BOX(&forward));
  m.impl("reward_head_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
