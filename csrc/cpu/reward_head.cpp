// reward_head on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/kernels/reward_head.h"
#include "cpu/mask_tensor.h"

namespace lsc {

namespace {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 1 << 15;

int64_t outputs_per_task(const HeadInputs& inputs) {
  return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, inputs.hidden.width * inputs.properties));
}

HiddenRows hidden_rows(const Tensor& hidden) {
  HiddenRows rows{};
  rows.data = hidden.data_ptr();
  rows.dtype = dtype_of(hidden);
  rows.leading = int(hidden.dim() - 1);
  rows.width = hidden.size(rows.leading);
  rows.column_stride = hidden.stride(rows.leading);
  for (int d = 0; d < rows.leading; ++d) rows.sizes[d] = hidden.size(d), rows.strides[d] = hidden.stride(d);
  return rows;
}

int64_t integer_at(const Tensor& tensor, int64_t i) {
  const int64_t at = i * tensor.stride(0);
  return tensor.scalar_type() == torch::headeronly::ScalarType::Int ? static_cast<const int32_t*>(tensor.data_ptr())[at]
                                                                    : static_cast<const int64_t*>(tensor.data_ptr())[at];
}

// positions[b] is the row of hidden, as packed, that segment b ends in; -1 for an empty one.
void segment_ends(const Tensor& cu_seqlens, int64_t tokens, int64_t* positions) {
  const int64_t segments = cu_seqlens.size(0) - 1;
  bool rises = integer_at(cu_seqlens, 0) == 0 && integer_at(cu_seqlens, segments) == tokens;
  for (int64_t b = 0; b < segments && rises; ++b) {
    const int64_t start = integer_at(cu_seqlens, b), end = integer_at(cu_seqlens, b + 1);
    rises = start <= end;
    positions[b] = start < end ? end - 1 : -1;
  }
  if (rises) return;
  std::string given;
  for (int64_t b = 0; b <= segments; ++b) given += (b ? ", " : "") + std::to_string(integer_at(cu_seqlens, b));
  throw std::invalid_argument("cu_seqlens must rise from 0 to N = " + std::to_string(tokens) + ", the rows of hidden; got [" +
                              given + "]");
}

void indexed(const Tensor& index, int64_t length, int64_t* positions) {
  for (int64_t b = 0; b < index.size(0); ++b) {
    const int64_t place = integer_at(index, b);
    if (place < 0 || place >= length) {
      throw std::out_of_range("index must be in [0, S) with S = " + std::to_string(length) + "; got " + std::to_string(place));
    }
    positions[b] = b * length + place;
  }
}

Tensor new_positions(int64_t count) { return empty(Sizes(&count, 1), torch::headeronly::ScalarType::Long); }

int64_t* places(const Tensor& positions) { return static_cast<int64_t*>(positions.data_ptr()); }

// [R] which row each output is scored at, as HeadInputs wants it; empty where that is every row.
Tensor find_positions(const Tensor& hidden, const std::optional<Tensor>& attention_mask, const std::optional<Tensor>& index,
                      const std::optional<Tensor>& cu_seqlens, bool every) {
  if (every) {
    if (!attention_mask) return new_positions(0);
    const Tensor mask = dense(*attention_mask);
    const MaskRows rows{mask.data_ptr(), mask_type(mask.scalar_type(), mask.element_size()), 0, 1};
    const Tensor positions = new_positions(mask.numel());
    auto* counted = LSC_DISPATCH_ISA(head_counted);
    torch::stable::parallel_for(0, mask.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
      counted(rows, places(positions), begin, end);
    });
    return positions;
  }
  if (cu_seqlens) {
    const Tensor positions = new_positions(cu_seqlens->size(0) - 1);
    segment_ends(*cu_seqlens, hidden.size(0), places(positions));
    return positions;
  }
  const int64_t length = hidden.size(1);
  const Tensor positions = new_positions(hidden.size(0));
  if (index) {
    indexed(*index, length, places(positions));
    return positions;
  }
  const MaskRows mask = mask_rows(attention_mask);
  auto* last_counted = LSC_DISPATCH_ISA(head_last_counted);
  const int64_t per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, hidden.size(0), per_task, [&](int64_t begin, int64_t end) {
    last_counted(mask, length, places(positions), begin, end);
  });
  return positions;
}

// [..., K] for `every`, else [B, K].
Tensor new_scores(const Tensor& hidden, int64_t properties, const Tensor& positions, bool every) {
  std::vector<int64_t> sizes;
  if (every) {
    sizes.assign(hidden.sizes().begin(), hidden.sizes().end());
    sizes.back() = properties;
  } else {
    sizes = {positions.size(0), properties};
  }
  return empty(Sizes(sizes.data(), sizes.size()), torch::headeronly::ScalarType::Float);
}

