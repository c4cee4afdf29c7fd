// bradley_terry_loss: -log sigmoid(d) + center (chosen + rejected)^2, d = chosen - rejected - margin.
//
// Forward reads two scores a pair, and writes one loss or none; backward reads two scores and writes two gradients. What is
// between stays in registers. d is a pair of floats, since the loss of a pair that is ranked right is about e^-d: what the
// two subtractions round away goes into the exponential.
#include "cpu/kernels/bradley_terry_loss.h"

#include <algorithm>
#include <cmath>

#include "cpu/kernels/tiles.h"
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

// What is left of d in one float, and the rest: nothing where it is beyond all use to an exponential.
inline Difference normalised(Vec value, Vec low) {
  const Vec sum = value + low, rest = low - (sum - value);
  return {sum, select(abs(rest) < Vec(1.0f), rest, Vec(0.0f))};
}

// Calls each(offset from `begin`, how many, chosen + rejected, d) for up to Vec::kLanes pairs at a time.
template <typename T, typename Each>
inline void for_each_pair(const PairInputs& in, int64_t begin, int64_t end, const Each& each) {
  const T *chosen = static_cast<const T*>(in.chosen), *rejected = static_cast<const T*>(in.rejected);
  const Vec number(float(in.margin.number)), number_low(float(in.margin.number - float(in.margin.number)));
  for (int64_t i = begin; i < end; i += Vec::kLanes) {
    const int n = int(std::min<int64_t>(Vec::kLanes, end - i));
    const auto next = [&](const auto* from) { return n == Vec::kLanes ? load(from + i) : load_first(from + i, n, 0.0f); };
    const Vec c = next(chosen), r = next(rejected), margin = in.margin.data ? next(in.margin.data) : number;
    const Difference d = subtract(c, r), less = subtract(d.value, margin);
    each(i - begin, n, c + r, normalised(less.value, (d.low + less.low) - number_low));
  }
}

}  // namespace

double bradley_terry_forward(const PairInputs& in, float* losses, int64_t begin, int64_t end) {
  double sum = 0;
  const Vec zero(0.0f), center(float(in.center));
  const bool centred = in.center != 0;
  for_dtype(in.dtype, [&](auto type) {
    for (int64_t first = begin; first < end; first += kPairs) {
      alignas(64) float tile[kPairs];
      const int64_t last = std::min<int64_t>(end, first + kPairs);
      for_each_pair<decltype(type)>(in, first, last, [&](int64_t at, int n, Vec both, Difference d) {
        Vec loss = zero - log_sigmoid(d.value, d.low);
        if (centred) loss = fma(center * both, both, loss);
        if (n == Vec::kLanes) {
          store(tile + at, loss);
        } else {
          store_first(tile + at, n, loss);
        }
      });
      for (int64_t i = 0; i < last - first; ++i) sum += tile[i];
      if (losses) std::copy_n(tile, last - first, losses + first);
    }
  });
  return sum;
}

void bradley_terry_backward(const PairInputs& in, const float* grad, double factor, const PairGradients& out, int64_t begin, int64_t end) {
  const Vec zero(0.0f), twice_center(float(2 * in.center)), of_all{float(factor)};
  const bool centred = in.center != 0;
  for_dtype(in.dtype, [&](auto type) {
    using T = decltype(type);
    T *to_chosen = static_cast<T*>(out.chosen) + begin, *to_rejected = static_cast<T*>(out.rejected) + begin;
    for_each_pair<T>(in, begin, end, [&](int64_t at, int n, Vec both, Difference d) {
      const bool whole = n == Vec::kLanes;
      Vec upstream = of_all;
      if (grad) upstream = upstream * (whole ? load(grad + begin + at) : load_first(grad + begin + at, n, 0.0f));
      // a slope that nobody asked for counts for nothing, even if it is NaN
      const Mask nobody = upstream == zero;
      const Vec slope = select(nobody, zero, upstream * log_sigmoid_slope(d.value, d.low));
      const Vec pull = centred ? select(nobody, zero, upstream * twice_center * both) : zero;
      if (whole) {
        store(to_chosen + at, pull - slope);
        store(to_rejected + at, pull + slope);
        if (out.margin) store(out.margin + begin + at, slope);
      } else {
        store_first(to_chosen + at, n, pull - slope);
        store_first(to_rejected + at, n, pull + slope);
        if (out.margin) store_first(out.margin + begin + at, n, slope);
      }
    });
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
