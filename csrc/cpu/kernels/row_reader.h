// Reads one row of two models' logits once from memory and makes its RowState.
//
// Nothing has to be known of a tile before it is added up: its sums are about an origin that the columns before it have
// given, scales m and m' for the two models' weights, near the logarithms of their sums so far, and a centre of the log
// ratios near their weighted mean. What a tile turns out to hold decides whether they stand. One that weighs more than four
// times all before it is passed over once more, still in cache, about its own largest logits and x - y at the main one's; so
// is the first. Where that centre is far from the tile's weighted mean (an outlier at the largest logit), A and D would be
// lost to cancellation, and the tile is taken about its mean.
//
// One exponential instead of two: where |delta| < 0.7 (nearly always, between a policy and its reference),
// e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls out of S, A and D. Which columns get a second exponential
// is decided tile by tile, from the last one, so that next to no branch is guessed wrongly: see Two. A tile that turns out to
// be unlike the last is passed over once more.
//
// Bytes read: 2 n sizeof(T). Nothing is written. Sums are floats over 16 elements of each of two vector lanes, doubles beyond;
// over 8, two by two, for S and S', where the largest logit's 1 would swallow more.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels/vec.h"
#include "math/log_ratio.h"
#include "math/row_state.h"

namespace lsc {
namespace LSC_ISA {

// Columns: 8 KB of each model, which leaves room in a 32 KB cache, and what is done once a tile is little beside it.
template <typename T>
constexpr int kTile = 8192 / sizeof(T);

// What is a page ahead, also beyond the end of a row: there the next one begins, or nothing is fetched.
template <typename T>
inline void prefetch(const T* p, int count) {
  constexpr int kLine = 64, kAhead = 4096;
  const auto first = reinterpret_cast<uintptr_t>(p) + kAhead;
  for (int i = 0; i < count * int(sizeof(T)); i += kLine) __builtin_prefetch(reinterpret_cast<const void*>(first + i), 0, 3);
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
  float main_scale = 0, other_scale = 0;
  double centre = 0;
  double to_other = 1;  // brings sums about main_scale and the centre to other_scale

  Origin() = default;
  Origin(float main_scale, float other_scale, double centre, double temperature)
      : main_scale(main_scale), other_scale(other_scale), centre(centre),
        to_other(std::exp(scale_distance<double>(main_scale, other_scale, centre, temperature))) {}

  // Whether a column that is small about the centre and has weight in the other model has some in the main one, from which the
  // other's follows. Not so where the other excludes what carries the main one: there nothing counts as small.
  bool level() const { return to_other < 1e9; }
};

// A vector of columns: the logits, the main model's from its scale, its weights, the log ratios.
struct Columns {
  Vec x, y, from_main, w, delta;
};

// Every lane, where others give a Mask.
struct Everywhere {};
inline Vec add_where(Everywhere, Vec sum, Vec a) { return sum + a; }

// Of the columns with |delta| < 0.7, over a block of vectors. kReverse: the other model is the policy, so the entropy is its.
template <bool kReverse>
struct SmallSums {
  Vec D{0.0f}, A{0.0f}, H{0.0f};  // H of all columns, unless kReverse

