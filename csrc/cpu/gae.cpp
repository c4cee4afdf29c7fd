// gae and, without values, discounted_returns on the CPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/kernels/gae.h"
#include "cpu/segments.h"
#include "cpu/tensors.h"
#include "tensors/mask.h"
#include "tensors/upstream.h"

namespace lsc {

namespace {

constexpr int64_t kTokensPerTask = 1 << 15;

// The sequences of a [B, T] tensor, or packed in an [N] one.
struct Sequences {
  std::vector<int64_t> bounds;
  SequenceRows kernel;
  int64_t count, tokens;

  Sequences(const Tensor& tensor, const std::optional<Tensor>& mask, const std::optional<Tensor>& cu_seqlens) : tokens(tensor.numel()) {
    if (!cu_seqlens) {
      count = tensor.size(0);
      kernel = {nullptr, tensor.size(1), mask_rows(mask)};
      return;
    }
    bounds = segment_bounds(*cu_seqlens, tokens, "the tokens of rewards");
    count = int64_t(bounds.size()) - 1;
    kernel = {bounds.data(), 0, packed_mask(mask)};
  }

  template <typename Range>
  void for_each(const Range& range) const {
    const int64_t per_task = std::max<int64_t>(1, kTokensPerTask * count / std::max<int64_t>(1, tokens));
    torch::stable::parallel_for(0, count, per_task, range);
  }
};

}  // namespace

static std::tuple<Tensor, Tensor> forward(
    Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask, std::optional<Tensor> bootstrap,
    std::optional<Tensor> cu_seqlens, double gamma, double lam, int64_t holes) {
  const Sequences sequences(rewards, mask, cu_seqlens);
  const Tensor reward = dense(rewards);
  const std::optional<Tensor> value = dense(values), beyond = dense(bootstrap);
  const GaeInputs in{typed(reward), typed(value), typed(beyond)};
  const Tensor returns = empty_large(reward.sizes(), torch::headeronly::ScalarType::Float);
  const Tensor advantages = value ? empty_large(reward.sizes(), torch::headeronly::ScalarType::Float) : nothing();
  auto* kernel = LSC_DISPATCH_ISA(gae_forward);
  sequences.for_each([&](int64_t begin, int64_t end) {
    kernel(sequences.kernel, {gamma, lam, Holes(holes)}, in, floats(advantages), floats(returns), begin, end);
  });
  return {advantages, returns};
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> to_advantages, std::optional<Tensor> to_returns, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> bootstrap, double gamma, double lam, int64_t holes, bool want_values) {
  const auto advantages = upstream_of(to_advantages), returns = upstream_of(to_returns);
  const Tensor& given = to_advantages ? *to_advantages : *to_returns;
  const Sequences sequences(given, mask, cu_seqlens);
  const Tensor to_rewards = empty_large(given.sizes(), torch::headeronly::ScalarType::Float);
  const Tensor to_values = want_values ? empty_large(given.sizes(), torch::headeronly::ScalarType::Float) : nothing();
  const Tensor to_bootstrap = bootstrap ? empty(bootstrap->sizes(), torch::headeronly::ScalarType::Float) : nothing();
  const GaeUpstream upstream{upstream_or_none(advantages), upstream_or_none(returns)};
  const GaeGradients out{floats(to_rewards), want_values ? floats(to_values) : nullptr, bootstrap ? floats(to_bootstrap) : nullptr};
  auto* kernel = LSC_DISPATCH_ISA(gae_backward);
  sequences.for_each([&](int64_t begin, int64_t end) {
    kernel(sequences.kernel, {gamma, lam, Holes(holes)}, upstream, out, begin, end);
  });
  return {to_rewards, to_values, to_bootstrap};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("gae_forward(Tensor rewards, Tensor? values, Tensor? mask, Tensor? bootstrap, Tensor? cu_seqlens, float gamma, float lam,"
        " int holes) -> (Tensor, Tensor)");
  m.def("gae_backward(Tensor? to_advantages, Tensor? to_returns, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap, float gamma,"
        " float lam, int holes, bool want_values) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("gae_forward", TORCH_BOX(&forward));
  m.impl("gae_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
