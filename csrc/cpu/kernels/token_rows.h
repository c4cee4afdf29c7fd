// Forward and backward of one token's row; shared by token_logprobs, token_kl and shaped_rewards.
#pragma once

#include <type_traits>

#include "arguments/rows.h"
#include "cpu/kernels/row_reader.h"
#include "math/token_row.h"

namespace lsc {
namespace LSC_ISA {

// A row is cut into chunks of this many columns, each with a state of its own, merged in order. The cut depends on V
// alone, so the result is the same bits whether one thread reads the row or several.
constexpr int64_t kChunk = 65536;

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
    for_tiles<decltype(type)>(begin, end, [&](int64_t i, int n) { reader.tile(x + i, n); });
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
      for_tiles<T>(begin, end, [&](int64_t i, int n) { reader.tile(x + i, y + i, n); });
      return;
    }
    // two dtypes: each tile is widened to float in cache
    alignas(64) float x_tile[kTile<float>], y_tile[kTile<float>];
    with_type(other.dtype, [&](auto other_type) {
      const auto* y = row_pointer<decltype(other_type)>(other, row);
      for_tiles<float>(begin, end, [&](int64_t i, int n) {
        widen(x + i, n, x_tile), widen(y + i, n, y_tile);
        reader.tile(x_tile, y_tile, n);
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

inline ModelRow alone(const Rows& rows, int64_t row, int64_t vocabulary, double temperature) {
  return model_row(read_logprobs(rows, row, temperature, 0, vocabulary));
}

// From the state of a whole row to its outputs.
inline void write_row(
    const TokenRows& rows, int64_t row, const RowState<double>& state, const KLArguments* kl, const TokenOutputs& out) {
  const double temperature = temperature_at(rows, row);
  PairRow pair = pair_row(state, temperature, is_reverse(kl));
  if (kl && std::isnan(pair.L)) {
    // one model's row is undefined; the other's own outputs are not, but came from sums that the two share
    pair.policy = alone(rows.policy, row, rows.vocabulary, temperature);
    pair.ref = alone(rows.ref, row, rows.vocabulary, temperature);
  }
  const int64_t action = action_at(rows, row);
  const float x = logit_at(rows.policy, row, action), y = kl ? logit_at(rows.ref, row, action) : 0.0f;
  write_row(rows, row, pair, x, y, kl, out);
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
      : scale(temperature), m(saved[kScale]), inverse_S(saved[kInverseS]), m_ref(saved[kRefScale]),
        inverse_ref_S(std::exp(-saved[kRefLogS])), centre(saved[kCentre]), centre_low(saved[kCentreLow]), L(saved[kL]),
        // a large L has rounded away what small log ratios differ by
        small_limit(std::fabs(saved[kL]) < kSmallLogRatio ? kSmallLogRatio : 0.0f), inverse(scale.inverse),
        p0(float(c.p0)), p_logit(float(c.p_logit / temperature)), p_delta(float(c.p_delta)),
        p_minus_q(float(c.p_minus_q)), q0(float(c.q0)), q_delta(float(c.q_delta)), q_minus_p(float(c.q_minus_p)) {}

  void operator()(Vec x, Vec y, Vec& to_policy, Vec& to_ref) const {
    Vec u = x - m;  // not far above 0: S is at most kHeavy for each chunk
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
  const float ref_logit = y ? to_float(y[action]) : 0.0f;
  const ColumnGradient gradient = action_gradient(to_float(x[action]), ref_logit, y, saved, c, temperature);
  if (to_policy) from_float(float(gradient.policy), to_policy + action);
  if (to_ref) from_float(float(gradient.ref), to_ref + action);
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