  // `remainder` is expm1_remainder(delta)
  template <typename Where>
  void add(Where where, Vec w, Vec delta, Vec remainder, Vec from_other) {
    const Vec w_delta = w * delta, w_square = w_delta * delta;
    D = add_where(where, D, w_delta);
    if constexpr (kReverse) {
      const Vec of_A = w_square * remainder;
      A = add_where(where, A, of_A);
      H = add_where(where, H, ((w - w_delta) + of_A) * from_other);
    } else if constexpr (std::is_same_v<Where, Everywhere>) {
      A = fma(w_square, remainder, A);
    } else {
      A = add_where(where, A, w_square * remainder);
    }
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

  __attribute__((always_inline)) void add(const Columns& a, const Columns& b, Vec other_scale, Vec limit, const PowerScale& scale) {
    const Weights of_a = add(a, other_scale, limit, scale), of_b = add(b, other_scale, limit, scale);
    const Mask large_a = complement(of_a.small), large_b = complement(of_b.small);
    // two by two, as the small ones' elsewhere
    S = S + add_where(of_b.small, only(of_a.small, of_a.w), of_b.w);
    W = W + add_where(large_b, only(large_a, of_a.w), of_b.w);
    V = V + add_where(large_b, only(large_a, of_a.v), of_b.v);
    pairs += !all(both(of_a.small, of_b.small));
  }

 private:
  struct Weights {
    Vec w, v;
    Mask small;
  };

  __attribute__((always_inline)) Weights add(const Columns& c, Vec other_scale, Vec limit, const PowerScale& scale) {
    const Mask small = abs(c.delta) < limit, large = complement(small);
    Vec from_other = c.y - other_scale, w = c.w, delta = c.delta;
    Vec v = exp_within(from_other, scale);
    const Mask finite = abs(delta) < Vec(INFINITY);
    if (__builtin_expect(!all(finite), 0)) {
      other_misses |= any(both(c.y == Vec(-INFINITY), Vec(-INFINITY) < c.x));
      other_misses |= any(both(delta == Vec(INFINITY), Vec(0.0f) < w));
      delta = select(finite, delta, Vec(0.0f));
      w = weight(c.x, w), v = weight(c.y, v);
    }
    beside.add(small, w, delta, expm1_remainder(delta), from_other);
    WD = add_where(large, WD, w * delta);
    if constexpr (kReverse) VH = add_where(large, VH, v * from_other);
    return {w, v, small};
  }

  // 0 of a logit of -inf, NaN of +inf and NaN.
  static Vec weight(Vec logit, Vec finite) {
    const Vec other = select(logit == Vec(-INFINITY), Vec(0.0f), Vec(NAN));
    return select(abs(logit) < Vec(INFINITY), finite, other);
  }
};

constexpr int kBlock = 16 * Vec::kLanes;

// How a tile's log ratios are taken from its logits.
enum class Ratio {
  exact,   // ((x - y) - c)/T with what x - y rounds away
  direct,  // without it, which saves seven instructions of thirty: see RowReader::small_centre
};

// Which of a tile's columns get two exponentials.
enum class Two {
  none,   // where any is not finite or has |delta| >= 0.5, the sums are no good
  rare,   // the large ones of few vectors, told by a branch
  mixed,  // of all vectors, the large ones; the others have the series too, and no branch decides
  all,    // every column, and no series; all must be finite
};

struct Tile {
  RowState<double> row, small;  // of all columns; S, D and A of the small ones
  bool series = true;           // for the small ones; where Two::all, there are none
  float largest = 0;            // |delta|, where Two::none
  int large_pairs = 0;          // of vectors with large columns

  // What its KL is left of: the series, the weights of the large columns in both models, w delta.
  double cost() const {
    const double W = row.S - small.S, V = row.B - (small.A - small.D) + W;
    return small.A / row.S + W / row.S + V / (row.S + row.B) + std::fabs(row.D - small.D) / row.S;
  }
  // Whether most of the weight is far from the centre.
  bool about_outlier() const { return series && small.S < 0.5 * row.S; }
};

// Of a tile, in doubles.
struct TileSums {
  WideSum S, D, A, H;     // of the columns with one exponential
  WideSum W, WD, V, VH;   // of those with two: w, w delta, v, v (y - m')

