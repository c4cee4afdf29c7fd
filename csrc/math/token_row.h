// From the row state of one token to its outputs, and from upstream gradients to the few coefficients that a column's
// gradient needs: in double, once per row, the same on every device.
#pragma once

#include <cmath>

#include "math/half.h"
#include "math/kl_arguments.h"
#include "math/log_ratio.h"
#include "math/row_state.h"

namespace lsc {
namespace LSC_ISA {

constexpr int kIgnoreIndex = -100;

LSC_FN inline int64_t row_offset(const Rows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.leading - 1; d > 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset + row * rows.strides[0];
}

template <typename T>
LSC_FN inline const T* row_pointer(const Rows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row_offset(rows, row);
}

// Calls with(T{}) for the type that `dtype` names.
template <typename With>
LSC_FN inline auto with_type(DType dtype, const With& with) {
  switch (dtype) {
    case DType::bfloat16: return with(BFloat16{});
    case DType::float16: return with(Half{});
    case DType::float32: break;
  }
  return with(float{});
}

LSC_FN inline int64_t action_at(const TokenRows& rows, int64_t row) {
  return rows.actions_are_int32 ? static_cast<const int32_t*>(rows.actions)[row]
                                : static_cast<const int64_t*>(rows.actions)[row];
}
LSC_FN inline bool counted(const TokenRows& rows, int64_t row) {
  return action_at(rows, row) != kIgnoreIndex && (!rows.mask || rows.mask[row]);
}
LSC_FN inline double temperature_at(const TokenRows& rows, int64_t row) {
  return rows.temperatures ? rows.temperatures[row] : rows.temperature;
}

LSC_FN inline float logit_at(const Rows& rows, int64_t row, int64_t column) {
  return with_type(rows.dtype, [&](auto type) { return to_float(row_pointer<decltype(type)>(rows, row)[column]); });
}

// One model's part of a row: its scale, log-sum and, where asked for, its entropy sum.
struct ModelRow {
  double scale, S, log_S, H;

