// bradley_terry_loss on CUDA: -log sigmoid(d) + center (chosen + rejected)^2, d = chosen - rejected - margin.
//
// d is formed in double and taken as a pair of floats: the loss of a pair that is ranked right is about e^-d.
// Forward reads two scores a pair, and writes one loss; or each block adds up its pairs in a fixed order and writes their sum,
// and one more block adds those. Backward reads two scores and writes two gradients.
#include "cuda/transform_tensors.h"
#include "cuda/upstream.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

constexpr int kPairsPerThread = 8;

struct Pairs {
  const void *chosen, *rejected;
  DType dtype;
  int64_t count;
  DeviceOperand margin;
  double center;
};

struct PairLosses {
  Pairs in;
  float* losses;  // of each pair, or null
  double* sums;   // of each block
};

struct SumOfSums {
  const double* sums;
  int64_t count;
  double factor;
  float* total;
};

struct PairGradients {
  Pairs in;
  Upstream grad;  // of a sum or a mean one for all
  double factor;
  void *chosen, *rejected;  // each null where it is not wanted
  float* margin;
};

struct Pair {
  float z, low;  // d
  double both;   // chosen + rejected
};

LSC_DEVICE Pair pair_at(const Pairs& in, int64_t at) {
  const double chosen = load_one(in.dtype, in.chosen, at), rejected = load_one(in.dtype, in.rejected, at);
  const double d = chosen - rejected - in.margin.at(0, at);
  const float z = float(d);
  return {z, fabsf(z) < 1e3f ? float(d - double(z)) : 0.0f, chosen + rejected};
}

LSC_KERNEL(kElementThreads, 1) pair_losses(LSC_ARGUMENT PairLosses a) {
  double sum = 0;
  for (int i = 0; i < kPairsPerThread; ++i) {
    const int64_t at = (block_index() * kPairsPerThread + i) * kElementThreads + thread_index();
    if (at >= a.in.count) break;
    const Pair pair = pair_at(a.in, at);
    double loss = -log_sigmoid(pair.z, pair.low);
    if (a.in.center != 0) loss += a.in.center * pair.both * pair.both;
    if (a.losses) a.losses[at] = float(loss);
    sum += loss;
  }
  if (!a.sums) return;
  sum = block_sum(block_memory<BlockSum<kElementThreads>>(), sum);
  if (thread_index() == 0) a.sums[block_index()] = sum;
}

LSC_KERNEL(kElementThreads, 1) sum_of_sums(LSC_ARGUMENT SumOfSums a) {
  double sum = 0;
  for (int64_t at = thread_index(); at < a.count; at += kElementThreads) sum += a.sums[at];
  sum = block_sum(block_memory<BlockSum<kElementThreads>>(), sum);
  if (thread_index() == 0) *a.total = float(sum * a.factor);
}

LSC_KERNEL(kElementThreads, 1) pair_gradients(LSC_ARGUMENT PairGradients a) {
  const int64_t at = block_index() * kElementThreads + thread_index();
  if (at >= a.in.count) return;
  const double upstream = double(upstream_at(a.grad, at)) * a.factor;
  const Pair pair = pair_at(a.in, at);
  // a slope that nobody asked for counts for nothing, even if it is NaN
  const double push = upstream == 0 ? 0.0 : upstream * log_sigmoid_slope(pair.z, pair.low);
  const double pull = upstream == 0 || a.in.center == 0 ? 0.0 : upstream * 2 * a.in.center * pair.both;
  if (a.chosen) store_one(a.in.dtype, a.chosen, at, float(pull - push));
  if (a.rejected) store_one(a.in.dtype, a.rejected, at, float(pull + push));
  if (a.margin) a.margin[at] = float(push);
}

namespace {

enum class Reduction : int64_t { none, sum, mean };

struct PairTensors {
  Tensor chosen, rejected;
  std::optional<Tensor> margin;
  Pairs pairs;

  PairTensors(const Tensor& given_chosen, const Tensor& given_rejected, const std::optional<Tensor>& margins, double margin_number,
              double center)
      : chosen(dense(given_chosen)), rejected(dense(given_rejected)), margin(dense(margins)) {
    const DeviceOperand operand{margin_number, margin ? floats(*margin) : nullptr, 0, margin && margin->dim() > 0 ? 1 : 0};
    pairs = {chosen.data_ptr(), rejected.data_ptr(), dtype_of(chosen), chosen.numel(), operand, center};
  }

  double scale(int64_t reduction) const { return Reduction(reduction) == Reduction::mean ? 1.0 / double(pairs.count) : 1.0; }
};

}  // namespace

static Tensor bradley_terry_loss_forward(
    Tensor chosen, Tensor rejected, std::optional<Tensor> margin, double margin_number, double center, int64_t reduction) {
  const PairTensors in(chosen, rejected, margin, margin_number, center);
  constexpr int64_t per_block = int64_t(kElementThreads) * kPairsPerThread;
  const int64_t blocks = (in.pairs.count + per_block - 1) / per_block;
  if (Reduction(reduction) == Reduction::none) {
    const Tensor losses = floats_on(chosen, chosen.sizes());
    launch(&pair_losses, blocks, kElementThreads, chosen, PairLosses{in.pairs, floats(losses), nullptr});
    return losses;
  }
  const Tensor sums = empty_on(chosen, Sizes(&blocks, 1), torch::headeronly::ScalarType::Double);
  const Tensor loss = floats_on(chosen, Sizes());
  auto* data = static_cast<double*>(sums.data_ptr());
  launch(&pair_losses, blocks, kElementThreads, chosen, PairLosses{in.pairs, nullptr, data});
  launch(&sum_of_sums, 1, kElementThreads, chosen, SumOfSums{data, blocks, in.scale(reduction), floats(loss)});
  return loss;
}

static std::tuple<Tensor, Tensor, Tensor> bradley_terry_loss_backward(
    Tensor grad, Tensor chosen, Tensor rejected, std::optional<Tensor> margin, double margin_number, double center,
    int64_t reduction, bool want_chosen, bool want_rejected, bool want_margin) {
  const PairTensors in(chosen, rejected, margin, margin_number, center);
  const UpstreamTensor upstream(grad);
  const auto to_scores = [](bool wanted, const Tensor& scores) {
    return wanted ? empty_on(scores, scores.sizes(), scores.scalar_type()) : nothing_on(scores, scores.scalar_type());
  };
  const Tensor to_chosen = to_scores(want_chosen, chosen), to_rejected = to_scores(want_rejected, rejected);
  const Tensor to_margin = wanted_on(want_margin, in.chosen);
  launch(&pair_gradients, element_blocks(in.pairs.count), kElementThreads, chosen,
         PairGradients{in.pairs, upstream.kernel, in.scale(reduction), want_chosen ? to_chosen.data_ptr() : nullptr,
                       want_rejected ? to_rejected.data_ptr() : nullptr, want_margin ? floats(to_margin) : nullptr});
  return {to_chosen, to_rejected, to_margin};
}

LSC_CUDA_OPS(m) {
  m.impl("bradley_terry_loss_forward", TORCH_BOX(&bradley_terry_loss_forward));
  m.impl("bradley_terry_loss_backward", TORCH_BOX(&bradley_terry_loss_backward));
}

}  // namespace cuda
}  // namespace lsc