  template <bool kReverse>
  void total(const Origin& origin, const PowerScale& scale, bool has_two, Tile& tile) const {
    RowState<double>&row = tile.row, &small = tile.small;
    row.main_scale = small.main_scale = origin.main_scale, row.centre = small.centre = origin.centre, row.other_scale = origin.other_scale;
    row.S = small.S = S.total(), row.D = small.D = D.total(), row.A = small.A = A.total(), row.B = row.A - row.D;
    row.other_S = scaled(row.S + row.B, origin.to_other), row.H = H.total();
    // without weight in the other model, its logits may be so far below the scale that a float sum of them is infinite
    if constexpr (kReverse) row.H = origin.to_other == 0 ? 0 : scaled(row.H, origin.to_other);
    if (has_two) {
      const double w = W.total(), wd = WD.total(), v = V.total();
      const double expm1 = scaled(v, 1 / origin.to_other) - w;  // sum w expm1(-delta)
      row.S += w, row.D += wd, row.A += expm1 + wd, row.B += expm1, row.other_S += v;
      if constexpr (kReverse) row.H += VH.total();
    }
    row.H *= scale.inverse;
  }
};

// A function of its own, so that the compiler's appetite for inlining does not depend on how many variants there are.
template <bool kReverse, Ratio kRatio, Two kTwo, typename T>
__attribute__((noinline, flatten)) void add_tile(
    const T* x, const T* y, int n, const Origin& origin, const PowerScale& scale, Tile& tile) {
  const float centre = float(origin.centre);
  const Vec m(origin.main_scale), m_other(origin.other_scale), inverse(scale.inverse);
  const Vec c(centre), c_low(float(origin.centre - centre)), scaled_c(float(origin.centre * scale.inverse));
  TileSums sums;
  Vec largest(0.0f);
  int large_pairs = 0;
  bool other_misses = false;
  // of a block of vectors; the weights, of half of one
  SmallSums<kReverse> small;
  LargeSums<kReverse> large;
  Vec weights(0.0f), other_weights(0.0f);

  const auto columns = [&](Vec x0, Vec y0) __attribute__((always_inline)) {
    Vec u = x0 - m;
    const Vec w = exp_within(u, scale);
    if constexpr (kRatio == Ratio::direct) return Columns{x0, y0, u, w, fms(x0 - y0, inverse, scaled_c)};
    return Columns{x0, y0, u, w, centred_difference(x0, y0, c, c_low) * inverse};
  };
  const auto add_entropy = [&](const Columns& a, const Columns& b) __attribute__((always_inline)) {
    if constexpr (!kReverse) small.H = fma(b.w, b.from_main, fma(a.w, a.from_main, small.H));
  };
  const auto add_small = [&](const Columns& a) __attribute__((always_inline)) {
    const Vec remainder = kTwo == Two::none ? expm1_remainder_of_smaller(a.delta) : expm1_remainder(a.delta);
    small.add(Everywhere{}, a.w, a.delta, remainder, a.y - m_other);
  };
  // Without the series: D is of all columns, and so are the weights.
  const auto other_weight = [&](const Columns& a) __attribute__((always_inline)) {
    Vec from_other = a.y - m_other;
    const Vec v = exp_within(from_other, scale);
    small.D = fma(a.w, a.delta, small.D);
    if constexpr (kReverse) small.H = fma(v, from_other, small.H);
    return v;
  };
  // Returns whether they are added; else they are for the sums of large columns.
  const auto add = [&](const Columns& a, const Columns& b) __attribute__((always_inline)) {
    if constexpr (kTwo == Two::none) {
      largest = max_abs(max_abs(largest, a.delta), b.delta);
    } else if constexpr (kTwo == Two::rare) {
      if (!__builtin_expect(all(max_abs(a.delta, b.delta) < Vec(kSmallLogRatio)), 1)) return false;
    } else if constexpr (kTwo == Two::mixed) {
      return false;
    }
    if constexpr (kTwo == Two::all) {
      other_weights = other_weights + (other_weight(a) + other_weight(b));
    } else {
      add_small(a), add_small(b);
    }
    weights = weights + (a.w + b.w);
    return true;
  };
  const auto gather_large_weights = [&]() __attribute__((always_inline)) {
    sums.S.add(large.S), sums.W.add(large.W), sums.V.add(large.V);
    large.S = large.W = large.V = Vec(0.0f);
  };
  const auto gather_weights = [&](bool has_large) __attribute__((always_inline)) {
    if constexpr (kTwo == Two::none || kTwo == Two::rare) sums.S.add(weights);
    if constexpr (kTwo == Two::all) sums.W.add(weights), sums.V.add(other_weights);
    weights = other_weights = Vec(0.0f);
    if (has_large) gather_large_weights();
  };
  const auto gather = [&](bool has_large) __attribute__((always_inline)) {
    if constexpr (kReverse && kTwo == Two::all) sums.VH.add(small.H); else sums.H.add(small.H);
    if constexpr (kTwo == Two::all) sums.WD.add(small.D); else sums.D.add(small.D), sums.A.add(small.A);
    small = SmallSums<kReverse>();
    if (!has_large) return;
    gather_large_weights();
    sums.D.add(large.beside.D), sums.A.add(large.beside.A), sums.WD.add(large.WD);
    if constexpr (kReverse) sums.H.add(large.beside.H), sums.VH.add(large.VH);
    large_pairs += large.pairs;
    other_misses |= large.other_misses;
    large = LargeSums<kReverse>();
  };
  const auto has_large = [&] { return kTwo == Two::mixed || (kTwo == Two::rare && large.pairs > 0); };
  const Vec limit(origin.level() ? kSmallLogRatio : 0.0f);
  const auto add_large = [&](const Columns& a, const Columns& b) __attribute__((always_inline)) { large.add(a, b, m_other, limit, scale); };

  constexpr int kPair = 2 * Vec::kLanes;
  const auto pair_at = [&](int first, Columns& a, Columns& b) __attribute__((always_inline)) {
    Vec x0, x1, y0, y1;
    load_two(x + first, x0, x1), load_two(y + first, y0, y1);
    a = columns(x0, y0), b = columns(x1, y1);
  };
  int i = 0;
  for (int block = 0; block + kBlock <= n; block = i) {
    unsigned later = 0;  // pairs that are left for the end of the block: what they need would take the others' registers
    while (i < block + kBlock) {
#pragma GCC unroll 1
      for (const int half = i + kBlock / 2; i < half; i += kPair) {
        prefetch(x + i, kPair), prefetch(y + i, kPair);
        Columns a, b;
        pair_at(i, a, b);
        add_entropy(a, b);
        if (add(a, b)) continue;
        if constexpr (kTwo == Two::mixed) add_large(a, b);
        if constexpr (kTwo == Two::rare) later |= 1u << (i - block) / kPair;
      }
      gather_weights(has_large());
    }
    if constexpr (kTwo == Two::rare) {
      for (; later; later &= later - 1) {
        Columns a, b;
        pair_at(block + __builtin_ctz(later) * kPair, a, b);
        add_large(a, b);
      }
    }
    gather(has_large());
  }
  if (i < n) {
    // what there is no column for is -inf in both models, which only the sums of large columns can tell
    const auto last = [&](int first) {
      const int left = std::clamp(n - first, 0, Vec::kLanes);
      return columns(load_first(x + first, left, -INFINITY), load_first(y + first, left, -INFINITY));
    };
    const Columns none = last(n);
    // one vector at a time: all of a short row is here, and a float sum beside its largest weight would cost digits
    for (; i < n; i += Vec::kLanes) {
      const Columns a = last(i);
      add_entropy(a, none);
      add_large(a, none);
      gather_weights(true);
    }
    gather(true);
  }

  tile.series = kTwo != Two::all;
  tile.largest = kTwo == Two::none ? max_lane(largest) : 0.0f;
  tile.large_pairs = large_pairs;
  tile.row.other_misses = other_misses;
  sums.total<kReverse>(origin, scale, kTwo == Two::mixed || kTwo == Two::all || large_pairs > 0, tile);
}

// Whether the two models, each over a tile's columns alone, differ so much that the rounding of exponentials is nothing
// beside it: KL = E[delta] + log(sum v / sum w), in units of one scale.
inline bool apart(const RowState<double>& tile, double temperature) {
  const double distance = scale_distance(tile.main_scale, tile.other_scale, tile.centre, temperature);
  const double kl = tile.D / tile.S + std::log(tile.other_S / tile.S) - distance;
  return kl > 0.1 && kl < INFINITY;
}

// A tile about the scale of the tiles before it must not weigh more than so many times all of them.
constexpr double kOutweighs = 4;
// A row that weighs more than this, in units of its scale, gets another one.
constexpr double kHeavy = 16;

// A scale with a row's sum about it near 1, of which a float is exact enough: the sum takes up what it rounds.
inline float scale_of(double max, double S, double temperature) { return float(max + temperature * std::log(S)); }

// x is the main model, y the other; kReverse: the policy is the other.
template <bool kReverse>
class RowReader {
 public:
  explicit RowReader(double temperature) : temperature_(temperature), scale_(temperature) {}

