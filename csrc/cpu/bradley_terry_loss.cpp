// bradley_terry_loss on the CPU. The margin comes as a number or as one float per pair; its gradient leaves in that form.
#include <torch/csrc/stable/library.h>

#include "cpu/kernels/bradley_terry_loss.h"
#include "cpu/transform_operands.h"
#include "tensors/upstream.h"

namespace lsc {

namespace {

constexpr int64_t kPairsPerTask = 1 << 14;

enum class Reduction : int64_t { none, sum, mean };

struct Pairs {
  Tensor chosen, rejected;
  std::optional<Tensor> margin;
  PairInputs kernel;

  Pairs(const Tensor& given_chosen, const Tensor& given_rejected, const std::optional<Tensor>& margins, double margin_number,
        double center)
      : chosen(dense(given_chosen)), rejected(dense(given_rejected)), margin(dense(margins)) {
    const Operand operand = margin ? Operand{Operand::Layout::full, 0.0, floats(*margin)}
                                   : Operand{Operand::Layout::number, margin_number, nullptr};
    kernel = {chosen.data_ptr(), rejected.data_ptr(), dtype_of(chosen), operand, center};
  }

  double scale(int64_t reduction) const { return Reduction(reduction) == Reduction::mean ? 1.0 / double(chosen.numel()) : 1.0; }
};

}  // namespace

// The pairs are cut into blocks that do not depend on the number of threads, and the blocks' sums are added in order.
static Tensor forward(
    Tensor chosen, Tensor rejected, std::optional<Tensor> margin, double margin_number, double center, int64_t reduction) {
  const Pairs pairs(chosen, rejected, margin, margin_number, center);
  const bool each = Reduction(reduction) == Reduction::none;
  const int64_t count = pairs.chosen.numel(), blocks = (count + kPairsPerTask - 1) / kPairsPerTask;
  const Tensor loss = empty_large(each ? pairs.chosen.sizes() : Sizes(), torch::headeronly::ScalarType::Float);
  std::vector<double> sums(blocks);
  auto* kernel = LSC_DISPATCH_ISA(bradley_terry_forward);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kPairsPerTask;
      sums[block] = kernel(pairs.kernel, each ? floats(loss) : nullptr, first, std::min(count, first + kPairsPerTask));
    }
  });
  if (!each) {
    double sum = 0;
    for (const double part : sums) sum += part;
    *floats(loss) = float(count == 0 && Reduction(reduction) == Reduction::mean ? NAN : sum * pairs.scale(reduction));
  }
  return loss;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor chosen, Tensor rejected, std::optional<Tensor> margin, double margin_number, double center,
    int64_t reduction, bool want_chosen, bool want_rejected, bool want_margin) {
  const Pairs pairs(chosen, rejected, margin, margin_number, center);
  const UpstreamTensor upstream(grad);
  const bool each = Reduction(reduction) == Reduction::none;
  const double factor = each ? 1.0 : double(*upstream.kernel.data) * pairs.scale(reduction);
  const Tensor to_chosen = want_chosen ? empty_large(pairs.chosen.sizes(), chosen.scalar_type()) : nothing(chosen.scalar_type());
  const Tensor to_rejected = want_rejected ? empty_large(pairs.chosen.sizes(), rejected.scalar_type()) : nothing(rejected.scalar_type());
  const Tensor to_margin = wanted_like(want_margin, pairs.chosen);
  const PairGradients out{want_chosen ? to_chosen.data_ptr() : nullptr, want_rejected ? to_rejected.data_ptr() : nullptr,
                          want_margin ? floats(to_margin) : nullptr};
  auto* kernel = LSC_DISPATCH_ISA(bradley_terry_backward);
  torch::stable::parallel_for(0, pairs.chosen.numel(), kPairsPerTask, [&](int64_t begin, int64_t end) {
    kernel(pairs.kernel, each ? upstream.kernel : Upstream{}, factor, out, begin, end);
  });
  return {to_chosen, to_rejected, to_margin};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("bradley_terry_loss_forward(Tensor chosen, Tensor rejected, Tensor? margin, float margin_number, float center,"
        " int reduction) -> Tensor");
  m.def("bradley_terry_loss_backward(Tensor grad, Tensor chosen, Tensor rejected, Tensor? margin, float margin_number,"
        " float center, int reduction, bool want_chosen, bool want_rejected, bool want_margin) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("bradley_terry_loss_forward", TORCH_BOX(&forward));
  m.impl("bradley_terry_loss_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