HeadInputs inputs_of(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& positions,
                     bool every) {
  const bool all_rows = every && positions.numel() == 0;
  return {hidden_rows(hidden), all_rows ? nullptr : places(positions), every ? 0.0 : NAN,
          weight.size(0),      floats(weight),                        data_or_null<float>(bias)};
}

Tensor gradient_of_hidden(const HeadInputs& inputs, const Tensor& hidden, const float* grad, int64_t outputs) {
  const Tensor to_hidden = empty_large(hidden.sizes(), hidden.scalar_type());
  char* bytes = static_cast<char*>(to_hidden.data_ptr());
  if (inputs.positions) {
    torch::stable::parallel_for(0, hidden.numel() * hidden.element_size(), 1 << 20, [&](int64_t begin, int64_t end) {
      std::memset(bytes + begin, 0, end - begin);
    });
  }
  auto* rows = LSC_DISPATCH_ISA(head_to_hidden);
  torch::stable::parallel_for(0, outputs, outputs_per_task(inputs), [&](int64_t begin, int64_t end) {
    rows(inputs, grad, bytes, begin, end);
  });
  return to_hidden;
}

Tensor gradient_of_weight(const HeadInputs& inputs, const Tensor& weight, const float* grad, int64_t outputs) {
  const Tensor to_weight = empty(weight.sizes(), torch::headeronly::ScalarType::Float);
  auto* columns = LSC_DISPATCH_ISA(head_to_weight);
  const int64_t per_task = std::max<int64_t>(64, kElementsPerTask / std::max<int64_t>(1, outputs));
  torch::stable::parallel_for(0, inputs.hidden.width, per_task, [&](int64_t begin, int64_t end) {
    columns(inputs, grad, outputs, floats(to_weight), begin, end);
  });
  return to_weight;
}

Tensor gradient_of_bias(const HeadInputs& inputs, const float* grad, int64_t outputs) {
  std::vector<double> sums(inputs.properties);
  for (int64_t output = 0; output < outputs; ++output) {
    if (inputs.positions && inputs.positions[output] < 0) continue;
    for (int64_t k = 0; k < inputs.properties; ++k) sums[k] += grad[output * inputs.properties + k];
  }
  const Tensor to_bias = empty(Sizes(&inputs.properties, 1), torch::headeronly::ScalarType::Float);
  std::copy(sums.begin(), sums.end(), floats(to_bias));
  return to_bias;
}

// The kernels know leading dimensions up to a number; what has more is copied.
Tensor few_dimensions(const Tensor& hidden) {
  if (hidden.dim() - 1 <= kMaxHiddenLeading) return hidden;
  const Tensor contiguous = dense(hidden);
  const int64_t width = hidden.size(hidden.dim() - 1);
  return torch::stable::view(contiguous, {width ? hidden.numel() / width : 0, width});
}

}  // namespace

static Tensor forward(
    Tensor hidden, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> attention_mask, std::optional<Tensor> index,
    std::optional<Tensor> cu_seqlens, bool every) {
  const Tensor positions = find_positions(hidden, attention_mask, index, cu_seqlens, every);
  const Tensor rows = few_dimensions(hidden), weights = dense(weight);
  const auto biases = dense(bias);
  const HeadInputs inputs = inputs_of(rows, weights, biases, positions, every);
  const Tensor scores = new_scores(hidden, inputs.properties, positions, every);
  const int64_t outputs = inputs.properties ? scores.numel() / inputs.properties : 0;
  auto* kernel = LSC_DISPATCH_ISA(head_scores);
  torch::stable::parallel_for(0, outputs, outputs_per_task(inputs), [&](int64_t begin, int64_t end) {
    kernel(inputs, floats(scores), begin, end);
  });
  return scores;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor hidden, Tensor weight, std::optional<Tensor> attention_mask, std::optional<Tensor> index,
    std::optional<Tensor> cu_seqlens, bool every, bool want_hidden, bool want_weight, bool want_bias) {
  const Tensor positions = find_positions(hidden, attention_mask, index, cu_seqlens, every);
  const Tensor upstream = dense(grad), rows = few_dimensions(hidden), weights = dense(weight);
  const HeadInputs inputs = inputs_of(rows, weights, std::nullopt, positions, every);
  const int64_t outputs = inputs.properties ? upstream.numel() / inputs.properties : 0;
  return {want_hidden ? gradient_of_hidden(inputs, hidden, floats(upstream), outputs) : nothing(),
          want_weight ? gradient_of_weight(inputs, weights, floats(upstream), outputs) : nothing(),
          want_bias ? gradient_of_bias(inputs, floats(upstream), outputs) : nothing()};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("reward_head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? index,"
        " Tensor? cu_seqlens, bool every) -> Tensor");
  m.def("reward_head_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? attention_mask, Tensor? index,"
        " Tensor? cu_seqlens, bool every, bool want_hidden, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("reward_head_forward", TORCH_BOX(&forward));
  m.impl("reward_head_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