  // The next n <= kTile<T> pairs of the row.
  template <typename T>
  void tile(const T* x, const T* y, int n) {
    if (!(row_.S > 0 && row_.other_S > 0)) return begin_anew(x, y, n);
    Tile tile;
    add(x, y, n, origin_, ratio_, tile);
    const bool fits = tile.row.S <= kOutweighs * row_.S && tile.row.other_S <= kOutweighs * row_.other_S && std::isfinite(tile.row.D);
    if (!fits) return begin_anew(x, y, n);
    // most of the row is far from the centre, and so is this tile; one of little weight is no place for another
    const bool outlier = small_.S + tile.small.S < 0.5 * (row_.S + tile.row.S) && tile.about_outlier() && tile.row.S > 1e-3 * row_.S;
    // what series and roundings make of the distance to the centre would tell beside the weight before
    const bool elsewhere = tile.row.S > 0.25 * row_.S && off_centre(tile.small);
    if (outlier || elsewhere) {
      go_over_again(x, y, n, origin_, tile);
      include(outlier || tile.row.S > row_.S ? tile.row.centre : row_.centre, tile);
      settle();
    } else {
      accumulate(row_, tile.row), accumulate(small_, tile.small);
      if (off_centre(small_) || row_.S > kHeavy || row_.other_S > kHeavy) settle();
    }
    if (!small_centre()) ratio_ = Ratio::exact;
  }

