// The state of one row of two logit vectors: everything that both log-probabilities, the policy's entropy and a full KL
// divergence need, in a form in which parts of a row can be merged.
//
// Design constraint: near pi = pi_ref the KL is the small remainder of large cancelling sums. So the state never holds
// sum p log(p/q); it holds sums of delta = (x - y)/T - c, the log ratio about a centre c, each taken from an exact
// difference, and of expm1(-delta) + delta, whose terms are never negative. B = A - D is kept beside them: a column whose
// delta is large is in both, and would take the others' digits along when they are subtracted.
//
//     x, y   raw logits of the main and the other model      T     temperature
//     main, weights w = e^((x - m)/T)                        S = sum w,  D = sum w delta,  B = sum w expm1(-delta),
//                                                            A = sum w (expm1(-delta) + delta)
//     other, weights v = e^((y - m')/T)                      S' = sum v
//     H = sum of weight times (logit - scale)/T, of the policy
//
// m and m' are scales near the largest logits, or near the log-sums. S + B = e^((c - m + m')/T) S', so either follows from the
// other.
//
// KL(main || other) is what comes out; the main model is the policy, or the reference for the reverse divergence.
//
// Who uses it: cpu/kernels/row_reader.h fills it tile by tile; the merge of tiles, of chunks of a row on several
// threads, and of blocks on a GPU is the same function.
#pragma once

#include <cmath>

#include "math/fn.h"
#include "math/log_ratio.h"

