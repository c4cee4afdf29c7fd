// bradley_terry_loss: -log sigmoid(d) + center (chosen + rejected)^2, d = chosen - rejected - margin.
//
// Forward reads two scores a pair, and writes one loss or none; backward reads two scores and writes two gradients. What is
// between stays in registers. d is a pair of floats, since the loss of a pair that is ranked right is about e^-d: what the
// two subtractions round away goes into the exponential.
#include "cpu/kernels/bradley_terry_loss.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/tiles.h"
#include "cpu/kernels/upstream.h"
#include "math/log_sigmoid.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kPairs = 256;

struct Difference {
  Vec value, low;
};

// a - b and what the subtraction rounds away; nothing where that is not finite.
inline Difference subtract(Vec a, Vec b) {
  const Vec value = a - b, back = value - a;
  const Vec low = (a - (value - back)) - (b + back);
  return {value, select(abs(low) < Vec(INFINITY), low, Vec(0.0f))};
}

// The rest, but nothing where it is beyond all use to an exponential.
inline Difference useful(Difference d) { return {d.value, select(abs(d.low) < Vec(1.0f), d.low, Vec(0.0f))}; }

// What is left of d in one float, and the rest.
inline Difference normalised(Vec value, Vec low) {
  const Vec sum = value + low;
  return useful({sum, low - (sum - value)});
}

// Calls each(number of the first, how many, chosen + rejected, d) for up to Vec::kLanes pairs at a time.
template <typename T, typename Each>
inline void for_each_pair(const PairInputs& in, int64_t begin, int64_t end, const Each& each) {
  const T *chosen = static_cast<const T*>(in.chosen), *rejected = static_cast<const T*>(in.rejected);
  const Vec number(float(in.margin.number)), number_low(float(in.margin.number - float(in.margin.number)));
  const bool unmoved = !in.margin.data && in.margin.number == 0;
  for (int64_t i = begin; i < end; i += Vec::kLanes) {
    const int n = int(std::min<int64_t>(Vec::kLanes, end - i));
    const auto next = [&](const auto* from) { return n == Vec::kLanes ? load(from + i) : load_first(from + i, n, 0.0f); };
    const Vec c = next(chosen), r = next(rejected);
    const Difference d = subtract(c, r);
    if (unmoved) {
      each(i, n, c + r, useful(d));
      continue;
    }
    const Difference less = subtract(d.value, in.margin.data ? next(in.margin.data) : number);
    each(i, n, c + r, normalised(less.value, (d.low + less.low) - number_low));
  }
}

}  // namespace

double bradley_terry_forward(const PairInputs& in, float* losses, int64_t begin, int64_t end) {
  const Vec zero(0.0f), center(float(in.center));
  const bool centred = in.center != 0;
  WideSum sum;
  for_dtype(in.dtype, [&](auto type) {
    for_each_pair<decltype(type)>(in, begin, end, [&](int64_t at, int n, Vec both, Difference d) {
      Vec loss = zero - log_sigmoid(d.value, d.low);
      if (centred) loss = fma(center * both, both, loss);
      if (n == Vec::kLanes) {
        if (losses) store(losses + at, loss);
        sum.add(loss);
      } else {
        float last[Vec::kLanes];
        store(last, loss);
        if (losses) std::copy_n(last, n, losses + at);
        sum.add(load_first(last, n, 0.0f));
      }
    });
  });
  return sum.total();
}

void bradley_terry_backward(const PairInputs& in, const Upstream& grad, double factor, const PairGradients& out, int64_t begin, int64_t end) {
  const Vec zero(0.0f), twice_center(float(2 * in.center)), of_all{float(factor)};
  const bool centred = in.center != 0;
  UpstreamTile<kPairs> given(grad);
  for_dtype(in.dtype, [&](auto type) {
    using T = decltype(type);
    T *to_chosen = static_cast<T*>(out.chosen), *to_rejected = static_cast<T*>(out.rejected);
    for (int64_t first = begin; first < end; first += kPairs) {
      const int64_t last = std::min<int64_t>(end, first + kPairs);
      const float* of_each = grad.data ? given.along(first, int(last - first)) : nullptr;
      for_each_pair<T>(in, first, last, [&](int64_t at, int n, Vec both, Difference d) {
        const bool whole = n == Vec::kLanes;
        Vec upstream = of_all;
        if (of_each) {
          const float* here = of_each + (at - first);
          upstream = of_all * (whole ? load(here) : load_first(here, n, 0.0f));
        }
        // a slope that nobody asked for counts for nothing, even if it is NaN
        const Mask nobody = upstream == zero;
        const Vec slope = select(nobody, zero, upstream * log_sigmoid_slope(d.value, d.low));
        const Vec pull = centred ? select(nobody, zero, upstream * twice_center * both) : zero;
        const auto write = [&](auto* to, Vec gradient) {
          if (!to) return;
          whole ? store(to + at, gradient) : store_first(to + at, n, gradient);
        };
        write(to_chosen, pull - slope);
        write(to_rejected, pull + slope);
        write(out.margin, slope);
      });
    }
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
