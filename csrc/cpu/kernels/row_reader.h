// Reads one row of two models' logits once from memory and makes its RowState.
//
// A tile of 4 KB of each model is passed over twice while it is in cache: for the two maxima, then for the sums. The
// maxima and the centre are carried from tile to tile, so most tiles only add to the running sums; a tile that holds a
// new largest main logit gets its own centre, x - y at that logit, and is merged.
//
// One exponential instead of two: where |delta| < 0.7 (nearly always, between a policy and its reference),
// e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls out of S, A and D. The second exponential is
// computed only in vectors that hold a larger |delta|; and where most do, the next tile is taken as far apart: both
// exponentials for all of its lanes and no series. A tile that turns out not to be is passed over once more.
//
// A tile whose centre turns out to be far from its weighted mean (an outlier at the largest logit) would lose A and D to
// cancellation: it is passed over once more, still in cache, about the mean.
//
// Bytes read: 2 n sizeof(T). Nothing is written. Sums are floats over 16 elements of a vector lane, doubles beyond; over 4,
// two by two, for S and S', where the largest logit's 1 would swallow more.
#pragma once

#include <cstdint>

#include "cpu/kernels/vec.h"
#include "math/log_ratio.h"
#include "math/row_state.h"

namespace lsc {
namespace LSC_ISA {

// Elements: 4 KB of each model, so that a tile and the next one being fetched leave room in a 32 KB cache.
template <typename T>
constexpr int kTile = 4096 / sizeof(T);

template <typename T>
inline float tile_max(const T* x, int n) {
  Vec a(-INFINITY), b(-INFINITY), c(-INFINITY), d(-INFINITY);
  int i = 0;
  for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes) {
    Vec first, second, third, fourth;
    load_two(x + i, first, second), load_two(x + i + 2 * Vec::kLanes, third, fourth);
    a = max(first, a), b = max(second, b), c = max(third, c), d = max(fourth, d);
  }
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) a = max(load(x + i), a);
  if (i < n) a = max(load_first(x + i, n - i, -INFINITY), a);
  return max_lane(max(max(a, b), max(c, d)));
}

#if defined(__AVX2__)
// In a quarter of the instructions.
template <typename T>
  requires(sizeof(T) == 2)
inline float tile_max(const T* x, int n) {
  constexpr int kStep = 2 * Vec::kLanes;
  LargestBits a, b;
  int i = 0;
  for (; i + 2 * kStep <= n; i += 2 * kStep) a.add(x + i), b.add(x + i + kStep);
  if (i + kStep <= n) a.add(x + i), i += kStep;
  if (i < n) {
    T rest[kStep];
    for (int k = 0; k < kStep; ++k) rest[k] = x[i + k < n ? i + k : i];
    a.add(rest);
  }
  const float first = to_float(T{a.value()}), second = to_float(T{b.value()});
  return first < second ? second : first;
}
#endif

template <typename T>
inline int tile_find(const T* x, int n, float value) {
  const Vec wanted(value);
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes)
    if (any(load(x + i) == wanted)) break;
  for (; i < n; ++i)
    if (to_float(x[i]) == value) return i;
  return 0;
}

template <typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}

// About what a tile's sums are taken.
struct Origin {
  float main_max, other_max;
  double centre;
};

// The sums of a block of vectors. kReverse: the other model is the policy, so the entropy is its.
template <bool kReverse>
struct BlockSums {
  Vec S{0.0f}, D{0.0f}, A{0.0f}, H{0.0f};  // lanes with |delta| < 0.7; H of all lanes, unless kReverse
  Vec W{0.0f}, WD{0.0f}, V{0.0f}, VH{0.0f};  // the others: w, w delta, v, v (y - m')
  int large_pairs = 0;  // of vectors
  bool other_misses = false;

