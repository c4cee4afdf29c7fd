// Forward and backward of one token's row; shared by token_logprobs, token_kl and shaped_rewards.
#pragma once

#include <type_traits>

#include "cpu/kernels/row_reader.h"
#include "cpu/kernels/rows.h"
#include "math/kl.h"

namespace lsc {
namespace LSC_ISA {

constexpr int kIgnoreIndex = -100;
// A row is cut into chunks of this many columns, each with a state of its own, merged in order. The cut depends on V
// alone, so the result is the same bits whether one thread reads the row or several.
constexpr int64_t kChunk = 65536;

template <typename T>
inline const T* row_pointer(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.leading - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return static_cast<const T*>(rows.data) + offset + row * rows.strides[0];
}

// Calls with(T{}) for the type that `dtype` names.
template <typename With>
inline auto with_type(DType dtype, const With& with) {
  switch (dtype) {
    case DType::bfloat16: return with(BFloat16{});
    case DType::float16: return with(Half{});
    case DType::float32: break;
  }
  return with(float{});
}

inline int64_t action_at(const TokenRows& rows, int64_t row) {
  return rows.actions_are_int32 ? static_cast<const int32_t*>(rows.actions)[row]
                                : static_cast<const int64_t*>(rows.actions)[row];
}
inline bool counted(const TokenRows& rows, int64_t row) {
  return action_at(rows, row) != kIgnoreIndex && (!rows.mask || rows.mask[row]);
}
inline double temperature_at(const TokenRows& rows, int64_t row) {
  return rows.temperatures ? rows.temperatures[row] : rows.temperature;
}

inline float logit_at(const Rows& rows, int64_t row, int64_t column) {
  return with_type(rows.dtype, [&](auto type) { return to_float(row_pointer<decltype(type)>(rows, row)[column]); });
}

template <typename T>
inline void widen(const T* from, int n, float* to) {
  int i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// Columns [begin, end) of one model.
inline RowState<double> read_logprobs(const Rows& rows, int64_t row, double temperature, int64_t begin, int64_t end) {
  LogprobReader reader(temperature);
  with_type(rows.dtype, [&](auto type) {
    const auto* x = row_pointer<decltype(type)>(rows, row);
    for_tiles<decltype(type)>(begin, end, [&](int64_t i, int n, bool more) { reader.tile(x + i, n, more); });
  });
  return reader.state();
}

// Columns [begin, end) of a row. The main model is the policy; for the reverse divergence it is the reference.
template <bool kReverse>
inline RowState<double> read_chunk(const TokenRows& rows, int64_t row, int64_t begin, int64_t end) {
  const double temperature = temperature_at(rows, row);
  if (!rows.ref.data) return read_logprobs(rows.policy, row, temperature, begin, end);
  const Rows& main = kReverse ? rows.ref : rows.policy;
  const Rows& other = kReverse ? rows.policy : rows.ref;
  RowReader<kReverse> reader(temperature);
  with_type(main.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = row_pointer<T>(main, row);
    if (main.dtype == other.dtype) {
      const T* y = row_pointer<T>(other, row);
      for_tiles<T>(begin, end, [&](int64_t i, int n, bool more) { reader.tile(x + i, y + i, n, more); });
      return;
    }
    // two dtypes: each tile is widened to float in cache
    alignas(64) float x_tile[kTile<float>], y_tile[kTile<float>];
    with_type(other.dtype, [&](auto other_type) {
      const auto* y = row_pointer<decltype(other_type)>(other, row);
      for_tiles<float>(begin, end, [&](int64_t i, int n, bool) {
        widen(x + i, n, x_tile), widen(y + i, n, y_tile);
        reader.tile(x_tile, y_tile, n, false);
      });
    });
  });
  return reader.state();
}

template <bool kReverse>
inline RowState<double> read_row(const TokenRows& rows, int64_t row) {
  RowState<double> state = read_chunk<kReverse>(rows, row, 0, rows.vocabulary < kChunk ? rows.vocabulary : kChunk);
  for (int64_t begin = kChunk; begin < rows.vocabulary; begin += kChunk) {
    const int64_t end = begin + kChunk < rows.vocabulary ? begin + kChunk : rows.vocabulary;
    merge(state, read_chunk<kReverse>(rows, row, begin, end), temperature_at(rows, row), kReverse);
  }
  return state;
}

// One model's part of a row: its maximum, log-sum and, where asked for, its entropy sum.
struct ModelRow {
  double max, S, log_S, H;