  // Of all tiles so far.
  const RowState<double>& state() const { return row_; }

 private:
  template <Two kTwo, typename T>
  void add_as(const T* x, const T* y, int n, const Origin& origin, Ratio ratio, Tile& tile) const {
    const auto add = ratio == Ratio::direct ? add_tile<kReverse, Ratio::direct, kTwo, T> : add_tile<kReverse, Ratio::exact, kTwo, T>;
    add(x, y, n, origin, scale_, tile);
  }

  // In the way that the last tile asked for; where this one is unlike it, in one that serves any.
  template <typename T>
  void add(const T* x, const T* y, int n, const Origin& origin, Ratio ratio, Tile& tile) {
    if (!origin.level()) return add_as<Two::mixed>(x, y, n, origin, ratio, tile);
    if (two_ == Two::none) {
      add_as<Two::none>(x, y, n, origin, ratio, tile);
      if (tile.largest < kSmallerLogRatio && std::isfinite(tile.row.D)) return;
      two_ = Two::rare, --near_tries_;
    } else if (two_ == Two::all) {
      add_as<Two::all>(x, y, n, origin, ratio, tile);
      if (apart(tile.row, temperature_)) return;
      two_ = Two::mixed, --far_tries_;
    }
    if (two_ == Two::rare) {
      add_as<Two::rare>(x, y, n, origin, ratio, tile);
      // a NaN beside a small log ratio goes unnoticed by the branch
      if (!std::isfinite(tile.row.D)) two_ = Two::mixed, finite_ = false;
    }
    if (two_ == Two::mixed) add_as<Two::mixed>(x, y, n, origin, ratio, tile);
    choose(tile.large_pairs, n);
  }

  // How the next tile is added, from how many pairs of vectors of this one had large columns.
  void choose(int large_pairs, int n) {
    const int large = large_pairs * (2 * Vec::kLanes);
    if (!finite_ || 4 * large >= n) {
      two_ = finite_ && 2 * large >= n && far_tries_ > 0 ? Two::all : Two::mixed;
    } else {
      two_ = large == 0 && near_tries_ > 0 ? Two::none : Two::rare;
    }
  }