  void add_small(Vec w, Vec delta, Vec from_other_max) {
    const Vec wd = w * delta;
    const Vec square = wd * delta, P = expm1_remainder(delta);
    D = D + wd;
    A = fma(square, P, A);
    if constexpr (kReverse) H = fma(fma(square, P, w - wd), from_other_max, H);
  }

  // Lanes whose two exponentials are both computed: all of them, or those that are not small.
  template <bool kAll>
  void add_large(Vec x, Vec y, Vec w, Vec delta, Mask small, Vec other_max, const PowerScale& scale) {
    const Vec zero(0.0f);
    Vec from_other_max = y - other_max;
    Vec v = exp_scaled(from_other_max, scale);
    const Mask finite = abs(delta) < Vec(INFINITY);
    if (!all(finite)) {
      other_misses |= any(both(y == Vec(-INFINITY), Vec(-INFINITY) < x));
      delta = select(finite, delta, zero);
    }
    if constexpr (!kAll) w = select(small, zero, w), v = select(small, zero, v);
    WD = fma(w, delta, WD);
    V = V + v;
    if constexpr (kReverse) VH = fma(v, from_other_max, VH);
  }
};

// Whether the two models, each over a tile's columns alone, differ so much that the rounding of exponentials is nothing
// beside it: KL = E[delta] + log(sum v / sum w), in units of one maximum.
inline bool apart(double w, double wd, double v, const Origin& origin, double temperature) {
  const double kl = wd / w + std::log(v / w) - (origin.main_max - origin.centre - origin.other_max) / temperature;
  return kl > 0.25 && kl < INFINITY;
}

template <bool kReverse>
struct Sums {
  WideSum S, D, A, H, W, WD, V, VH;
  int large_pairs = 0;
  bool other_misses = false;

  void add_weights(BlockSums<kReverse>& block) {
    S.add(block.S);
    block.S = Vec(0.0f);
    if (block.large_pairs) {
      W.add(block.W), V.add(block.V);
      block.W = block.V = Vec(0.0f);
    }
  }
  void add(BlockSums<kReverse>& block) {
    add_weights(block);
    D.add(block.D), A.add(block.A), H.add(block.H);
    if (block.large_pairs) {
      WD.add(block.WD);
      if constexpr (kReverse) VH.add(block.VH);
      large_pairs += block.large_pairs;
      other_misses |= block.other_misses;
    }
  }
  // Of a tile that was added as far apart.
  void add_far(const Sums& tile) {
    W.add(tile.W), WD.add(tile.WD), V.add(tile.V), H.add(tile.H);
    if constexpr (kReverse) VH.add(tile.VH);
    other_misses |= tile.other_misses;
  }

  RowState<double> state(const Origin& origin, double temperature) const {
    // brings the small lanes' sums, which are about m and c, to the other model's maximum
    const double to_other = std::exp((origin.main_max - origin.centre - origin.other_max) / temperature);
    const double s = S.total(), d = D.total(), a = A.total(), w = W.total(), wd = WD.total(), v = V.total();
    RowState<double> out;
    const double large = scaled(v, 1 / to_other) - w;  // sum w expm1(-delta) of the large lanes
    out.main_max = origin.main_max, out.S = s + w, out.D = d + wd, out.A = a + (large + wd), out.B = (a - d) + large;
    out.other_max = origin.other_max, out.other_S = scaled(s + a - d, to_other) + v;
    out.H = (kReverse ? scaled(H.total(), to_other) + VH.total() : H.total()) / temperature;
    out.centre = origin.centre;
    out.other_misses = other_misses;
    return out;
  }
};

constexpr int kBlock = 16 * Vec::kLanes;

