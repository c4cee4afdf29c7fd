// masked_whiten on the CPU: the moments of all elements, and what is made with them. Between the two, moments of several
// processes may be merged.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "cpu/kernels/masked_whiten.h"
#include "math/whitening.h"
#include "cpu/tensors.h"
#include "tensors/mask.h"
#include "tensors/upstream.h"

namespace lsc {

namespace {

constexpr int64_t kPerTask = 1 << 14;

struct Elements {
  Tensor x;
  std::optional<Tensor> mask;
  WhitenInputs kernel;

  Elements(const Tensor& given, const std::optional<Tensor>& given_mask) : x(dense(given)), mask(dense(given_mask)) {
    kernel.x = typed(x);
    kernel.mask = flat_mask(mask);
  }

  // Blocks that do not depend on the number of threads; their results come in order.
  template <typename Result, typename Block>
  std::vector<Result> blocks(int64_t size, const Block& block) const {
    const int64_t count = x.numel();
    std::vector<Result> results((count + size - 1) / size);
    torch::stable::parallel_for(0, int64_t(results.size()), kPerTask / size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) results[i] = block(i * size, std::min(count, (i + 1) * size));
    });
    return results;
  }
};

Moments merged(const std::vector<Moments>& parts) {
  Moments all{0, 0, 0};
  double sum = 0;
  for (const Moments& part : parts) all.count += part.count, sum += part.count * part.mean;
  if (all.count == 0) return all;
  all.mean = sum / all.count;
  for (const Moments& part : parts) all.m2 += part.m2 + part.count * (part.mean - all.mean) * (part.mean - all.mean);
  return all;
}

Moments moments_in(const Tensor& tensor) {
  const auto* values = static_cast<const double*>(tensor.data_ptr());
  return {values[0], values[1], values[2]};
}

Tensor doubles(std::initializer_list<double> values) {
  const int64_t size = int64_t(values.size());
  const Tensor tensor = empty(Sizes(&size, 1), torch::headeronly::ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(tensor.data_ptr()));
  return tensor;
}

}  // namespace

static Tensor moments(Tensor x, std::optional<Tensor> mask) {
  const Elements elements(x, mask);
  auto* kernel = LSC_DISPATCH_ISA(whiten_moments);
  const Moments all = merged(elements.blocks<Moments>(kWhitenTile, [&](int64_t begin, int64_t end) { return kernel(elements.kernel, begin, end); }));
  return doubles({all.count, all.mean, all.m2});
}

static Tensor forward(Tensor x, std::optional<Tensor> mask, Tensor given_moments, bool shift_mean, double eps, int64_t correction) {
  const Elements elements(x, mask);
  const Tensor held = dense(given_moments);
  const Moments all = moments_in(held);
  const Whitening rule = whitening_of(all, shift_mean, eps, correction);
  const Tensor out = empty_large(elements.x.sizes(), torch::headeronly::ScalarType::Float);
  auto* kernel = LSC_DISPATCH_ISA(whiten_forward);
  torch::stable::parallel_for(0, elements.x.numel(), kPerTask, [&](int64_t begin, int64_t end) {
    kernel(elements.kernel, rule, floats(out), begin, end);
  });
  return out;
}

static Tensor sums(Tensor grad, Tensor x, std::optional<Tensor> mask, Tensor given_moments) {
  const Elements elements(x, mask);
  const UpstreamTensor upstream(grad);
  const Tensor held = dense(given_moments);
  const double mean = moments_in(held).mean;
  auto* kernel = LSC_DISPATCH_ISA(whiten_gradient_sums);
  const std::vector<GradientSums> parts = elements.blocks<GradientSums>(
      kPerTask, [&](int64_t begin, int64_t end) { return kernel(elements.kernel, upstream.kernel, mean, begin, end); });
  GradientSums all{0, 0};
  for (const GradientSums& part : parts) all.sum += part.sum, all.along += part.along;
  return doubles({all.sum, all.along});
}

static Tensor backward(
    Tensor grad, Tensor x, std::optional<Tensor> mask, Tensor given_moments, Tensor given_sums, bool shift_mean, double eps,
    int64_t correction) {
  const Elements elements(x, mask);
  const UpstreamTensor upstream(grad);
  const Tensor held = dense(given_moments), held_sums = dense(given_sums);
  const auto* total = static_cast<const double*>(held_sums.data_ptr());
  const WhiteningGradient rule = whitening_gradient_of(moments_in(held), {total[0], total[1]}, shift_mean, eps, correction);
  const Tensor out = empty_large(elements.x.sizes(), elements.x.scalar_type());
  auto* kernel = LSC_DISPATCH_ISA(whiten_backward);
  torch::stable::parallel_for(0, elements.x.numel(), kPerTask, [&](int64_t begin, int64_t end) {
    kernel(elements.kernel, upstream.kernel, rule, out.data_ptr(), begin, end);
  });
  return out;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("masked_whiten_moments(Tensor x, Tensor? mask) -> Tensor");
  m.def("masked_whiten_forward(Tensor x, Tensor? mask, Tensor moments, bool shift_mean, float eps, int correction) -> Tensor");
  m.def("masked_whiten_sums(Tensor grad, Tensor x, Tensor? mask, Tensor moments) -> Tensor");
  m.def("masked_whiten_backward(Tensor grad, Tensor x, Tensor? mask, Tensor moments, Tensor sums, bool shift_mean, float eps,"
        " int correction) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("masked_whiten_moments", TORCH_BOX(&moments));
  m.impl("masked_whiten_forward", TORCH_BOX(&forward));
  m.impl("masked_whiten_sums", TORCH_BOX(&sums));
  m.impl("masked_whiten_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