  // A tile about its own largest logits, merged with those before it.
  template <typename T>
  void begin_anew(const T* x, const T* y, int n) {
    const float main_max = tile_max(x, n), other_max = tile_max(y, n);
    const int largest = tile_find(x, n, main_max);
    // where one model, or both, are -inf all over, any finite scale serves
    const float m = main_max > -INFINITY ? main_max : other_max > -INFINITY ? other_max : 0.0f;
    const float m_other = other_max > -INFINITY ? other_max : m;
    const double difference = double(to_float(x[largest])) - to_float(y[largest]);
    const double centre = std::fabs(difference) < kLargestCentre ? difference : double(m) - m_other;
    const Origin origin(m, m_other, centre, temperature_);
    Tile tile;
    add_as<Two::mixed>(x, y, n, origin, Ratio::exact, tile);
    choose(tile.large_pairs, n);
    if (tile.about_outlier() || off_centre(tile.small)) go_over_again(x, y, n, origin, tile);
    bring_to_common_scales(row_, tile.row, temperature_, kReverse);
    rescale_main<double>(small_, row_.main_scale, temperature_, false);
    rescale_main<double>(tile.small, row_.main_scale, temperature_, false);
    const bool of_row = !all_missing(row_) && (row_.S > tile.row.S || all_missing(tile.row));
    include(of_row ? row_.centre : tile.row.centre, tile);
    settle();
  }

  // About the mean of what most of the tile's weight is, unless fewer of its columns are alike there.
  template <typename T>
  void go_over_again(const T* x, const T* y, int n, const Origin& origin, Tile& tile) {
    const RowState<double>&row = tile.row, &small = tile.small;
    const double away = tile.about_outlier() ? (row.D - small.D) / (row.S - small.S) : small.D / small.S;
    if (std::fabs(away) < kLargestCentre) {
      const Origin there(origin.main_scale, origin.other_scale, origin.centre + temperature_ * away, temperature_);
      Tile again;
      add_as<Two::mixed>(x, y, n, there, Ratio::exact, again);
      if (again.small.S >= 0.999 * small.S || (again.small.S >= 0.5 * row.S && 2 * again.cost() < tile.cost())) tile = again;
    }
    choose(tile.large_pairs, n);
  }

  // The tile into the row, about a centre that one of them has; what was small about one far from it is no more.
  void include(double centre, Tile& tile) {
    for (RowState<double>* part : {&small_, &tile.small}) {
      if (std::fabs(part->centre - centre) > kSmallLogRatio * temperature_) part->S = part->D = part->A = part->B = 0;
    }
    accumulate_about(centre, row_, tile.row, temperature_);
    accumulate_about(centre, small_, tile.small, temperature_);
  }

  // Whether A and D are mostly the distance of the centre from the weighted mean: E[delta]^2 > 3/4 E[delta^2].
  static bool off_centre(const RowState<double>& row) { return row.D * row.D > 1.5 * row.A * row.S; }

  // The origin of the tiles to come.
  void settle() {
    if (row_.S > kHeavy) {
      const double to = scale_of(row_.main_scale, row_.S, temperature_);
      rescale_main<double>(row_, to, temperature_, !kReverse), rescale_main<double>(small_, to, temperature_, false);
    }
    if (row_.other_S > kHeavy) rescale_other<double>(row_, scale_of(row_.other_scale, row_.other_S, temperature_), temperature_, kReverse);
    if (small_.S > 0) move_centre(row_.centre + temperature_ * (small_.D / small_.S));
    // a product rounded before the centre is subtracted would be that much worse
    ratio_ = small_centre() && (kFusedProducts || temperature_ == 1) ? Ratio::direct : Ratio::exact;
    if (ratio_ == Ratio::direct) move_centre(double(float(row_.centre * scale_.inverse)) / scale_.inverse);
    origin_ = Origin(float(row_.main_scale), float(row_.other_scale), row_.centre, temperature_);
  }

  void move_centre(double to) { recentre<double>(row_, to, temperature_), recentre<double>(small_, to, temperature_); }

  // What x - y rounds away is 2^-24 (|centre| + |delta|) at most: nothing beside the log ratios where the centre is not much
  // larger than the weighted mean of |delta|, of which A / S is less than half while delta is small. Far apart, it must be
  // less than the rounding of exponentials.
  bool small_centre() const {
    constexpr double many = 16;
    const RowState<double>& most = small_.S < 0.5 * row_.S ? row_ : small_;
    return std::fabs(row_.centre) * most.S <= many * temperature_ * std::fmin(most.A, most.S);
  }

