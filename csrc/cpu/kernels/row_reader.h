// Reads one row of policy and reference logits once from memory and makes its RowState.
//
// A tile of 4 KB of each model is passed over twice while it is in cache: for the two maxima, then for the sums. Two maxima and
// the centre are carried from tile to tile, so most tiles only add to the running sums; a tile that holds a new largest
// policy logit gets its own centre, x - y at that logit, and is merged.
//
// One exponential instead of two: where |delta| < 0.7 (nearly always, between a policy and its reference),
// e^(y-m') = e^(m-m'-c) w e^(-delta), so the reference's sum falls out of S, A and D. The second exponential is computed
// only in blocks that hold a larger |delta|.
//
// A tile whose own centre turns out to be far from its weighted mean (an outlier at the largest logit) would lose A to
// cancellation: it is passed over once more, still in cache, about the mean.
//
// Bytes read: 2 n sizeof(T). Nothing is written. Sums are floats per vector lane within a tile, doubles across tiles.
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

struct Units {
  double temperature;
  float inverse, log2e;  // 1/T and log2(e)/T

  explicit Units(double t) : temperature(t), inverse(float(1 / t)), log2e(float(1.4426950408889634074 / t)) {}
};

template <typename T>
inline float tile_max(const T* x, int n) {
  Vec a(-INFINITY), b(-INFINITY), c(-INFINITY), d(-INFINITY);
  int i = 0;
  for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes) {
    a = max(load(x + i), a);
    b = max(load(x + i + Vec::kLanes), b);
    c = max(load(x + i + 2 * Vec::kLanes), c);
    d = max(load(x + i + 3 * Vec::kLanes), d);
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
  __builtin_prefetch(p, 0, 2);
}

// The sums of a tile about given maxima and a given centre.
template <bool kReverse>
struct TileSums {
  // lanes with |delta| < 0.7
  Vec S{0.0f}, D{0.0f}, A{0.0f}, R{0.0f};
  // the others; R and VD serve the reverse KL
  Vec W{0.0f}, WD{0.0f}, V{0.0f}, VD{0.0f};
  Vec H{0.0f};
  bool ref_misses = false, policy_misses = false;

  void add_small(Vec w, Vec delta) {
    const Vec wd = w * delta;
    const Vec P = expm1_remainder(delta);
    S = S + w;
    D = D + wd;
    A = fma(wd * delta, P, A);
    // expm1(delta) - delta weighted with e^(-delta), = delta^2 (1 - P (1 + delta))
    if constexpr (kReverse) R = fma(wd * delta, Vec(1.0f) - fma(P, delta, P), R);
  }

  void add_any(Vec x, Vec y, Vec w, Vec delta, Mask small, Vec ref_max, Vec log2e) {
    const Vec zero(0.0f), infinity(INFINITY);
    const Vec v = select(small, zero, exp2((y - ref_max) * log2e).value);
    const Mask finite = abs(delta) < infinity;
    if (!all(finite)) {
      const Vec lost(-INFINITY);
      ref_misses |= any(both(y == lost, lost < x));
      policy_misses |= any(both(x == lost, lost < y));
    }
    add_small(select(small, w, zero), select(small, delta, zero));
    const Vec w_large = select(small, zero, w);
    const Vec delta_large = select(finite, delta, zero);
    W = W + w_large;
    WD = fma(w_large, delta_large, WD);
    V = V + v;
    if constexpr (kReverse) VD = fma(v, delta_large, VD);
  }

