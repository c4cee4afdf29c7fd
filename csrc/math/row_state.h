// The state of one row of two logit vectors: everything that the log-probabilities, the entropy and both full KL
// divergences need, in a form in which parts of a row can be merged.
//
// Design constraint: near pi = pi_ref the KL is the small remainder of large cancelling sums. So the state never holds
// sum p log(p/q); it holds sums of delta = (x - y)/T - c, the log ratio about a centre c, each taken from an exact
// difference, and of expm1(-delta) + delta, whose terms are never negative.
//
//     x, y   logits of policy and reference, raw         T     temperature
//     policy side, weights w = e^((x - m)/T)             S = sum w,  H = sum w (x - m)/T,
//                                                        D = sum w delta,  A = sum w (expm1(-delta) + delta)
//     reference side, weights v = e^((y - m')/T)         the same with -delta for delta
//
// Who uses it: cpu/kernels/row_reader.h fills it tile by tile; the merge of tiles, of chunks of a row on several
// threads, and later of blocks on a GPU is the same function.
#pragma once

#include <cmath>

namespace lsc {
namespace LSC_ISA {

// 0 stays 0, whatever the factor
template <typename Real>
inline Real scaled(Real value, Real factor) {
  return value == 0 ? Real(0) : value * factor;
}

// One model's sums about the common centre; `D` and `A` are only kept for the reference when the reverse KL is wanted.
// `max` is finite, also where S is 0 because every logit so far was -inf: then it is only the scale of A.
template <typename Real>
struct Side {
  Real max = 0;
  Real S = 0, D = 0, A = 0;

  void rescale(Real to, Real inverse_temperature) {
    if (max == to) return;
    const Real factor = std::exp((max - to) * inverse_temperature);
    S = scaled(S, factor), D = scaled(D, factor), A = scaled(A, factor);
    max = to;
  }
  // delta <- delta - g
  void recentre(Real g) {
    if (g == 0) return;
    const Real B = A - D, e = std::expm1(g);
    A += e * B + (e - g) * S;
    D -= g * S;
  }
};

template <typename Real>
inline Real common_max(const Side<Real>& a, const Side<Real>& b) {
  if (a.S == 0) return b.max;
  if (b.S == 0) return a.max;
  return a.max > b.max ? a.max : b.max;
}

template <typename Real>
struct RowState {
  Side<Real> policy, ref;
  Real H = 0;
  Real centre = 0;             // c, in units of the raw logits
  bool ref_misses = false;     // y = -inf somewhere where x is finite
  bool policy_misses = false;  // the other way round