  double logprob(float logit, double temperature) const { return (logit - max) / temperature - log_S; }
};

// A row of the two models as policy and reference, whichever of them was the main one.
struct PairRow {
  ModelRow policy, ref;
  double centre, L, divergence;  // log pi(v) - log ref(v) = (x_v - y_v - centre)/T + L
  bool near;
};

inline ModelRow alone(const Rows& rows, int64_t row, int64_t vocabulary, double temperature) {
  const RowState<double> state = read_logprobs(rows, row, temperature, 0, vocabulary);
  return {state.main_max, state.S, state.S > 0 ? std::log(state.S) : NAN, state.H};
}

inline PairRow pair_row(const TokenRows& rows, int64_t row, const RowState<double>& state, bool reverse) {
  const double temperature = temperature_at(rows, row);
  const RowSummary<double> summary = summarise(state, temperature);
  const ModelRow main{state.main_max, state.S, summary.log_S, state.H};
  const ModelRow other{state.other_max, state.other_S, summary.log_other_S, state.H};
  PairRow pair{main, other, state.centre, summary.L, summary.kl, summary.near};
  if (reverse) pair = {other, main, -state.centre, -summary.L, summary.kl, summary.near};
  if (rows.ref.data && std::isnan(summary.L)) {
    // one model's row is undefined; the other's own outputs are not, but came from sums that the two share
    pair.policy = alone(rows.policy, row, rows.vocabulary, temperature);
    pair.ref = alone(rows.ref, row, rows.vocabulary, temperature);
  }
  return pair;
}

inline KLOptions options_of(const KLArguments& a) {
  return {Kind(a.kind), a.straight_through, a.ratio_low, a.ratio_high, a.kl_low, a.kl_high};
}

inline void write_nothing(int64_t row, const TokenOutputs& out) {
  for (float* output : {out.kl, out.logprobs, out.ref_logprobs, out.entropy})
    if (output) output[row] = 0;
  if (out.saved)
    for (int i = 0; i < kSaved; ++i) out.saved[row * kSaved + i] = 0;
}

inline bool is_reverse(const KLArguments* kl) { return kl && Kind(kl->kind) == Kind::full_reverse; }

inline void save_double(double value, float* saved) {
  saved[0] = float(value);
  saved[1] = std::isfinite(saved[0]) ? float(value - saved[0]) : 0.0f;
}
inline double saved_double(const float* saved) { return double(saved[0]) + saved[1]; }

// From the state of a whole row to its outputs.
inline void write_row(
    const TokenRows& rows, int64_t row, const RowState<double>& state, const KLArguments* kl, const TokenOutputs& out) {
  const double temperature = temperature_at(rows, row);
  PairRow pair = pair_row(rows, row, state, is_reverse(kl));
  const int64_t action = action_at(rows, row);
  const float x = logit_at(rows.policy, row, action);
  const double logprob = pair.policy.logprob(x, temperature);
  const double entropy = pair.policy.log_S - pair.policy.H / pair.policy.S;
  double d = 0;
  if (kl) {
    const float y = logit_at(rows.ref, row, action);
    const double ref_logprob = pair.ref.logprob(y, temperature);
    // models that nearly agree are told by their difference, others by their log-probabilities
    d = (double(x) - y - pair.centre) / temperature + pair.L;
    const bool by_difference = pair.near && std::isfinite(d);
    if (!by_difference) d = logprob - ref_logprob;
    // equal logits agree exactly, -inf included; and one column leaves nothing to differ
    const bool equal = (x == y && std::isinf(x)) || rows.vocabulary == 1;
    if (equal && !std::isnan(pair.L)) d = 0;
    if (rows.vocabulary == 1) pair.divergence = scaled(pair.divergence, 0.0);
    const double log_weight = kl->old_logprobs ? logprob - kl->old_logprobs[row] : 0;
    out.kl[row] = float(evaluate_kl(d, pair.divergence, kl->old_logprobs ? &log_weight : nullptr, options_of(*kl)).kl);
    out.ref_logprobs[row] = float(by_difference ? logprob - d : ref_logprob);
  }
  out.logprobs[row] = float(logprob);
  out.entropy[row] = float(entropy);
  if (!out.saved) return;
  float* saved = out.saved + row * kSaved;
  for (int i = 0; i < kSaved; ++i) saved[i] = 0;
  saved[kMax] = float(pair.policy.max);
  saved[kInverseS] = float(1 / pair.policy.S);
  saved[kMeanLogit] = float(pair.policy.H / pair.policy.S);
  save_double(logprob, saved + kLogprob);
  if (!kl) return;
  saved[kRefMax] = float(pair.ref.max);
  saved[kRefLogS] = float(pair.ref.log_S);
  save_double(pair.centre, saved + kCentre);
  saved[kL] = float(pair.L);
  saved[kOffset] = float(is_reverse(kl) ? pair.L + pair.divergence : pair.L - pair.divergence);
  saved[kDivergence] = float(pair.divergence);
  save_double(d, saved + kLogRatio);
}

// The upstream gradients of a row, combined: with p, q the probabilities and delta + L the log ratio of a column,
//
//     d / d x = p (p0 + p_logit (x - m)/T + p_delta delta) + p_minus_q (p - q) + at the action: policy_action
//     d / d y = q (q0 + q_delta delta) + q_minus_p (q - p)                     + at the action: ref_action
struct Coefficients {
  double p0 = 0, p_logit = 0, p_delta = 0, p_minus_q = 0, policy_action = 0;
  double q0 = 0, q_delta = 0, q_minus_p = 0, ref_action = 0;
};

inline Coefficients coefficients(const TokenRows& rows, int64_t row, const KLArguments* kl, const TokenGradients& grads) {
  const auto upstream = [row](const float* gradient) { return gradient ? double(gradient[row]) : 0.0; };
  // an overflowed slope that nobody asked for is not NaN
  const auto chain = [](double gradient, double factor) { return gradient == 0 ? 0 : gradient * factor; };
  const float* saved = grads.saved + row * kSaved;
  const double to_entropy = upstream(grads.entropy);
  double to_logprob = upstream(grads.logprobs), to_ref = upstream(grads.ref_logprobs), to_divergence = 0;
  Coefficients c;
  if (kl) {
    const double log_weight = kl->old_logprobs ? saved_double(saved + kLogprob) - kl->old_logprobs[row] : 0;
    const KLValue<double> value = evaluate_kl<double>(
        saved_double(saved + kLogRatio), saved[kDivergence], kl->old_logprobs ? &log_weight : nullptr, options_of(*kl));
    const double to_kl = upstream(grads.kl);
    to_logprob += chain(to_kl, value.on_ratio + value.through_weight);
    to_ref -= chain(to_kl, value.on_ratio);
    to_divergence = chain(to_kl, value.on_divergence);
  }
  const double from_offset = chain(to_divergence, saved[kOffset]);
  c.p0 = -to_logprob + chain(to_entropy, saved[kMeanLogit]);
  c.p_logit = -to_entropy;
  c.policy_action = to_logprob;
  c.q0 = -to_ref;
  c.ref_action = to_ref;
  if (kl && Kind(kl->kind) == Kind::full) {
    c.p0 += from_offset, c.p_delta = to_divergence;
    c.q_minus_p = to_divergence;
  } else if (kl && Kind(kl->kind) == Kind::full_reverse) {
    c.p_minus_q = to_divergence;
    c.q0 -= from_offset, c.q_delta = -to_divergence;
  }
  const double inverse = 1 / temperature_at(rows, row);
  for (double* value : {&c.p0, &c.p_logit, &c.p_delta, &c.p_minus_q, &c.policy_action, &c.q0, &c.q_delta, &c.q_minus_p, &c.ref_action})
    *value *= inverse;
  return c;
}

// What a row's gradients are made of.
enum class Reads {
  policy,     // the policy alone
  log_ratio,  // and delta, for the policy's gradient of a full KL
  both,       // and p - q
};

// One vector of columns of the gradients.
template <Reads kReads>
struct RowGradient {
  PowerScale scale;
  Vec m, inverse_S, m_ref, inverse_ref_S, centre, centre_low, L, small_limit, inverse;
  Vec p0, p_logit, p_delta, p_minus_q, q0, q_delta, q_minus_p;