  // to_ref = e^((m - c - m')/T) brings the small lanes' sums, which are about m and c, to the reference's maximum.
  RowState<double> state(float policy_max, float ref_max, float centre, double to_ref) const {
    constexpr double ln2 = 0.69314718055994530942;
    const double s = sum(S), d = sum(D), a = sum(A), w = sum(W), wd = sum(WD), v = sum(V);
    const double r = kReverse ? sum(R) : 0, vd = kReverse ? sum(VD) : 0;
    RowState<double> out;
    out.policy = {policy_max, s + w, d + wd, a + scaled(v, 1 / to_ref) - w + wd};
    out.ref = {ref_max, scaled(s + a - d, to_ref) + v, scaled(a + r - d, to_ref) - vd, scaled(r + w, to_ref) - v - vd};
    out.H = ln2 * sum(H);
    out.centre = centre;
    out.ref_misses = ref_misses, out.policy_misses = policy_misses;
    return out;
  }
};

template <bool kReverse, typename T>
inline TileSums<kReverse> tile_sums(
    const T* x, const T* y, int n, float policy_max, float ref_max, float centre, const Units& units, bool more) {
  const Vec m(policy_max), m_ref(ref_max), c(centre), log2e(units.log2e), inverse(units.inverse);
  const Vec limit(kSmallLogRatio);
  TileSums<kReverse> sums;
  const auto add = [&](Vec x0, Vec y0, Vec x1, Vec y1) __attribute__((always_inline)) {
    const Exp2 w0 = exp2((x0 - m) * log2e), w1 = exp2((x1 - m) * log2e);
    const Vec d0 = centred_difference(x0, y0, c) * inverse, d1 = centred_difference(x1, y1, c) * inverse;
    const Mask small0 = abs(d0) < limit, small1 = abs(d1) < limit;
    sums.H = fma(w0.value, w0.exponent, sums.H);
    sums.H = fma(w1.value, w1.exponent, sums.H);
    if (__builtin_expect(all(both(small0, small1)), 1)) {
      sums.add_small(w0.value, d0);
      sums.add_small(w1.value, d1);
    } else {
      sums.add_any(x0, y0, w0.value, d0, small0, m_ref, log2e);
      sums.add_any(x1, y1, w1.value, d1, small1, m_ref, log2e);
    }
  };
  constexpr int kStep = 2 * Vec::kLanes;
  int i = 0;
  for (; i + kStep <= n; i += kStep) {
    if (more) prefetch(x + kTile<T> + i), prefetch(y + kTile<T> + i);
    add(load(x + i), load(y + i), load(x + i + Vec::kLanes), load(y + i + Vec::kLanes));
  }
  for (; i < n; i += Vec::kLanes) {
    const int left = n - i < Vec::kLanes ? n - i : Vec::kLanes;
    const Vec none(-INFINITY);
    add(load_first(x + i, left, -INFINITY), load_first(y + i, left, -INFINITY), none, none);
  }
  return sums;
}

class RowReader {
 public:
  explicit RowReader(double temperature) : units_(temperature) {}

  // The next n <= kTile<T> pairs of the row. `more`: a whole further tile follows in memory, worth fetching ahead.
  template <bool kReverse, typename T>
  void tile(const T* x, const T* y, int n, bool more) {
    const float policy_max = tile_max(x, n), ref_max = tile_max(y, n);
    if (row_.policy.S == 0 || policy_max > float(row_.policy.max)) {
      return new_centre<kReverse>(x, y, n, more, policy_max, ref_max);
    }
    if (ref_max > float(row_.ref.max) || (row_.ref.S == 0 && ref_max > -INFINITY)) {
      row_.ref.rescale(ref_max, 1 / units_.temperature);
    }
    add(sums_about<kReverse>(x, y, n, more, float(row_.policy.max), float(row_.ref.max), float(row_.centre)));
  }

  const RowState<double>& state() const { return row_; }

 private:
  template <bool kReverse, typename T>
  RowState<double> sums_about(const T* x, const T* y, int n, bool more, float m, float m_ref, float centre) {
    // the same for every tile but the few that move a maximum
    if (const double exponent = (double(m) - centre - m_ref) / units_.temperature; exponent != to_ref_exponent_) {
      to_ref_exponent_ = exponent;
      to_ref_ = std::exp(exponent);
    }
    return tile_sums<kReverse>(x, y, n, m, m_ref, centre, units_, more).state(m, m_ref, centre, to_ref_);
  }

