// KL estimators with their options as ops hand them to kernels.
#pragma once

#include "arguments/rows.h"
#include "math/kl.h"

namespace lsc {
namespace LSC_ISA {

LSC_FN inline KLOptions options_of(const KLArguments& a) {
  return {Kind(a.kind), a.straight_through, a.ratio_low, a.ratio_high, a.kl_low, a.kl_high};
}

// Element i of kl_from_logprobs, from its log-probabilities.
LSC_FN inline KLValue<double> value_at(double logprob, double ref_logprob, const KLArguments& a, int64_t i) {
  // equal log-probabilities give 0, also where both are -inf
  const double d = logprob == ref_logprob ? 0 : logprob - ref_logprob;
  const double log_weight = a.old_logprobs ? logprob - a.old_logprobs[i] : 0;
  return evaluate_kl<double>(d, 0, a.old_logprobs ? &log_weight : nullptr, options_of(a));
}

}  // namespace LSC_ISA
}  // namespace lsc