namespace lsc {
namespace LSC_ISA {

// 0 stays 0, whatever the factor
template <typename Real>
LSC_FN inline Real scaled(Real value, Real factor) {
  return value == 0 ? Real(0) : value * factor;
}

template <typename Real>
struct RowState {
  // The scales m and m'. Finite, also where S or S' is 0 because every logit so far was -inf.
  Real main_scale = 0, S = 0, D = 0, A = 0, B = 0;
  Real other_scale = 0, other_S = 0;
  Real H = 0;
  Real centre = 0;            // c, in units of the raw logits
  bool other_misses = false;  // y = -inf somewhere where x is finite
};

// (m - m' - c)/T: main weights about c are e^of that as large about the other scale. Exact also where a model is masked with a
// number so large that m - m' rounds the other logit away.
template <typename Real>
LSC_FN inline Real scale_distance(Real main_scale, Real other_scale, Real centre, Real temperature) {
  return centred_difference(main_scale, other_scale, centre, Real(0)) / temperature;
}

// sum e^(l - from) (l - from) brought to another scale
template <typename Real>
LSC_FN inline Real rescaled_entropy_sum(Real H, Real S, Real shift) {
  // where no weight is left, nor is what H kept of it: another scale may be far below
  return S == 0 ? Real(0) : scaled(H + scaled(S, shift), std::exp(shift));
}

template <typename Real>
LSC_FN inline void rescale_main(RowState<Real>& row, Real to, Real temperature, bool is_policy) {
  const Real shift = (row.main_scale - to) / temperature, factor = std::exp(shift);
  if (is_policy) row.H = rescaled_entropy_sum(row.H, row.S, shift);
  row.S = scaled(row.S, factor), row.D = scaled(row.D, factor);
  row.A = scaled(row.A, factor), row.B = scaled(row.B, factor);
  row.main_scale = to;
}

template <typename Real>
LSC_FN inline void rescale_other(RowState<Real>& row, Real to, Real temperature, bool is_policy) {
  const Real shift = (row.other_scale - to) / temperature;
  if (is_policy) row.H = rescaled_entropy_sum(row.H, row.other_S, shift);
  row.other_S = scaled(row.other_S, std::exp(shift));
  row.other_scale = to;
}

// Whether the other model excludes every column that has weight in the main one: none has a log ratio then, and the centre says
// nothing.
template <typename Real>
LSC_FN inline bool all_missing(const RowState<Real>& row) {
  return row.other_S == 0 && row.D == 0 && row.B == -row.S;
}

template <typename Real>
LSC_FN inline void recentre(RowState<Real>& row, Real to, Real temperature) {
  if (to == row.centre) return;
  if (all_missing(row)) {
    row.centre = to;
    return;
  }
  const Real g = (to - row.centre) / temperature;
  // with delta - g for delta; e^g A and not A + expm1(g) A, which loses what is left of an A that was e^-g times larger
  const Real e = std::expm1(g), power = std::exp(g);
  row.A = scaled(row.A, power) - scaled(row.D, e) + scaled(row.S, e - g);
  row.B = scaled(row.B, power) + scaled(row.S, e);
  row.D -= scaled(row.S, g);
  row.centre = to;
  // A part without weight beside another, or with -inf alone: what the other model has there is all of A and B.
  if (row.S == 0) row.A = row.B = scaled(row.other_S, std::exp(-scale_distance(row.main_scale, row.other_scale, to, temperature)));
}

// A larger log ratio is no centre: about that of a column which one model excludes, or masks with a number as large, others'
// would be infinite.
constexpr double kLargestCentre = 1e30;

// Nats by which a centre may move to a weighted mean. Where the mean is farther, a column that the other model nearly
// excludes has dragged it away from all others.
constexpr double kFarthestMean = 16;

// The weighted mean of x - y, where A loses least.
template <typename Real>
LSC_FN inline Real common_centre(const RowState<Real>& a, const RowState<Real>& b, Real temperature) {
  if (all_missing(a)) return b.centre;
  if (all_missing(b)) return a.centre;
  const Real heavier = a.S >= b.S ? a.centre : b.centre;
  const Real mean = (a.S * a.centre + b.S * b.centre + temperature * (a.D + b.D)) / (a.S + b.S);
  return std::fabs(mean - heavier) <= Real(kFarthestMean) * temperature ? mean : heavier;
}

template <typename Real>
LSC_FN inline Real common_scale(Real a, Real S_a, Real b, Real S_b) {
  if (S_a == 0) return b;
  if (S_b == 0) return a;
  return a > b ? a : b;
}

template <typename Real>
LSC_FN inline void bring_to_common_scales(RowState<Real>& a, RowState<Real>& b, Real temperature, bool reverse) {
  const Real main_scale = common_scale(a.main_scale, a.S, b.main_scale, b.S);
  const Real other_scale = common_scale(a.other_scale, a.other_S, b.other_scale, b.other_S);
  rescale_main(a, main_scale, temperature, !reverse), rescale_main(b, main_scale, temperature, !reverse);
  rescale_other(a, other_scale, temperature, reverse), rescale_other(b, other_scale, temperature, reverse);
}

// Of the same scales and centre.
template <typename Real>
LSC_FN inline void accumulate(RowState<Real>& a, const RowState<Real>& b) {
  a.S += b.S, a.D += b.D, a.A += b.A, a.B += b.B;
  a.other_S += b.other_S, a.H += b.H;
  a.other_misses |= b.other_misses;
}

// Of the same scales.
template <typename Real>
LSC_FN inline void accumulate_about(Real centre, RowState<Real>& a, RowState<Real>& b, Real temperature) {
  recentre(a, centre, temperature), recentre(b, centre, temperature);
  accumulate(a, b);
}

// a <- a and b together. For a fixed cut of a row the result is the same bits every time.
template <typename Real>
LSC_FN inline void merge(RowState<Real>& a, RowState<Real> b, Real temperature, bool reverse) {
  bring_to_common_scales(a, b, temperature, reverse);
  accumulate_about(common_centre(a, b, temperature), a, b, temperature);
}

// b - log1p(b), b > -1, without the cancellation of small b
template <typename Real>
LSC_FN inline Real b_minus_log1p(Real b) {
  if (std::fabs(b) >= Real(0.3)) return b - std::log1p(b);
  // log1p(b) = 2 atanh(s), s = b / (2 + b):  b - log1p(b) = b s - 2 (s^3/3 + s^5/5 + ...)
  const Real s = b / (2 + b), s2 = s * s;
  const Real tail = s2 * (Real(1) / 3 + s2 * (Real(1) / 5 + s2 * (Real(1) / 7 + s2 * (Real(1) / 9 + s2 * (Real(1) / 11 + s2 / 13)))));
  return s * (b - 2 * tail);
}

// What a row gives. log p(v) = (x_v - m)/T - log_S for each model, log main(v) - log other(v) = delta_v + L.
template <typename Real>
struct RowSummary {
  Real log_S, log_other_S, L, kl;
  bool near;  // L comes from the centred sums, and is accurate to its own size
};

template <typename Real>
LSC_FN inline RowSummary<Real> summarise(const RowState<Real>& row, Real temperature) {
  RowSummary<Real> out;
  // a row that is all -inf is no distribution
  out.log_S = row.S > 0 ? std::log(row.S) : Real(NAN);
  out.log_other_S = row.other_S > 0 ? std::log(row.other_S) : Real(NAN);
  const Real direct = out.log_other_S - out.log_S - scale_distance(row.main_scale, row.other_scale, row.centre, temperature);
  const Real b = row.B / row.S, L = std::log1p(b);
  out.near = std::fabs(b) < Real(0.5) && row.A < Real(0.5) * row.S && std::fabs(L - direct) < Real(1e-4);
  out.L = out.near ? L : direct;
  out.kl = out.near ? row.A / row.S - b_minus_log1p(b) : row.D / row.S + out.L;
  if (std::isnan(direct)) {
    out.kl = out.L = Real(NAN);
  } else if (row.other_misses) {
    out.kl = Real(INFINITY);
  } else if (out.kl < 0) {
    out.kl = 0;
  }
  return out;
}

}  // namespace LSC_ISA
}  // namespace lsc