  double temperature_;
  PowerScale scale_;
  RowState<double> row_, small_;  // of all columns; S, D and A of those that were small
  Origin origin_;                 // row_'s
  Ratio ratio_ = Ratio::exact;
  Two two_ = Two::rare;
  int near_tries_ = 2, far_tries_ = 2;  // how often more a tile may turn out not to be near, or apart
  bool finite_ = true;                  // no log ratio so far that is not
};

// One model's log-probabilities alone: the same tiles, S and H.
class LogprobReader {
 public:
  explicit LogprobReader(double temperature) : temperature_(temperature), scale_(temperature) {}

  template <typename T>
  void tile(const T* x, int n) {
    if (row_.S > 0 && finite_ && n % Vec::kLanes == 0) {
      const RowState<double> tile = add<true>(x, n, float(row_.main_scale));
      const bool fits = tile.S <= kOutweighs * row_.S;
      finite_ = !fits || std::isfinite(tile.H);
      if (fits && finite_) {
        row_.S += tile.S, row_.H += tile.H;
        if (row_.S > kHeavy) rescale_main<double>(row_, scale_of(row_.main_scale, row_.S, temperature_), temperature_, true);
        return;
      }
    }
    const float largest = tile_max(x, n);
    merge(row_, add<false>(x, n, largest > -INFINITY ? largest : 0.0f), temperature_, false);
  }

  // a RowState without another model
  const RowState<double>& state() const { return row_; }

 private:
  // About the tile's largest logit, or any number where all are -inf. kAny: about a number near the log-sum of the row; H is
  // finite then only where all logits are, and n is whole vectors.
  template <bool kAny, typename T>
  __attribute__((noinline, flatten)) RowState<double> add(const T* x, int n, float scale) const {
    const Vec m(scale);
    WideSum S, H;
    const auto add = [&](Vec x0, Vec& H_of) __attribute__((always_inline)) {
      const Vec from_scale = x0 - m;
      Vec u = from_scale;
      const Vec w = kAny ? exp_within(u, scale_) : exp_scaled(u, scale_);
      H_of = fma(w, kAny ? from_scale : u, H_of);
      return w;
    };
    constexpr int kStep = 4 * Vec::kLanes;
    int i = 0;
    while (i + kBlock <= n) {
      Vec H0(0.0f), H1(0.0f);
      for (const int block = i + kBlock; i < block;) {
        Vec weights(0.0f);
        for (const int half = i + kBlock / 2; i < half; i += kStep) {
          prefetch(x + i, kStep);
          Vec x0, x1, x2, x3;
          load_two(x + i, x0, x1), load_two(x + i + kStep / 2, x2, x3);
          const Vec w0 = add(x0, H0), w1 = add(x1, H1), w2 = add(x2, H0), w3 = add(x3, H1);
          weights = weights + ((w0 + w1) + (w2 + w3));
        }
        S.add(weights);
      }
      H.add(H0 + H1);
    }
    for (; i < n; i += Vec::kLanes) {
      Vec last(0.0f);
      S.add(add(load_first(x + i, std::min(n - i, Vec::kLanes), -INFINITY), last));
      H.add(last);
    }
    RowState<double> tile;
    tile.main_scale = scale, tile.S = S.total(), tile.H = H.total() * scale_.inverse;
    return tile;
  }

  double temperature_;
  PowerScale scale_;
  RowState<double> row_;
  bool finite_ = true;  // no logit so far that is not
};

// Calls read(first, count) for the tiles of [begin, end). The first ones are short: they are passed over more than once.
template <typename T, typename Read>
inline void for_tiles(int64_t begin, int64_t end, const Read& read) {
  for (int64_t i = begin, n, most = kTile<T> / 8; i < end; i += n, most = std::min<int64_t>(2 * most, kTile<T>)) {
    n = std::min(most, end - i);
    read(i, int(n));
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
