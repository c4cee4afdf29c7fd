// masked_whiten on CUDA: moments of blocks of 2048 elements, merged by one block; then a thread an element. In double: the op
// waits for memory. Moments read x and the mask once, and whitening once more; gradients read g as well, both times.
#include "cuda/mask.h"
#include "cuda/transform_tensors.h"
#include "cuda/upstream.h"
#include "math/whitening.h"
#include "tensors/mask.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

constexpr int kOwnElements = 8;

struct Elements {
  TypedData x;
  MaskRows mask;
  Upstream grad;  // with null data where there is none
  int64_t count;
  const Moments* moments;
};

struct WhitenParts {
  Elements in;
  Moments* parts;
  GradientSums* sums;
};

struct WhitenMerge {
  const Moments* parts;
  const GradientSums* sums;
  int64_t count;
  Moments* all;
  GradientSums* all_sums;
};

struct WhitenApply {
  Elements in;
  const GradientSums* sums;
  bool shift_mean;
  double eps;
  int64_t correction;
  void* out;
};

// A thread's elements: x - mean and the gradient, 0 where they do not count.
struct Own {
  double centred[kOwnElements], upstream[kOwnElements];
  bool counted[kOwnElements];
};

LSC_DEVICE Own own_elements(const Elements& in, double mean) {
  Own own;
#pragma unroll
  for (int i = 0; i < kOwnElements; ++i) {
    const int64_t at = (block_index() * kOwnElements + i) * kElementThreads + thread_index();
    const bool counted = at < in.count && is_counted(in.mask, 0, at);
    own.counted[i] = counted;
    own.centred[i] = counted ? load_one(in.x.dtype, in.x.data, at) - mean : 0.0;
    own.upstream[i] = counted && in.grad.data ? upstream_at(in.grad, at) : 0.0;
  }
  return own;
}

LSC_KERNEL(kElementThreads, 4) whiten_moments(LSC_ARGUMENT WhitenParts a) {
  auto& memory = block_memory<BlockSum<kElementThreads>>();
  const Own own = own_elements(a.in, 0);
  double count = 0, sum = 0, squares = 0;
  for (int i = 0; i < kOwnElements; ++i) count += own.counted[i], sum += own.centred[i];
  count = block_sum(memory, count), sum = block_sum(memory, sum);
  const double mean = count > 0 ? sum / count : 0;
  for (int i = 0; i < kOwnElements; ++i) squares += own.counted[i] ? (own.centred[i] - mean) * (own.centred[i] - mean) : 0.0;
  squares = block_sum(memory, squares);
  if (thread_index() == 0) a.parts[block_index()] = {count, mean, squares};
}

LSC_KERNEL(kElementThreads, 4) whiten_sums(LSC_ARGUMENT WhitenParts a) {
  auto& memory = block_memory<BlockSum<kElementThreads>>();
  const Own own = own_elements(a.in, a.in.moments->mean);
  double sum = 0, along = 0;
  for (int i = 0; i < kOwnElements; ++i) sum += own.upstream[i], along += own.upstream[i] * own.centred[i];
  sum = block_sum(memory, sum), along = block_sum(memory, along);
  if (thread_index() == 0) a.sums[block_index()] = {sum, along};
}

LSC_KERNEL(kElementThreads, 1) merge_moments(LSC_ARGUMENT WhitenMerge a) {
  auto& memory = block_memory<BlockSum<kElementThreads>>();
  double count = 0, sum = 0, m2 = 0;
  for (int64_t i = thread_index(); i < a.count; i += kElementThreads) count += a.parts[i].count, sum += a.parts[i].count * a.parts[i].mean;
  count = block_sum(memory, count), sum = block_sum(memory, sum);
  const double mean = count > 0 ? sum / count : 0;
  for (int64_t i = thread_index(); i < a.count; i += kElementThreads) {
    const Moments part = a.parts[i];
    m2 += part.m2 + part.count * (part.mean - mean) * (part.mean - mean);
  }
  m2 = block_sum(memory, m2);
  if (thread_index() == 0) *a.all = {count, mean, m2};
}

LSC_KERNEL(kElementThreads, 1) merge_sums(LSC_ARGUMENT WhitenMerge a) {
  auto& memory = block_memory<BlockSum<kElementThreads>>();
  double sum = 0, along = 0;
  for (int64_t i = thread_index(); i < a.count; i += kElementThreads) sum += a.sums[i].sum, along += a.sums[i].along;
  sum = block_sum(memory, sum), along = block_sum(memory, along);
  if (thread_index() == 0) *a.all_sums = {sum, along};
}