// kPlain: temperature 1 and a centre of one float, which saves two instructions in forty. kFar: every lane as a large one.
// A function of its own, so that the compiler's appetite for inlining does not depend on how many variants there are.
template <bool kReverse, bool kPlain, bool kFar, typename T>
__attribute__((noinline, flatten)) void add_tile(
    const T* x, const T* y, int n, const Origin& origin, const PowerScale& scale, float inverse_temperature, bool more,
    Sums<kReverse>& sums) {
  const float centre = float(origin.centre);
  const Vec m(origin.main_max), m_other(origin.other_max), inverse(kPlain ? 1.0f : inverse_temperature);
  const Vec c(centre), c_low(kPlain ? 0.0f : float(origin.centre - centre));
  const Vec limit(kSmallLogRatio), zero(0.0f);
  const auto add = [&](Vec x0, Vec y0, Vec x1, Vec y1, BlockSums<kReverse>& block) __attribute__((always_inline)) {
    Vec u0 = x0 - m, u1 = x1 - m;
    const Vec w0 = exp_scaled(u0, scale), w1 = exp_scaled(u1, scale);
    const Vec d0 = centred_difference(x0, y0, c, c_low) * inverse;
    const Vec d1 = centred_difference(x1, y1, c, c_low) * inverse;
    const Mask small0 = abs(d0) < limit, small1 = abs(d1) < limit;
    if constexpr (!kReverse) {
      block.H = fma(w0, u0, block.H);
      block.H = fma(w1, u1, block.H);
    }
    if constexpr (kFar) {
      block.W = block.W + (w0 + w1);
      block.template add_large<true>(x0, y0, w0, d0, small0, m_other, scale);
      block.template add_large<true>(x1, y1, w1, d1, small1, m_other, scale);
      ++block.large_pairs;
    } else if (__builtin_expect(all(both(small0, small1)), 1)) {
      block.S = block.S + (w0 + w1);
      block.add_small(w0, d0, y0 - m_other);
      block.add_small(w1, d1, y1 - m_other);
    } else {
      const Vec s0 = select(small0, w0, zero), s1 = select(small1, w1, zero);
      block.S = block.S + (s0 + s1);
      block.W = block.W + (select(small0, zero, w0) + select(small1, zero, w1));
      // a weight of 0 and a logit of -inf would be NaN
      block.add_small(s0, select(small0, d0, zero), max(Vec(scale.lowest), y0 - m_other));
      block.add_small(s1, select(small1, d1, zero), max(Vec(scale.lowest), y1 - m_other));
      block.template add_large<false>(x0, y0, w0, d0, small0, m_other, scale);
      block.template add_large<false>(x1, y1, w1, d1, small1, m_other, scale);
      ++block.large_pairs;
    }
  };
  int first = 0;
  for (; first + kBlock <= n; first += kBlock) {
    BlockSums<kReverse> block;
    for (int i = first; i < first + kBlock; i += 4 * Vec::kLanes) {
      const int half = i + 2 * Vec::kLanes;
      if (more) prefetch(x + kTile<T> + i), prefetch(y + kTile<T> + i);
      if (more) prefetch(x + kTile<T> + half), prefetch(y + kTile<T> + half);
      Vec x0, x1, y0, y1;
      load_two(x + i, x0, x1), load_two(y + i, y0, y1);
      add(x0, y0, x1, y1, block);
      load_two(x + half, x0, x1), load_two(y + half, y0, y1);
      add(x0, y0, x1, y1, block);
      sums.add_weights(block);
    }
    sums.add(block);
  }
  if (first == n) return;
  BlockSums<kReverse> block;
  for (int i = first; i < n; i += Vec::kLanes) {
    const int left = n - i < Vec::kLanes ? n - i : Vec::kLanes;
    const Vec none(-INFINITY);
    add(load_first(x + i, left, -INFINITY), load_first(y + i, left, -INFINITY), none, none, block);
    sums.add_weights(block);
  }
  sums.add(block);
}

// x is the main model, y the other; kReverse: the policy is the other.
template <bool kReverse>
class RowReader {
 public:
  explicit RowReader(double temperature)
      : temperature_(temperature), inverse_temperature_(float(1 / temperature)), scale_(temperature) {}

