// Reads one row of two models' logits once from memory and makes its RowState.
//
// A tile of 4 KB of each model is passed over twice while it is in cache: for the two maxima, then for the sums. The
// maxima and the centre are carried from tile to tile, so most tiles only add to the running sums; a tile that holds a
// new largest main logit gets its own centre, x - y at that logit, and is merged.
//
// One exponential instead of two: where |delta| < 0.7 (nearly always, between a policy and its reference),
// e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls out of S, A and D. The second exponential is
// computed only in blocks that hold a larger |delta|.
//
// A tile whose centre turns out to be far from its weighted mean (an outlier at the largest logit) would lose A and D to
// cancellation: it is passed over once more, still in cache, about the mean.
//
// Bytes read: 2 n sizeof(T). Nothing is written. Sums are floats over 16 elements of a vector lane, doubles beyond; over 4
// for S, where the largest logit's 1 would swallow more.
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
  bool any_large = false, other_misses = false;

  void add_small(Vec w, Vec delta, Vec from_other_max) {
    const Vec wd = w * delta;
    const Vec square = wd * delta, P = expm1_remainder(delta);
    S = S + w;
    D = D + wd;
    A = fma(square, P, A);
    if constexpr (kReverse) H = fma(fma(square, P, w - wd), from_other_max, H);
  }

  void add_any(Vec x, Vec y, Vec w, Vec delta, Mask small, Vec other_max, const PowerScale& scale) {
    const Vec zero(0.0f);
    Vec from_other_max = y - other_max;
    const Vec v = select(small, zero, exp_scaled(from_other_max, scale));
    const Mask finite = abs(delta) < Vec(INFINITY);
    if (!all(finite)) other_misses |= any(both(y == Vec(-INFINITY), Vec(-INFINITY) < x));
    add_small(select(small, w, zero), select(small, delta, zero), from_other_max);
    const Vec w_large = select(small, zero, w);
    W = W + w_large;
    WD = fma(w_large, select(finite, delta, zero), WD);
    V = V + v;
    if constexpr (kReverse) VH = fma(v, from_other_max, VH);
    any_large = true;
  }
};

template <bool kReverse>
struct Sums {
  WideSum S, D, A, H, W, WD, V, VH;
  bool other_misses = false;

  void add_weights(BlockSums<kReverse>& block) {
    S.add(block.S);
    block.S = Vec(0.0f);
    if (block.any_large) {
      W.add(block.W);
      block.W = Vec(0.0f);
    }
  }
  void add(BlockSums<kReverse>& block) {
    add_weights(block);
    D.add(block.D), A.add(block.A), H.add(block.H);
    if (block.any_large) {
      WD.add(block.WD), V.add(block.V);
      if constexpr (kReverse) VH.add(block.VH);
      other_misses |= block.other_misses;
    }
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

template <bool kReverse, typename T>
inline void add_tile(
    const T* x, const T* y, int n, const Origin& origin, const PowerScale& scale, float inverse_temperature, bool more,
    Sums<kReverse>& sums) {
  const float centre = float(origin.centre);
  const Vec m(origin.main_max), m_other(origin.other_max), inverse(inverse_temperature);
  const Vec c(centre), c_low(float(origin.centre - centre));
  const Vec limit(kSmallLogRatio);
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
    if (__builtin_expect(all(both(small0, small1)), 1)) {
      block.add_small(w0, d0, y0 - m_other);
      block.add_small(w1, d1, y1 - m_other);
    } else {
      block.add_any(x0, y0, w0, d0, small0, m_other, scale);
      block.add_any(x1, y1, w1, d1, small1, m_other, scale);
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
    if (!main_seen_ || main_max > origin_.main_max) return new_centre(x, y, n, more, main_max, other_max);
    if (other_max > origin_.other_max || (!other_seen_ && other_max > -INFINITY)) {
      absorb();
      rescale_other<double>(row_, other_max, temperature_, kReverse);
      origin_.other_max = other_max;
      other_seen_ = true;
    }
    add_tile(x, y, n, origin_, scale_, inverse_temperature_, more, sums_);
    pending_ = true;
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
    origin_.centre = row_.centre;
    sums_ = Sums<kReverse>();
    pending_ = false;
  }

  template <typename T>
  RowState<double> sums_about(const T* x, const T* y, int n, bool more, const Origin& origin) const {
    Sums<kReverse> sums;
    add_tile(x, y, n, origin, scale_, inverse_temperature_, more, sums);
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
    // the centre is an outlier to most of the tile, E[delta]^2 > 3/4 E[delta^2], or far from it
    if (tile.D * tile.D > 1.5 * tile.A * tile.S || std::fabs(tile.D) > kSmallLogRatio * tile.S) {
      Origin mean = origin;
      mean.centre += temperature_ * tile.D / tile.S;
      const RowState<double> again = sums_about(x, y, n, false, mean);
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
    origin_ = {float(row_.main_max), float(row_.other_max), row_.centre};
  }

  double temperature_;
  float inverse_temperature_;
  PowerScale scale_;
  RowState<double> row_;
  Origin origin_{};
  Sums<kReverse> sums_;
  bool started_ = false, pending_ = false;
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