LSC_KERNEL(kElementThreads, 4) whiten(LSC_ARGUMENT WhitenApply a) {
  const int64_t at = block_index() * kElementThreads + thread_index();
  if (at >= a.in.count) return;
  const bool counted = is_counted(a.in.mask, 0, at);
  const double x = counted ? load_one(a.in.x.dtype, a.in.x.data, at) : 0.0;
  double result;
  if (a.in.grad.data) {
    const WhiteningGradient rule = whitening_gradient_of(*a.in.moments, *a.sums, a.shift_mean, a.eps, a.correction);
    result = rule.of_grad * upstream_at(a.in.grad, at) + (rule.of_centred * (x - rule.mean) + rule.constant);
  } else {
    const Whitening rule = whitening_of(*a.in.moments, a.shift_mean, a.eps, a.correction);
    result = rule.scale * (x - rule.mean) + rule.shift;
  }
  store_one(a.in.grad.data ? a.in.x.dtype : DType::float32, a.out, at, counted ? float(result) : 0.0f);
}

namespace {

// Tensors held alive while a launch is prepared.
struct WhitenTensors {
  Tensor x;
  std::optional<Tensor> mask, moments;
  std::optional<UpstreamTensor> grad;
  Elements kernel;

  WhitenTensors(const Tensor& given, const std::optional<Tensor>& masks, const std::optional<Tensor>& all, const std::optional<Tensor>& upstream)
      : x(dense(given)), mask(dense(masks)), moments(dense(all)), grad(upstream_of(upstream)) {
    kernel = {typed(x), flat_mask(mask), upstream_or_none(grad), x.numel(), data_or_null<Moments>(moments)};
  }

  int64_t parts() const { return (kernel.count + kOwnElements * kElementThreads - 1) / (kOwnElements * kElementThreads); }
  Tensor doubles(int64_t count) const { return empty_on(x, Sizes(&count, 1), torch::headeronly::ScalarType::Double); }
};

}  // namespace

static Tensor moments(Tensor x, std::optional<Tensor> mask) {
  const WhitenTensors in(x, mask, std::nullopt, std::nullopt);
  const Tensor parts = in.doubles(3 * in.parts()), all = in.doubles(3);
  auto* each = static_cast<Moments*>(parts.data_ptr());
  launch(&whiten_moments, in.parts(), kElementThreads, x, WhitenParts{in.kernel, each, nullptr});
  launch(&merge_moments, 1, kElementThreads, x, WhitenMerge{each, nullptr, in.parts(), static_cast<Moments*>(all.data_ptr()), nullptr});
  return all;
}

static Tensor sums(Tensor grad, Tensor x, std::optional<Tensor> mask, Tensor all_moments) {
  const WhitenTensors in(x, mask, all_moments, grad);
  const Tensor parts = in.doubles(2 * in.parts()), all = in.doubles(2);
  auto* each = static_cast<GradientSums*>(parts.data_ptr());
  launch(&whiten_sums, in.parts(), kElementThreads, x, WhitenParts{in.kernel, nullptr, each});
  launch(&merge_sums, 1, kElementThreads, x, WhitenMerge{nullptr, each, in.parts(), nullptr, static_cast<GradientSums*>(all.data_ptr())});
  return all;
}

static Tensor forward(Tensor x, std::optional<Tensor> mask, Tensor all_moments, bool shift_mean, double eps, int64_t correction) {
  const WhitenTensors in(x, mask, all_moments, std::nullopt);
  const Tensor out = floats_on(x, x.sizes());
  launch(&whiten, element_blocks(in.kernel.count), kElementThreads, x,
         WhitenApply{in.kernel, nullptr, shift_mean, eps, correction, out.data_ptr()});
  return out;
}

static Tensor backward(
    Tensor grad, Tensor x, std::optional<Tensor> mask, Tensor all_moments, Tensor given_sums, bool shift_mean, double eps,
    int64_t correction) {
  const WhitenTensors in(x, mask, all_moments, grad);
  const Tensor held = dense(given_sums), to_x = empty_on(x, x.sizes(), x.scalar_type());
  launch(&whiten, element_blocks(in.kernel.count), kElementThreads, x,
         WhitenApply{in.kernel, static_cast<const GradientSums*>(held.data_ptr()), shift_mean, eps, correction, to_x.data_ptr()});
  return to_x;
}

LSC_CUDA_OPS(m) {
  m.impl("masked_whiten_moments", TORCH_BOX(&moments));
  m.impl("masked_whiten_forward", TORCH_BOX(&forward));
  m.impl("masked_whiten_sums", TORCH_BOX(&sums));
  m.impl("masked_whiten_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
