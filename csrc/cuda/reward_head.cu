// reward_head on CUDA.
//
// Forward: a block an output row. Its threads share out the row's columns, four to eight of them at a time for K weights, and
// the sums over the block are taken in double; nothing else of hidden is read. Where the position of the row is the last
// counted one, the block finds it in the mask itself. Backward to hidden: a block a row of hidden, which writes zeros, or the
// scaled sum of the weights if the row was read. Backward to weight and bias: a thread a column of H goes through all
// outputs, so that no two threads add to one place and the order of the additions is always the same.
//
// On a GPU an index outside [0, S), or a segment that does not lie in hidden, scores NaN and has no gradient.
#include "cpu/head_tensors.h"
#include "cuda/tensors.h"
#include "cuda/transform.h"
#include "cuda/mask.h"

namespace lsc {
namespace cuda {

constexpr int kHeadThreads = 128;

// Which row of hidden each output is scored at.
struct HeadPositions {
  bool every;
  MaskRows mask;            // of `every`: [1, R]; else [B, S]
  const void* index;        // [B], or null
  const void* segments;     // cu_seqlens [B+1], or null
  bool index_is_int32, segments_are_int32;
  int64_t length, tokens;   // S; the rows of packed hidden
};

struct HeadForward {
  HiddenRows hidden;
  HeadPositions positions;
  int64_t outputs, properties;
  const float *weight, *bias;  // [K, H], [K] or null
  float* scores;
};

struct HeadBackward {
  HiddenRows hidden;
  HeadPositions positions;
  int64_t outputs, properties, rows;
  const float *weight, *grad;
  const int64_t* found;  // [outputs] the row each output was read from, -1 for none
  int64_t* find;         // the same, to be written
  void* to_hidden;
  float *to_weight, *to_bias;
};

struct HeadMemory {
  LastCountedMemory last;
  double sums[kHeadThreads / kWarp];
};

LSC_DEVICE int64_t integer_at(const void* data, bool is_int32, int64_t i) {
  return is_int32 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
}

// Block: the row of hidden that an output is scored at, -1 for none.
LSC_DEVICE int64_t find_row(LastCountedMemory& memory, const HeadPositions& p, int64_t output) {
  if (p.every) return is_counted(p.mask, 0, output) ? output : -1;
  if (p.segments) {
    const int64_t first = integer_at(p.segments, p.segments_are_int32, output), end = integer_at(p.segments, p.segments_are_int32, output + 1);
    return first < 0 || first >= end || end > p.tokens ? -1 : end - 1;
  }
  if (p.index) {
    const int64_t place = integer_at(p.index, p.index_is_int32, output);
    return place < 0 || place >= p.length ? -1 : output * p.length + place;
  }
  const int64_t last = last_counted<kHeadThreads>(memory, p.mask, output, p.length);
  return last < 0 ? -1 : output * p.length + last;
}

LSC_DEVICE int64_t hidden_offset(const HiddenRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.leading - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

// Block: the sum over its threads, which all of them get.
LSC_DEVICE double block_sum(double (&memory)[kHeadThreads / kWarp], double value) {
  for (int mask = kWarp / 2; mask; mask /= 2) value += shuffle_xor(value, mask);
  sync_block();
  if (lane_index() == 0) memory[warp_index()] = value;
  sync_block();
  double sum = 0;
  for (double each : memory) sum += each;
  return sum;
}

LSC_KERNEL(kHeadThreads, 4) head_forward(LSC_ARGUMENT HeadForward a) {
  HeadMemory& memory = block_memory<HeadMemory>();
  const int64_t output = block_index(), row = find_row(memory.last, a.positions, output), width = a.hidden.width;
  float* scores = a.scores + output * a.properties;
  if (row < 0) {
    for (int64_t k = thread_index(); k < a.properties; k += kHeadThreads) scores[k] = a.positions.every ? 0.0f : NAN;
    return;
  }
  const int64_t offset = hidden_offset(a.hidden, row);
  for (int64_t k = 0; k < a.properties; ++k) {
    double sum = 0;
    for (int64_t h = thread_index(); h < width; h += kHeadThreads) {
      sum += double(load_one(a.hidden.dtype, a.hidden.data, offset + h * a.hidden.column_stride)) * a.weight[k * width + h];
    }
    sum = block_sum(memory.sums, sum);
    if (thread_index() == 0) scores[k] = float(sum + (a.bias ? a.bias[k] : 0.0f));
  }
}

LSC_KERNEL(kHeadThreads, 4) head_find(LSC_ARGUMENT HeadBackward a) {
  HeadMemory& memory = block_memory<HeadMemory>();
  const int64_t row = find_row(memory.last, a.positions, block_index());
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

// Column `width` stands for the bias.
LSC_KERNEL(kHeadThreads, 4) head_to_weight(LSC_ARGUMENT HeadBackward a) {
  const int64_t width = a.hidden.width, columns = width + 1, i = block_index() * kHeadThreads + thread_index();
  if (i >= columns * a.properties) return;
  const int64_t k = i / columns, h = i % columns;
  double sum = 0;
  for (int64_t output = 0; output < a.outputs; ++output) {
    const float upstream = a.grad[output * a.properties + k];
    // a row without upstream gradient counts for nothing, even if it holds NaN
    if (a.found[output] < 0 || upstream == 0) continue;
    sum += h == width ? double(upstream)
                      : double(upstream) * load_one(a.hidden.dtype, a.hidden.data, hidden_offset(a.hidden, a.found[output]) + h * a.hidden.column_stride);
  }
  if (h < width) {
    if (a.to_weight) a.to_weight[k * width + h] = float(sum);
  } else if (a.to_bias) {
    a.to_bias[k] = float(sum);
  }
}

namespace {

// What says which rows are read, held alive while a launch is prepared.
struct PositionTensors {
  std::optional<Tensor> mask, index, segments;
  HeadPositions kernel;
  int64_t outputs;

  PositionTensors(const Tensor& hidden, const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& indices,
                  const std::optional<Tensor>& cu_seqlens, bool every)
      : mask(every ? dense(attention_mask) : attention_mask), index(dense(indices)), segments(dense(cu_seqlens)) {
    const auto is_int32 = [](const std::optional<Tensor>& t) { return t && t->scalar_type() == torch::headeronly::ScalarType::Int; };
    const int64_t width = hidden.size(hidden.dim() - 1);
    kernel.every = every;
    if (every) {
      outputs = 1;
      for (int64_t d = 0; d + 1 < hidden.dim(); ++d) outputs *= hidden.size(d);
      kernel.mask = mask ? MaskRows{mask->data_ptr(), mask_type(mask->scalar_type(), mask->element_size()), 0, 1} : mask_rows(std::nullopt);
    } else {
      outputs = segments ? segments->size(0) - 1 : hidden.size(0);
      kernel.mask = mask_rows(segments ? std::nullopt : mask);
    }
    kernel.index = data_or_null<void>(index), kernel.index_is_int32 = is_int32(index);
    kernel.segments = every ? nullptr : data_or_null<void>(segments), kernel.segments_are_int32 = is_int32(segments);
    kernel.length = hidden.dim() > 1 && !kernel.segments ? hidden.size(hidden.dim() - 2) : 0;
    kernel.tokens = width ? hidden.numel() / width : hidden.size(0);
  }
};

}  // namespace

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
         HeadForward{hidden_rows(rows), positions.kernel, positions.outputs, properties, floats(weights), data_or_null<float>(biases), floats(scores)});
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
                 want_weight ? floats(to_weight) : nullptr, want_bias ? floats(to_bias) : nullptr};
  launch(&head_find, outputs, kHeadThreads, hidden, a);
  if (want_hidden) launch(&head_to_hidden, hidden_rows_count, kHeadThreads, hidden, a);
  if (want_weight || want_bias) launch(&head_to_weight, ((width + 1) * properties + kHeadThreads - 1) / kHeadThreads, kHeadThreads, hidden, a);
  return {to_hidden, to_weight, to_bias};
}

LSC_CUDA_OPS(m) {
  m.impl("reward_head_forward", TORCH_BOX(&forward));
  m.impl("reward_head_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