  template <bool kReverse, typename T>
  void new_centre(const T* x, const T* y, int n, bool more, float policy_max, float ref_max) {
    const int largest = tile_find(x, n, policy_max);
    const float difference = to_float(x[largest]) - to_float(y[largest]);
    float centre = std::isfinite(difference) ? difference : 0.0f;
    // where one model, or both, are -inf all over, any finite scale serves
    const float m = policy_max > -INFINITY ? policy_max : ref_max > -INFINITY ? ref_max : 0.0f;
    const float m_ref = ref_max > -INFINITY ? ref_max : m - centre;
    RowState<double> tile = sums_about<kReverse>(x, y, n, more, m, m_ref, centre);
    const Side<double>& p = tile.policy;
    // E[delta]^2 beyond 3/4 of E[delta^2]: the centre is an outlier
    if (p.D * p.D > 1.5 * p.A * p.S) {
      const float mean = float(centre + units_.temperature * p.D / p.S);
      if (std::isfinite(mean)) tile = sums_about<kReverse>(x, y, n, false, m, m_ref, mean);
    }
    if (started_) {
      merge(row_, tile, units_.temperature);
    } else {
      row_ = tile;
      started_ = true;
    }
  }

  void add(const RowState<double>& tile) {
    row_.policy.S += tile.policy.S, row_.policy.D += tile.policy.D, row_.policy.A += tile.policy.A;
    row_.ref.S += tile.ref.S, row_.ref.D += tile.ref.D, row_.ref.A += tile.ref.A;
    row_.H += tile.H;
    row_.ref_misses |= tile.ref_misses, row_.policy_misses |= tile.policy_misses;
  }

  Units units_;
  RowState<double> row_;
  bool started_ = false;
  double to_ref_exponent_ = 0, to_ref_ = 1;
};

// The row's log-probabilities alone: the same tiles, S and H of one model.
class LogprobReader {
 public:
  explicit LogprobReader(double temperature) : units_(temperature) {}

  template <typename T>
  void tile(const T* x, int n, bool more) {
    const float largest = tile_max(x, n);
    if (S_ == 0 || largest > max_) {
      const float to = largest > -INFINITY ? largest : 0.0f;
      const double shift = (double(max_) - to) / units_.temperature, factor = std::exp(shift);
      H_ = scaled(H_ + scaled(S_, shift), factor), S_ = scaled(S_, factor);
      max_ = to;
    }
    const Vec m(max_), log2e(units_.log2e);
    Vec S0(0.0f), S1(0.0f), H0(0.0f), H1(0.0f);
    const auto add = [&](Vec x0, Vec& S, Vec& H) __attribute__((always_inline)) {
      const Exp2 w = exp2((x0 - m) * log2e);
      S = S + w.value;
      H = fma(w.value, w.exponent, H);
    };
    int i = 0;
    for (; i + 2 * Vec::kLanes <= n; i += 2 * Vec::kLanes) {
      if (more) prefetch(x + kTile<T> + i);
      add(load(x + i), S0, H0);
      add(load(x + i + Vec::kLanes), S1, H1);
    }
    for (; i < n; i += Vec::kLanes) add(load_first(x + i, n - i < Vec::kLanes ? n - i : Vec::kLanes, -INFINITY), S0, H0);
    S_ += double(sum(S0)) + sum(S1);
    H_ += 0.69314718055994530942 * (double(sum(H0)) + sum(H1));
  }

  // as a RowState without a reference
  RowState<double> state() const {
    RowState<double> row;
    row.policy.max = max_, row.policy.S = S_, row.H = H_;
    return row;
  }

 private:
  Units units_;
  float max_ = 0;
  double S_ = 0, H_ = 0;
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
