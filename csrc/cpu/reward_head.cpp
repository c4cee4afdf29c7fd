// reward_head on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/head_tensors.h"

namespace lsc {

namespace {

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
