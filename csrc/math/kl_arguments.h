// KL estimators with their options as ops hand them to kernels.
#pragma once

#include "arguments/rows.h"
#include "math/kl.h"

namespace lsc {
namespace LSC_ISA {

LSC_FN inline KLOptions options_of(const KLArguments& a) {
  return {Kind(a.kind), a.straight_through, a.ratio_low, a.ratio_high, a.kl_low, a.kl_high};
}

// kl_from_logprobs at one token or several; `old` is null where there is none.
template <typename V>
LSC_FN inline KLValue<V> kl_of_logprobs(V logprob, V ref_logprob, const V* old, const KLOptions& options) {
  // equal log-probabilities give 0, also where both are -inf
  const V d = select(logprob == ref_logprob, V(0.0), logprob - ref_logprob);
  const V log_weight = old ? logprob - *old : V(0.0);
  return evaluate_kl<V>(d, V(0.0), old ? &log_weight : nullptr, options);
}

// Token i.
LSC_FN inline KLValue<double> value_at(double logprob, double ref_logprob, const KLArguments& a, int64_t i) {
  const double old = a.old_logprobs ? a.old_logprobs[i] : 0;
  return kl_of_logprobs(logprob, ref_logprob, a.old_logprobs ? &old : nullptr, options_of(a));
}

}  // namespace LSC_ISA
}  // namespace lsc
