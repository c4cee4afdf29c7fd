// masked_whiten: blocks of elements, each read once for its mean and once more, from the cache, for what lies about it.
// In fp64: the op waits for memory.
#include "cpu/kernels/masked_whiten.h"

#include <algorithm>

#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 512;
constexpr int kLanes = 16;  // partial sums: the same for every instruction set

struct Tile {
  alignas(64) float x[kTile];
  alignas(64) double centred[kTile];  // x - mean; 0 where it does not count, and up to a multiple of kLanes
  uint8_t counted[kTile];
  int n, count;

  void read(const WhitenInputs& in, double mean, int64_t first, int64_t end) {
    n = int(std::min<int64_t>(kTile, end - first));
    load_tile(in.x.dtype, in.x.data, first, n, x);
    count = read_counted(in.mask, 0, first, n, counted);
    for (int i = 0; i < n; ++i) centred[i] = counted[i] ? x[i] - mean : 0.0;
    std::fill(centred + n, centred + (n + kLanes - 1) / kLanes * kLanes, 0.0);
  }
};

template <typename Each>
inline void for_each_tile(const WhitenInputs& in, double mean, int64_t begin, int64_t end, const Each& each) {
  Tile tile;
  for (int64_t first = begin; first < end; first += kTile) {
    tile.read(in, mean, first, end);
    each(tile, first);
  }
}

struct Sum {
  double lanes[kLanes] = {};

  template <typename Term>
  void add(int n, const Term& term) {
    for (int i = 0; i < n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) lanes[j] += term(i + j);
    }
  }
  double total() const {
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace

Moments whiten_moments(const WhitenInputs& in, int64_t begin, int64_t end) {
  Sum sum, rest, squares;
  double count = 0;
  for_each_tile(in, 0.0, begin, end, [&](const Tile& tile, int64_t) {
    sum.add(tile.n, [&](int i) { return tile.centred[i]; });
    count += tile.count;
  });
  if (count == 0) return {0, 0, 0};
  const double mean = sum.total() / count;
  for_each_tile(in, mean, begin, end, [&](const Tile& tile, int64_t) {
    rest.add(tile.n, [&](int i) { return tile.centred[i]; });
    squares.add(tile.n, [&](int i) { return tile.centred[i] * tile.centred[i]; });
  });
  const double left = rest.total();
  return {count, mean + left / count, squares.total() - left * left / count};
}

void whiten_forward(const WhitenInputs& in, const Whitening& rule, float* out, int64_t begin, int64_t end) {
  for_each_tile(in, rule.mean, begin, end, [&](const Tile& tile, int64_t first) {
    for (int i = 0; i < tile.n; ++i) {
      out[first + i] = float(rule.scale * tile.centred[i] + (tile.counted[i] ? rule.shift : 0.0));
    }
  });
}

GradientSums whiten_gradient_sums(const WhitenInputs& in, const float* grad, double mean, int64_t begin, int64_t end) {
  Sum sum, along;
  for_each_tile(in, mean, begin, end, [&](const Tile& tile, int64_t first) {
    alignas(64) double upstream[kTile];
    for (int i = 0; i < tile.n; ++i) upstream[i] = tile.counted[i] ? grad[first + i] : 0.0;
    std::fill(upstream + tile.n, upstream + (tile.n + kLanes - 1) / kLanes * kLanes, 0.0);
    sum.add(tile.n, [&](int i) { return upstream[i]; });
    along.add(tile.n, [&](int i) { return upstream[i] * tile.centred[i]; });
  });
  return {sum.total(), along.total()};
}

void whiten_backward(
    const WhitenInputs& in, const float* grad, const WhiteningGradient& rule, void* out, int64_t begin, int64_t end) {
  for_each_tile(in, rule.mean, begin, end, [&](const Tile& tile, int64_t first) {
    alignas(64) float to_x[kTile] = {};
    for (int i = 0; i < tile.n; ++i) {
      const double slope = rule.of_grad * grad[first + i] + (rule.of_centred * tile.centred[i] + rule.constant);
      to_x[i] = tile.counted[i] ? float(slope) : 0.0f;
    }
    store_tile(in.x.dtype, out, first, tile.n, to_x);
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
