// masked_whiten: tiles of elements in a cache's first level, where the mean of one is found before what lies about it is
// summed. In fp64: the op waits for memory.
//
// Bytes read: x and mask once for the moments and once more to write; the gradient likewise, with the upstream one.
#include "cpu/kernels/masked_whiten.h"

#include <algorithm>

#include "cpu/kernels/doubles.h"
#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/upstream.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kPartial = 16;  // partial sums: the same for every instruction set
static_assert(kWhitenTile % kPartial == 0);

// What lies beyond n, up to whole partial sums, does not count.
struct Tile {
  alignas(64) float x[kWhitenTile], upstream[kWhitenTile];
  alignas(64) uint8_t counted[kWhitenTile];
  int n, count;

  void read(const WhitenInputs& in, int64_t first, int64_t end) {
    n = int(std::min<int64_t>(kWhitenTile, end - first));
    load_tile(in.x.dtype, in.x.data, first, n, x);
    count = read_counted(in.mask, 0, first, n, counted);
    for (int i = n; i < padded(); ++i) x[i] = 0.0f, counted[i] = 0;
  }
  void read_upstream(UpstreamTile<kWhitenTile>& given, int64_t first) {
    load_tile(given.along(first, n), n, upstream);
    std::fill(upstream + n, upstream + padded(), 0.0f);
  }
  int padded() const { return (n + kPartial - 1) / kPartial * kPartial; }
  Doubles where_counted(int i, Doubles value) const { return select(load_chosen(counted + i), value, Doubles(0.0)); }
  Doubles centred(int i, Doubles mean) const { return load_doubles(x + i) - mean; }
};

template <typename Each>
inline void for_each_tile(const WhitenInputs& in, int64_t begin, int64_t end, const Each& each) {
  Tile tile;
  for (int64_t first = begin; first < end; first += kWhitenTile) {
    tile.read(in, first, end);
    each(tile, first);
  }
}

struct Sum {
  static constexpr int kVectors = kPartial / Doubles::kLanes;
  Doubles partial[kVectors];

  Sum() { std::fill_n(partial, kVectors, Doubles(0.0)); }
  double total() const {
    double lanes[kPartial], sum = 0;
    std::memcpy(lanes, partial, sizeof lanes);
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

// add(i, j): elements i ... to partial sums j.
template <typename Add>
inline void for_each_vector(const Tile& tile, const Add& add) {
  for (int i = 0; i < tile.padded(); i += kPartial) {
    for (int j = 0; j < Sum::kVectors; ++j) add(i + j * Doubles::kLanes, j);
  }
}

}  // namespace

Moments whiten_moments(const WhitenInputs& in, int64_t begin, int64_t end) {
  Tile tile;
  tile.read(in, begin, end);
  if (tile.count == 0) return {0, 0, 0};
  Sum sum, squares;
  for_each_vector(tile, [&](int i, int j) { sum.partial[j] = sum.partial[j] + tile.where_counted(i, load_doubles(tile.x + i)); });
  const double count = tile.count, mean = sum.total() / count;
  for_each_vector(tile, [&](int i, int j) {
    const Doubles centred = tile.where_counted(i, tile.centred(i, Doubles(mean)));
    squares.partial[j] = squares.partial[j] + centred * centred;
  });
  return {count, mean, squares.total()};
}

void whiten_forward(const WhitenInputs& in, const Whitening& rule, float* out, int64_t begin, int64_t end) {
  const Doubles mean(rule.mean), scale(rule.scale), shift(rule.shift);
  for_each_tile(in, begin, end, [&](Tile& tile, int64_t first) {
    for_each_vector(tile, [&](int i, int) { store_rounded(tile.x + i, tile.where_counted(i, scale * tile.centred(i, mean) + shift)); });
    store_tile(out + first, tile.x, tile.n);
  });
}

GradientSums whiten_gradient_sums(const WhitenInputs& in, const Upstream& grad, double mean, int64_t begin, int64_t end) {
  Sum sum, along;
  UpstreamTile<kWhitenTile> given(grad);
  for_each_tile(in, begin, end, [&](Tile& tile, int64_t first) {
    tile.read_upstream(given, first);
    for_each_vector(tile, [&](int i, int j) {
      const Doubles upstream = load_doubles(tile.upstream + i);
      sum.partial[j] = sum.partial[j] + tile.where_counted(i, upstream);
      along.partial[j] = along.partial[j] + tile.where_counted(i, upstream * tile.centred(i, Doubles(mean)));
    });
  });
  return {sum.total(), along.total()};
}

void whiten_backward(
    const WhitenInputs& in, const Upstream& grad, const WhiteningGradient& rule, void* out, int64_t begin, int64_t end) {
  const Doubles mean(rule.mean), of_grad(rule.of_grad), of_centred(rule.of_centred), constant(rule.constant);
  UpstreamTile<kWhitenTile> given(grad);
  for_each_tile(in, begin, end, [&](Tile& tile, int64_t first) {
    tile.read_upstream(given, first);
    for_each_vector(tile, [&](int i, int) {
      const Doubles slope = of_grad * load_doubles(tile.upstream + i) + (of_centred * tile.centred(i, mean) + constant);
      store_rounded(tile.x + i, tile.where_counted(i, slope));
    });
    store_tile(in.x.dtype, out, first, tile.n, tile.x);
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