  RowGradient(const float* saved, const Coefficients& c, double temperature)
      : scale(temperature), m(saved[kMax]), inverse_S(saved[kInverseS]), m_ref(saved[kRefMax]),
        inverse_ref_S(std::exp(-saved[kRefLogS])), centre(saved[kCentre]), centre_low(saved[kCentreLow]), L(saved[kL]),
        // a large L has rounded away what small log ratios differ by
        small_limit(std::fabs(saved[kL]) < kSmallLogRatio ? kSmallLogRatio : 0.0f), inverse(float(1 / temperature)),
        p0(float(c.p0)), p_logit(float(c.p_logit / temperature)), p_delta(float(c.p_delta)),
        p_minus_q(float(c.p_minus_q)), q0(float(c.q0)), q_delta(float(c.q_delta)), q_minus_p(float(c.q_minus_p)) {}

  void operator()(Vec x, Vec y, Vec& to_policy, Vec& to_ref) const {
    Vec u = x - m;
    const Vec p = exp_scaled(u, scale) * inverse_S;
    Vec per_weight = fma(p_logit, u, p0);
    if constexpr (kReads == Reads::policy) {
      to_policy = p * per_weight;
    } else {
      const Vec unlimited = centred_difference(x, y, centre, centre_low) * inverse;
      // a column that either model excludes has no finite log ratio, and no weight
      const Vec delta = select(abs(unlimited) < Vec(INFINITY), unlimited, Vec(0.0f));
      to_policy = p * fma(p_delta, delta, per_weight);
      if constexpr (kReads == Reads::both) add_differences(y, p, unlimited, delta, to_policy, to_ref);
    }
  }