  // The next n <= kTile<T> pairs of the row. `more`: a whole further tile follows in memory, worth fetching ahead.
  template <typename T>
  void tile(const T* x, const T* y, int n, bool more) {
    const float main_max = tile_max(x, n), other_max = tile_max(y, n);
    if (!main_seen_ || (main_max > origin_.main_max && !raise_main_max(main_max))) {
      return new_centre(x, y, n, more, main_max, other_max);
    }
    if (other_max > origin_.other_max || (!other_seen_ && other_max > -INFINITY)) {
      absorb();
      rescale_other<double>(row_, other_max, temperature_, kReverse);
      origin_.other_max = other_max;
      other_seen_ = true;
    }
    pending_ = true;
    if (far_ && add_far(x, y, n, more)) return;
    const int before = sums_.large_pairs;
    add_about<false>(x, y, n, more, origin_, sums_);
    far_ = (sums_.large_pairs - before) * (4 * Vec::kLanes) > n;
  }

  // Of all tiles so far.
  RowState<double> state() {
    absorb();
    return row_;
  }

 private:
  // The sums since the last change of origin, into the row.
  void absorb() {
    if (!pending_) return;
    merge(row_, sums_.state(origin_, temperature_), temperature_, kReverse);
    origin_.centre = centre_near(row_);
    sums_ = Sums<kReverse>();
    pending_ = false;
  }

  // False, and nothing done, where the new largest logit carries so much of the row that its log ratio has to be near the
  // centre.
  bool raise_main_max(float to) {
    absorb();
    constexpr double many = 16;
    if (row_.S * std::exp((row_.main_max - to) / temperature_) < many) return false;
    rescale_main<double>(row_, to, temperature_, !kReverse);
    origin_.main_max = to;
    return true;
  }

  // The row's centre, in one float where the spread of the log ratios leaves room for its rounding.
  double centre_near(const RowState<double>& row) const {
    const double rounded = float(row.centre), error = (rounded - row.centre) / temperature_;
    return error * error * row.S <= row.A / 8 ? rounded : row.centre;
  }

  template <bool kFar, typename T>
  void add_about(const T* x, const T* y, int n, bool more, const Origin& origin, Sums<kReverse>& sums) const {
    if (temperature_ == 1 && float(origin.centre) == origin.centre) {
      add_tile<kReverse, true, kFar>(x, y, n, origin, scale_, inverse_temperature_, more, sums);
    } else {
      add_tile<kReverse, false, kFar>(x, y, n, origin, scale_, inverse_temperature_, more, sums);
    }
  }

  // False, and nothing added, where the tile is not far apart.
  template <typename T>
  bool add_far(const T* x, const T* y, int n, bool more) {
    Sums<kReverse> tile;
    add_about<true>(x, y, n, more, origin_, tile);
    if (!apart(tile.W.total(), tile.WD.total(), tile.V.total(), origin_, temperature_)) return false;
    sums_.add_far(tile);
    return true;
  }

  template <typename T>
  RowState<double> sums_about(const T* x, const T* y, int n, bool more, const Origin& origin) const {
    Sums<kReverse> sums;
    add_about<false>(x, y, n, more, origin, sums);
    return sums.state(origin, temperature_);
  }