  LSC_FN double logprob(float logit, double temperature) const { return (logit - scale) / temperature - log_S; }
};

LSC_FN inline ModelRow model_row(const RowState<double>& state) {
  return {state.main_scale, state.S, state.S > 0 ? std::log(state.S) : double(NAN), state.H};
}

// A row of the two models as policy and reference, whichever of them was the main one.
struct PairRow {
  ModelRow policy, ref;
  double centre, L, divergence;  // log pi(v) - log ref(v) = (x_v - y_v - centre)/T + L
  bool near;
};

LSC_FN inline PairRow pair_row(const RowState<double>& state, double temperature, bool reverse) {
  const RowSummary<double> summary = summarise(state, temperature);
  const ModelRow main{state.main_scale, state.S, summary.log_S, state.H};
  const ModelRow other{state.other_scale, state.other_S, summary.log_other_S, state.H};
  if (reverse) return {other, main, -state.centre, -summary.L, summary.kl, summary.near};
  return {main, other, state.centre, summary.L, summary.kl, summary.near};
}

LSC_FN inline bool is_reverse(const KLArguments* kl) { return kl && Kind(kl->kind) == Kind::full_reverse; }

LSC_FN inline void write_nothing(int64_t row, const TokenOutputs& out) {
  if (out.kl) out.kl[row] = 0;
  if (out.ref_logprobs) out.ref_logprobs[row] = 0;
  out.logprobs[row] = out.entropy[row] = 0;
  if (out.saved)
    for (int i = 0; i < kSaved; ++i) out.saved[row * kSaved + i] = 0;
}

LSC_FN inline void save_double(double value, float* saved) {
  saved[0] = float(value);
  saved[1] = std::isfinite(saved[0]) ? float(value - saved[0]) : 0.0f;
}
LSC_FN inline double saved_double(const float* saved) { return double(saved[0]) + saved[1]; }

// The outputs of a row, and what backward needs of it. `x` and `y` are its logits at the action.
LSC_FN inline void write_row(
    const TokenRows& rows, int64_t row, PairRow pair, float x, float y, const KLArguments* kl, const TokenOutputs& out) {
  const double temperature = temperature_at(rows, row);
  const double logprob = pair.policy.logprob(x, temperature);
  const double entropy = pair.policy.log_S - pair.policy.H / pair.policy.S;
  double d = 0;
  if (kl) {
    const double ref_logprob = pair.ref.logprob(y, temperature);
    // models that nearly agree are told by their difference, others by their log-probabilities; so is a column that one of
    // them masks with a number before which ref_logprob = logprob - d would be nothing
    d = centred_difference<double>(x, y, pair.centre, 0) / temperature + pair.L;
    const bool by_difference = pair.near && std::fabs(d) < 1e6;
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
  saved[kScale] = float(pair.policy.scale);
  saved[kInverseS] = float(1 / pair.policy.S);
  saved[kMeanLogit] = float(pair.policy.H / pair.policy.S);
  save_double(logprob, saved + kLogprob);
  if (!kl) return;
  saved[kRefScale] = float(pair.ref.scale);
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
  double p0, p_logit, p_delta, p_minus_q, policy_action;
  double q0, q_delta, q_minus_p, ref_action;
};

LSC_FN inline Coefficients coefficients(const TokenRows& rows, int64_t row, const KLArguments* kl, const TokenGradients& grads) {
  const auto upstream = [row](const float* gradient) { return gradient ? double(gradient[row]) : 0.0; };
  // an overflowed slope that nobody asked for is not NaN
  const auto chain = [](double gradient, double factor) { return gradient == 0 ? 0 : gradient * factor; };
  const float* saved = grads.saved + row * kSaved;
  const double to_entropy = upstream(grads.entropy);
  double to_logprob = upstream(grads.logprobs), to_ref = upstream(grads.ref_logprobs), to_divergence = 0;
  if (kl) {
    const double log_weight = kl->old_logprobs ? saved_double(saved + kLogprob) - kl->old_logprobs[row] : 0;
    const KLValue<double> value = evaluate_kl<double>(
        saved_double(saved + kLogRatio), saved[kDivergence], kl->old_logprobs ? &log_weight : nullptr, options_of(*kl));
    const double to_kl = upstream(grads.kl);
    to_logprob += chain(to_kl, value.on_logprob);
    to_ref -= chain(to_kl, value.on_ratio);
    to_divergence = chain(to_kl, value.on_divergence);
  }
  const double from_offset = chain(to_divergence, saved[kOffset]);
  const bool full = kl && Kind(kl->kind) == Kind::full, reverse = is_reverse(kl);
  const double inverse = 1 / temperature_at(rows, row);
  Coefficients c;
  c.p0 = (-to_logprob + chain(to_entropy, saved[kMeanLogit]) + (full ? from_offset : 0)) * inverse;
  c.p_logit = -to_entropy * inverse;
  c.p_delta = full ? to_divergence * inverse : 0;
  c.p_minus_q = reverse ? to_divergence * inverse : 0;
  c.policy_action = to_logprob * inverse;
  c.q0 = (-to_ref - (reverse ? from_offset : 0)) * inverse;
  c.q_delta = reverse ? -to_divergence * inverse : 0;
  c.q_minus_p = full ? to_divergence * inverse : 0;
  c.ref_action = to_ref * inverse;
  return c;
}

struct ColumnGradient {
  double policy, ref;
};

// The gradient at the action's column. 1 - p = -expm1(log p) keeps what is left where p is nearly 1.
LSC_FN inline ColumnGradient action_gradient(float x, float y, bool with_ref, const float* saved, const Coefficients& c, double temperature) {
  const double logit = (x - double(saved[kScale])) / temperature;
  const double logprob = saved_double(saved + kLogprob), p = std::exp(logprob);
  ColumnGradient out{scaled(c.policy_action, -std::expm1(logprob)) + scaled(p, c.p0 + c.policy_action + scaled(c.p_logit, logit)), 0};
  if (!with_ref) return out;
  const double d = saved_double(saved + kLogRatio);
  const double raw = centred_difference<double>(x, y, saved_double(saved + kCentre), 0) / temperature;
  const double delta = std::isfinite(raw) ? raw : 0;
  const double ref_logprob = (y - double(saved[kRefScale])) / temperature - saved[kRefLogS];
  const double q = std::exp(ref_logprob);
  const double difference = std::fabs(d) < double(kSmallLogRatio) ? -p * std::expm1(-d) : p - q;
  out.policy += scaled(p, scaled(c.p_delta, delta)) + scaled(difference, c.p_minus_q);
  out.ref = scaled(c.ref_action, -std::expm1(ref_logprob)) + scaled(q, c.q0 + c.ref_action + scaled(c.q_delta, delta)) -
            scaled(difference, c.q_minus_p);
  return out;
}

}  // namespace LSC_ISA
}  // namespace lsc
