// Reads one row of two models' logits once from memory and makes its RowState.
//
// A tile of 4 KB of each model is passed over twice while it is in cache: for the two maxima, then for the sums. The
// maxima and the centre are carried from tile to tile, so most tiles only add to the running sums; a tile that holds a
// new largest main logit gets its own centre, x - y at that logit, and is merged.
//
// One exponential instead of two: where |delta| < 0.7 (nearly always, between a policy and its reference),
// e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls out of S, A and D. The second exponential is
// computed only in vectors that hold a larger |delta|. Where that was a quarter of a tile's, the next tile is taken
// without the branch; where it was most, as far apart: both exponentials for all of its lanes and no series. A tile that
// turns out not to be is passed over once more.
//
// A tile whose centre turns out to be far from its weighted mean (an outlier at the largest logit) would lose A and D to
// cancellation: it is passed over once more, still in cache, about the mean.
//
// Bytes read: 2 n sizeof(T). Nothing is written. Sums are floats over 16 elements of a vector lane, doubles beyond; over 8,
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

// The `count` elements that follow p by one tile.
template <typename T>
inline void prefetch_next_tile(const T* p, int count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(p + kTile<T> + i, 0, 3);
}

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

// About what a tile's sums are taken.
struct Origin {
  float main_max, other_max;
  double centre;
};

// A vector of columns: the logits, the main model's weights, the log ratios.
struct Columns {
  Vec x, y, w, delta;
};

// Of the columns with |delta| < 0.7, over a block of vectors. kReverse: the other model is the policy, so the entropy is its.
template <bool kReverse>
struct SmallSums {
  Vec D{0.0f}, A{0.0f}, H{0.0f};  // H of all columns, unless kReverse

  // `square` is delta^2
  void add(Vec w, Vec delta, Vec square, Vec from_other_max) {
    const Vec remainder = square * expm1_remainder(delta);
    D = fma(w, delta, D);
    A = fma(w, remainder, A);
    if constexpr (kReverse) H = fma(fma(w, remainder - delta, w), from_other_max, H);
  }
};

// Of vectors with others among them, whose two exponentials are both computed.
template <bool kReverse>
struct LargeSums {
  Vec W{0.0f}, WD{0.0f}, V{0.0f}, VH{0.0f};  // of the large columns: w, w delta, v, v (y - m')
  Vec S{0.0f};                               // of the small ones beside them: w,
  SmallSums<kReverse> beside;                // and the rest
  int pairs = 0;                             // of vectors with large columns
  bool other_misses = false;

  void add_all(const Columns& a, const Columns& b, Vec other_max, const PowerScale& scale) {
    const Mask none{};
    W = W + (a.w + b.w);
    V = V + (add<true>(a, none, other_max, scale) + add<true>(b, none, other_max, scale));
    ++pairs;
  }

  __attribute__((always_inline)) void add_mixed(const Columns& a, const Columns& b, Vec other_max, const PowerScale& scale) {
    const Vec zero(0.0f), limit(kSmallLogRatio);
    const Mask small_a = abs(a.delta) < limit, small_b = abs(b.delta) < limit;
    const auto add_small = [&](const Columns& c, Mask small, Vec w) {
      const Vec delta = select(small, c.delta, zero);
      // a weight of 0 and a logit of -inf would be NaN
      beside.add(w, delta, delta * delta, max(Vec(scale.lowest), c.y - other_max));
    };
    const Vec w_a = select(small_a, a.w, zero), w_b = select(small_b, b.w, zero);
    S = S + (w_a + w_b);
    W = W + (select(small_a, zero, a.w) + select(small_b, zero, b.w));
    add_small(a, small_a, w_a), add_small(b, small_b, w_b);
    V = V + (add<false>(a, small_a, other_max, scale) + add<false>(b, small_b, other_max, scale));
    pairs += !all(both(small_a, small_b));
  }

  // Out of the way of what most vectors need in registers.
  __attribute__((noinline)) void add_rare(const Columns& a, const Columns& b, Vec other_max, const PowerScale& scale) {
    add_mixed(a, b, other_max, scale);
  }