  template <typename T>
  void new_centre(const T* x, const T* y, int n, bool more, float main_max, float other_max) {
    const int largest = tile_find(x, n, main_max);
    const double difference = double(to_float(x[largest])) - to_float(y[largest]);
    Origin origin;
    origin.centre = std::isfinite(difference) ? difference : 0.0;
    // where one model, or both, are -inf all over, any finite scale serves
    origin.main_max = main_max > -INFINITY ? main_max : other_max > -INFINITY ? other_max : 0.0f;
    origin.other_max = other_max > -INFINITY ? other_max : float(origin.main_max - origin.centre);
    RowState<double> tile = sums_about(x, y, n, more, origin);
    const double mean = tile.D / tile.S;
    far_ = apart(tile.S, tile.D, tile.other_S, origin, temperature_) && std::fabs(mean) < kFarthestMean;
    // the centre is an outlier to most of the tile, E[delta]^2 > 3/4 E[delta^2], or far from it
    if (!far_ && (tile.D * mean > 1.5 * tile.A || std::fabs(mean) > kSmallLogRatio)) {
      Origin about_mean = origin;
      about_mean.centre += temperature_ * mean;
      const RowState<double> again = sums_about(x, y, n, false, about_mean);
      // else the mean is an outlier too, dragged away by a column that the other model nearly excludes
      if (again.A < 0.5 * again.S) tile = again;
    }
    if (started_) {
      absorb();
      merge(row_, tile, temperature_, kReverse);
    } else {
      row_ = tile;
      started_ = true;
    }
    main_seen_ |= main_max > -INFINITY, other_seen_ |= other_max > -INFINITY;
    origin_ = {float(row_.main_max), float(row_.other_max), centre_near(row_)};
  }

  double temperature_;
  float inverse_temperature_;
  PowerScale scale_;
  RowState<double> row_;
  Origin origin_{};
  Sums<kReverse> sums_;
  bool started_ = false, pending_ = false;
  bool far_ = false;  // most of the last tile was large
  bool main_seen_ = false, other_seen_ = false;  // a logit above -inf
};

// One model's log-probabilities alone: the same tiles, S and H.
class LogprobReader {
 public:
  explicit LogprobReader(double temperature) : temperature_(temperature), scale_(temperature) {}

  template <typename T>
  void tile(const T* x, int n, bool more) {
    const float largest = tile_max(x, n);
    if (!seen_ || largest > max_) {
      absorb();
      max_ = largest > -INFINITY ? largest : 0.0f;
      seen_ = largest > -INFINITY;
    }
    const Vec m(max_);
    const auto add = [&](Vec x0, Vec& S, Vec& H) __attribute__((always_inline)) {
      Vec u = x0 - m;
      const Vec w = exp_scaled(u, scale_);
      S = S + w;
      H = fma(w, u, H);
    };
    int i = 0;
    for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes) {
      const int half = i + 2 * Vec::kLanes;
      if (more) prefetch(x + kTile<T> + i), prefetch(x + kTile<T> + half);
      Vec S0(0.0f), S1(0.0f), H0(0.0f), H1(0.0f), x0, x1;
      load_two(x + i, x0, x1);
      add(x0, S0, H0), add(x1, S1, H1);
      load_two(x + half, x0, x1);
      add(x0, S0, H0), add(x1, S1, H1);
      S_.add(S0), S_.add(S1), H_.add(H0), H_.add(H1);
    }
    for (; i < n; i += Vec::kLanes) {
      Vec S(0.0f), H(0.0f);
      add(load_first(x + i, n - i < Vec::kLanes ? n - i : Vec::kLanes, -INFINITY), S, H);
      S_.add(S), H_.add(H);
    }
  }

  // a RowState without another model
  RowState<double> state() {
    absorb();
    return row_;
  }

 private:
  void absorb() {
    rescale_main<double>(row_, max_, temperature_, true);
    row_.S += S_.total(), row_.H += H_.total() / temperature_;
    S_ = WideSum(), H_ = WideSum();
  }

  double temperature_;
  PowerScale scale_;
  RowState<double> row_;
  float max_ = 0;
  bool seen_ = false;
  WideSum S_, H_;
};

// Calls read(first, count, more) for the tiles of [begin, end).
template <typename T, typename Read>
inline void for_tiles(int64_t begin, int64_t end, const Read& read) {
  for (int64_t i = begin; i < end; i += kTile<T>) {
    const int n = int(end - i < kTile<T> ? end - i : kTile<T>);
    read(i, n, i + 2 * kTile<T> <= end);
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