  void rescale_policy(Real to, Real inverse_temperature) {
    const Real shift = (policy.max - to) * inverse_temperature;
    H = scaled(H + scaled(policy.S, shift), std::exp(shift));
    policy.rescale(to, inverse_temperature);
  }
  void recentre(Real to, Real inverse_temperature) {
    const Real g = (to - centre) * inverse_temperature;
    policy.recentre(g);
    ref.recentre(-g);
    centre = to;
  }
};

// The weighted mean of x - y: where A loses least. Rounded to float, so that kernels can subtract it exactly.
template <typename Real>
inline Real common_centre(const RowState<Real>& a, const RowState<Real>& b, Real temperature) {
  const RowState<Real>& heavier = a.policy.S >= b.policy.S ? a : b;
  const Real weight = a.policy.S + b.policy.S;
  const Real mean = (a.policy.S * a.centre + b.policy.S * b.centre + temperature * (a.policy.D + b.policy.D)) / weight;
  const Real rounded = Real(float(mean));
  return std::isfinite(rounded) ? rounded : heavier.centre;
}

// a <- a and b together. The result does not depend on where the row was cut beyond rounding; for a fixed cut it is
// the same bits every time.
template <typename Real>
inline void merge(RowState<Real>& a, RowState<Real> b, Real temperature) {
  const Real inverse_temperature = 1 / temperature;
  const Real policy_max = common_max(a.policy, b.policy), ref_max = common_max(a.ref, b.ref);
  a.rescale_policy(policy_max, inverse_temperature), b.rescale_policy(policy_max, inverse_temperature);
  a.ref.rescale(ref_max, inverse_temperature), b.ref.rescale(ref_max, inverse_temperature);
  const Real centre = common_centre(a, b, temperature);
  a.recentre(centre, inverse_temperature), b.recentre(centre, inverse_temperature);
  a.policy.S += b.policy.S, a.policy.D += b.policy.D, a.policy.A += b.policy.A;
  a.ref.S += b.ref.S, a.ref.D += b.ref.D, a.ref.A += b.ref.A;
  a.H += b.H;
  a.ref_misses |= b.ref_misses, a.policy_misses |= b.policy_misses;
}

// b - log1p(b), b > -1, without the cancellation of small b
template <typename Real>
inline Real b_minus_log1p(Real b) {
  if (std::fabs(b) >= Real(0.3)) return b - std::log1p(b);
  // log1p(b) = 2 atanh(s), s = b / (2 + b):  b - log1p(b) = b s - 2 (s^3/3 + s^5/5 + ...)
  const Real s = b / (2 + b), s2 = s * s;
  const Real tail = s2 * (Real(1) / 3 + s2 * (Real(1) / 5 + s2 * (Real(1) / 7 + s2 * (Real(1) / 9 + s2 * (Real(1) / 11 + s2 / 13)))));
  return s * (b - 2 * tail);
}

// What a row gives: KL(pi || ref), its reverse, the entropy, and what turns a logit into a log-probability.
template <typename Real>
struct RowSummary {
  Real log_S, log_ref_S;  // log pi(v) = (x_v - m)/T - log_S
  Real L;                 // log pi(v) - log ref(v) = delta_v + L
  Real entropy, kl, reverse_kl;
  bool near;              // L comes from the centred sums, and is accurate to its own size
};

template <typename Real>
inline RowSummary<Real> summarise(const RowState<Real>& row, Real temperature) {
  const Side<Real>& p = row.policy;
  const Side<Real>& q = row.ref;
  RowSummary<Real> out;
  // a row that is all -inf is no distribution
  out.log_S = p.S > 0 ? std::log(p.S) : Real(NAN);
  out.log_ref_S = q.S > 0 ? std::log(q.S) : Real(NAN);
  out.entropy = out.log_S - row.H / p.S;

  const Real direct = out.log_ref_S - out.log_S - ((p.max - q.max) - row.centre) / temperature;
  const Real b = (p.A - p.D) / p.S;
  const Real L = std::log1p(b);
  out.near = std::fabs(b) < Real(0.5) && p.A < Real(0.5) * p.S && std::fabs(L - direct) < Real(1e-4);
  out.L = out.near ? L : direct;
  out.kl = out.near ? p.A / p.S - b_minus_log1p(b) : p.D / p.S + out.L;

  const Real reverse_b = (q.A - q.D) / q.S;
  const bool reverse_near = std::fabs(reverse_b) < Real(0.5) && q.A < Real(0.5) * q.S &&
                            std::fabs(std::log1p(reverse_b) + direct) < Real(1e-4);
  out.reverse_kl = reverse_near ? q.A / q.S - b_minus_log1p(reverse_b) : q.D / q.S - out.L;

  const bool undefined = std::isnan(direct);
  if (!undefined) {
    out.kl = row.ref_misses ? Real(INFINITY) : (out.kl > 0 ? out.kl : 0);
    out.reverse_kl = row.policy_misses ? Real(INFINITY) : (out.reverse_kl > 0 ? out.reverse_kl : 0);
  } else {
    out.kl = out.reverse_kl = out.L = Real(NAN);
  }
  return out;
}

}  // namespace LSC_ISA
}  // namespace lsc