 private:
  // Returns v.
  template <bool kAll>
  Vec add(const Columns& c, Mask small, Vec other_max, const PowerScale& scale) {
    const Vec zero(0.0f);
    Vec from_other_max = c.y - other_max, w = c.w, delta = c.delta;
    Vec v = exp_scaled(from_other_max, scale);
    const Mask finite = abs(delta) < Vec(INFINITY);
    if (!all(finite)) {
      other_misses |= any(both(c.y == Vec(-INFINITY), Vec(-INFINITY) < c.x));
      delta = select(finite, delta, zero);
    }
    if constexpr (!kAll) w = select(small, zero, w), v = select(small, zero, v);
    WD = fma(w, delta, WD);
    if constexpr (kReverse) VH = fma(v, from_other_max, VH);
    return v;
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

  // The weights so far, which then start again at 0.
  void add_weights(LargeSums<kReverse>& large) {
    S.add(large.S), W.add(large.W), V.add(large.V);
    large.S = large.W = large.V = Vec(0.0f);
  }
  void add(const SmallSums<kReverse>& small) { D.add(small.D), A.add(small.A), H.add(small.H); }
  void add(const LargeSums<kReverse>& large) {
    D.add(large.beside.D), A.add(large.beside.A), WD.add(large.WD);
    if constexpr (kReverse) H.add(large.beside.H), VH.add(large.VH);
    large_pairs += large.pairs;
    other_misses |= large.other_misses;
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

// How a tile's log ratios are taken from its logits.
enum class Ratio {
  exact,   // ((x - y) - c)/T with what x - y rounds away
  direct,  // without it, which saves seven instructions of forty: see RowReader::centre_at
};

// Which of a tile's columns get two exponentials.
enum class Two {
  rare,   // the large ones of few vectors
  mixed,  // of all vectors, the large ones; the others have the series too, and no branch decides
  all,    // every column, and no series
};

// A function of its own, so that the compiler's appetite for inlining does not depend on how many variants there are.
template <bool kReverse, Ratio kRatio, Two kTwo, typename T>
__attribute__((noinline, flatten)) void add_tile(
    const T* x, const T* y, int n, const Origin& origin, const PowerScale& scale, float inverse_temperature, bool more,
    Sums<kReverse>& sums) {
  const float centre = float(origin.centre);
  const Vec m(origin.main_max), m_other(origin.other_max), inverse(inverse_temperature);
  const Vec c(centre), c_low(float(origin.centre - centre)), scaled_c(float(origin.centre * inverse_temperature));
  const Vec limit(kSmallLogRatio * kSmallLogRatio);
  const auto log_ratio = [&](Vec x0, Vec y0) __attribute__((always_inline)) {
    if constexpr (kRatio == Ratio::direct) return fms(x0 - y0, inverse, scaled_c);
    return centred_difference(x0, y0, c, c_low) * inverse;
  };
  // Returns w of the columns that `small` got.
  const auto add = [&](Vec x0, Vec y0, Vec x1, Vec y1, SmallSums<kReverse>& small, LargeSums<kReverse>& large)
                       __attribute__((always_inline)) {
    Vec u0 = x0 - m, u1 = x1 - m;
    const Vec w0 = exp_scaled(u0, scale), w1 = exp_scaled(u1, scale);
    const Vec d0 = log_ratio(x0, y0), d1 = log_ratio(x1, y1);
    if constexpr (!kReverse) {
      small.H = fma(w0, u0, small.H);
      small.H = fma(w1, u1, small.H);
    }
    if constexpr (kTwo == Two::rare) {
      const Vec square0 = d0 * d0, square1 = d1 * d1;
      if (__builtin_expect(all(both(square0 < limit, square1 < limit)), 1)) {
        small.add(w0, d0, square0, y0 - m_other);
        small.add(w1, d1, square1, y1 - m_other);
        return w0 + w1;
      }
      large.add_rare({x0, y0, w0, d0}, {x1, y1, w1, d1}, m_other, scale);
    } else if constexpr (kTwo == Two::mixed) {
      large.add_mixed({x0, y0, w0, d0}, {x1, y1, w1, d1}, m_other, scale);
    } else {
      large.add_all({x0, y0, w0, d0}, {x1, y1, w1, d1}, m_other, scale);
    }
    return Vec(0.0f);
  };
  const auto gather_weights = [&](Vec weights, LargeSums<kReverse>& large) __attribute__((always_inline)) {
    if constexpr (kTwo == Two::rare) sums.S.add(weights);
    if (kTwo != Two::rare || large.pairs) sums.add_weights(large);
  };
  const auto gather = [&](const SmallSums<kReverse>& small, const LargeSums<kReverse>& large) __attribute__((always_inline)) {
    sums.add(small);
    if (kTwo != Two::rare || large.pairs) sums.add(large);
  };
  constexpr int kStep = 4 * Vec::kLanes;
  int first = 0;
  for (; first + kBlock <= n; first += kBlock) {
    SmallSums<kReverse> small;
    LargeSums<kReverse> large;
    for (int i = first; i < first + kBlock;) {
      Vec weights(0.0f);
      for (const int end = i + 2 * kStep; i < end; i += kStep) {
        const int half = i + kStep / 2;
        if (more) prefetch_next_tile(x + i, kStep), prefetch_next_tile(y + i, kStep);
        Vec x0, x1, y0, y1;
        load_two(x + i, x0, x1), load_two(y + i, y0, y1);
        const Vec two = add(x0, y0, x1, y1, small, large);
        load_two(x + half, x0, x1), load_two(y + half, y0, y1);
        weights = weights + (two + add(x0, y0, x1, y1, small, large));
      }
      gather_weights(weights, large);
    }
    gather(small, large);
  }
  if (first == n) return;
  SmallSums<kReverse> small;
  LargeSums<kReverse> large;
  for (int i = first; i < n; i += Vec::kLanes) {
    const int left = n - i < Vec::kLanes ? n - i : Vec::kLanes;
    const Vec none(-INFINITY);
    const Vec weights = add(load_first(x + i, left, -INFINITY), load_first(y + i, left, -INFINITY), none, none, small, large);
    gather_weights(weights, large);
  }
  gather(small, large);
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
    if (two_ == Two::all && add_far(x, y, n, more)) return;
    const int before = sums_.large_pairs;
    two_ == Two::rare ? add_about<Two::rare>(x, y, n, more, origin_, ratio_, sums_)
                      : add_about<Two::mixed>(x, y, n, more, origin_, ratio_, sums_);
    const int large = (sums_.large_pairs - before) * (2 * Vec::kLanes);
    two_ = 4 * large < n ? Two::rare : 2 * large < n || far_tries_ <= 0 ? Two::mixed : Two::all;
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
    centre_at(row_.centre);
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

  // What x - y rounds away is 2^-24 (|centre| + |delta|) at most: nothing beside the log ratios where the centre is not much
  // larger than the weighted mean of |delta|, of which A / S is less than half while delta is small. Far apart, it must be
  // less than the rounding of exponentials.
  void centre_at(double centre) {
    constexpr double many = 16;
    const bool small = std::fabs(centre) * row_.S <= temperature_ * std::fmin(many * row_.A, row_.S);
    // a product rounded before the centre is subtracted would be that much worse
    ratio_ = small && (kFusedProducts || temperature_ == 1) ? Ratio::direct : Ratio::exact;
    origin_.centre = ratio_ == Ratio::direct ? double(float(centre * inverse_temperature_)) / inverse_temperature_ : centre;
  }

  template <Two kTwo, typename T>
  void add_about(const T* x, const T* y, int n, bool more, const Origin& origin, Ratio ratio, Sums<kReverse>& sums) const {
    const auto add = ratio == Ratio::direct ? add_tile<kReverse, Ratio::direct, kTwo, T> : add_tile<kReverse, Ratio::exact, kTwo, T>;
    add(x, y, n, origin, scale_, inverse_temperature_, more, sums);
  }

  // False, and nothing added, where the tile is not far apart.
  template <typename T>
  bool add_far(const T* x, const T* y, int n, bool more) {
    Sums<kReverse> tile;
    add_about<Two::all>(x, y, n, more, origin_, ratio_, tile);
    if (!apart(tile.W.total(), tile.WD.total(), tile.V.total(), origin_, temperature_)) return --far_tries_, false;
    sums_.add_far(tile);
    return true;
  }

  template <typename T>
  RowState<double> sums_about(const T* x, const T* y, int n, bool more, const Origin& origin) const {
    Sums<kReverse> sums;
    add_about<Two::rare>(x, y, n, more, origin, Ratio::exact, sums);
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
    const bool far = apart(tile.S, tile.D, tile.other_S, origin, temperature_) && std::fabs(mean) < kFarthestMean;
    if (far && far_tries_ > 0) two_ = Two::all;
    // the centre is an outlier to most of the tile, E[delta]^2 > 3/4 E[delta^2], or far from it
    if (!far && (tile.D * mean > 1.5 * tile.A || std::fabs(mean) > kSmallLogRatio)) {
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
    origin_.main_max = float(row_.main_max), origin_.other_max = float(row_.other_max);
    centre_at(row_.centre);
  }

  double temperature_;
  float inverse_temperature_;
  PowerScale scale_;
  RowState<double> row_;
  Origin origin_{};
  Ratio ratio_ = Ratio::exact;
  Sums<kReverse> sums_;
  bool started_ = false, pending_ = false;
  Two two_ = Two::rare;  // what the last tile would have needed
  int far_tries_ = 2;    // how often more a tile may turn out not to be apart
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
    const auto add = [&](Vec x0, Vec& H) __attribute__((always_inline)) {
      Vec u = x0 - m;
      const Vec w = exp_scaled(u, scale_);
      H = fma(w, u, H);
      return w;
    };
    constexpr int kStep = 4 * Vec::kLanes;
    int first = 0;
    for (; first + kBlock <= n; first += kBlock) {
      Vec H0(0.0f), H1(0.0f);
      for (int i = first; i < first + kBlock;) {
        Vec weights(0.0f);
        for (const int end = i + 2 * kStep; i < end; i += kStep) {
          if (more) prefetch_next_tile(x + i, kStep);
          Vec x0, x1, x2, x3;
          load_two(x + i, x0, x1), load_two(x + i + kStep / 2, x2, x3);
          const Vec w0 = add(x0, H0), w1 = add(x1, H1), w2 = add(x2, H0), w3 = add(x3, H1);
          weights = weights + ((w0 + w1) + (w2 + w3));
        }
        S_.add(weights);
      }
      H_.add(H0 + H1);
    }
    for (int i = first; i < n; i += Vec::kLanes) {
      Vec H(0.0f);
      S_.add(add(load_first(x + i, n - i < Vec::kLanes ? n - i : Vec::kLanes, -INFINITY), H));
      H_.add(H);
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