 private:
  // p - q = -p expm1(-d) = p (d - d^2 P(d)), without the cancellation of nearly equal columns
  void add_differences(Vec y, Vec p, Vec unlimited, Vec delta, Vec& to_policy, Vec& to_ref) const {
    const Vec d = unlimited + L;
    const Mask small = abs(d) < small_limit;
    Vec difference = p * (d - d * d * expm1_remainder(d));
    Vec q = p - difference;
    if (!all(small)) {
      Vec from_max = y - m_ref;
      const Vec exact = exp_scaled(from_max, scale) * inverse_ref_S;
      q = select(small, q, exact);
      difference = select(small, difference, p - exact);
    }
    to_policy = fma(p_minus_q, difference, to_policy);
    to_ref = q * fma(q_delta, delta, q0) - q_minus_p * difference;
  }
};

template <Reads kReads, typename X, typename Y>
inline void write_gradient(const X* x, const Y* y, int64_t n, const RowGradient<kReads>& gradient, X* to_policy, Y* to_ref) {
  constexpr bool kReference = kReads != Reads::policy;
  Vec x0, x1, y0, y1, policy0, policy1, ref0, ref1;
  // where the two have elements of one kind, and so lie alike in load_two's vectors
  constexpr int kStep = std::is_same_v<X, Y> ? 2 * Vec::kLanes : Vec::kLanes;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    if constexpr (std::is_same_v<X, Y>) {
      load_two(x + i, x0, x1);
      if constexpr (kReference) load_two(y + i, y0, y1);
      gradient(x0, y0, policy0, ref0), gradient(x1, y1, policy1, ref1);
      if (to_policy) store_two(to_policy + i, policy0, policy1);
      if (kReads == Reads::both && to_ref) store_two(to_ref + i, ref0, ref1);
    } else {
      gradient(load(x + i), load(y + i), policy0, ref0);
      if (to_policy) store(to_policy + i, policy0);
      if (kReads == Reads::both && to_ref) store(to_ref + i, ref0);
    }
  }
  for (; i < n; i += Vec::kLanes) {
    const int left = n - i < Vec::kLanes ? int(n - i) : Vec::kLanes;
    if constexpr (kReference) y0 = load_first(y + i, left, -INFINITY);
    gradient(load_first(x + i, left, -INFINITY), y0, policy0, ref0);
    if (to_policy) store_first(to_policy + i, left, policy0);
    if (kReads == Reads::both && to_ref) store_first(to_ref + i, left, ref0);
  }
}

// The action's column again, in double.
template <typename X, typename Y>
inline void write_action(const X* x, const Y* y, int64_t action, const float* saved, const Coefficients& c, double temperature, X* to_policy, Y* to_ref) {
  const double logit = (to_float(x[action]) - double(saved[kMax])) / temperature;
  const double logprob = saved_double(saved + kLogprob), p = std::exp(logprob);
  // 1 - p = -expm1(log p) keeps what is left where p is nearly 1
  double policy = scaled(c.policy_action, -std::expm1(logprob)) + scaled(p, c.p0 + c.policy_action + scaled(c.p_logit, logit));
  if (y) {
    const double d = saved_double(saved + kLogRatio);
    const double raw = (double(to_float(x[action])) - to_float(y[action]) - saved_double(saved + kCentre)) / temperature;
    const double delta = std::isfinite(raw) ? raw : 0;
    const double ref_logprob = (to_float(y[action]) - double(saved[kRefMax])) / temperature - saved[kRefLogS];
    const double q = std::exp(ref_logprob);
    const double difference = std::fabs(d) < kSmallLogRatio ? -p * std::expm1(-d) : p - q;
    policy += scaled(p, scaled(c.p_delta, delta)) + scaled(difference, c.p_minus_q);
    const double ref = scaled(c.ref_action, -std::expm1(ref_logprob)) +
                       scaled(q, c.q0 + c.ref_action + scaled(c.q_delta, delta)) - scaled(difference, c.q_minus_p);
    if (to_ref) from_float(float(ref), to_ref + action);
  }
  if (to_policy) from_float(float(policy), to_policy + action);
}

inline void write_row_gradients(const TokenRows& rows, int64_t row, const KLArguments* kl, const TokenGradients& grads) {
  const int64_t V = rows.vocabulary;
  const double temperature = temperature_at(rows, row);
  const float* saved = grads.saved + row * kSaved;
  const Coefficients c = coefficients(rows, row, kl, grads);
  with_type(rows.policy.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    const X* x = row_pointer<X>(rows.policy, row);
    X* to_policy = grads.policy ? static_cast<X*>(grads.policy) + row * V : nullptr;
    const auto write = [&](auto gradient, const auto* y, auto* to_ref) {
      write_gradient(x, y, V, gradient, to_policy, to_ref);
      write_action(x, y, action_at(rows, row), saved, c, temperature, to_policy, to_ref);
    };
    const bool differences = grads.ref || c.p_minus_q != 0;
    if (!differences && c.p_delta == 0) {
      return write(RowGradient<Reads::policy>(saved, c, temperature), static_cast<const X*>(nullptr), static_cast<X*>(nullptr));
    }
    with_type(rows.ref.dtype, [&](auto y_type) {
      using Y = decltype(y_type);
      const Y* y = row_pointer<Y>(rows.ref, row);
      Y* to_ref = grads.ref ? static_cast<Y*>(grads.ref) + row * V : nullptr;
      if (!differences) return write(RowGradient<Reads::log_ratio>(saved, c, temperature), y, to_ref);
      write(RowGradient<Reads::both>(saved, c, temperature), y, to_ref);
    });
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
