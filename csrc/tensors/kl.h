// The options of a KL, from the form in which ops take them.
#pragma once

#include <cmath>
#include <optional>
#include <stdexcept>
#include <vector>

#include "arguments/rows.h"
#include "tensors/tensor.h"

namespace lsc {

// (low, high), or no limits.
using Clamp = std::optional<std::vector<double>>;

// `old_logprobs` is contiguous, and outlives the result.
inline KLArguments kl_arguments(
    int64_t kind, bool straight_through, const Clamp& log_ratio_clamp, const Clamp& kl_clamp,
    const std::optional<Tensor>& old_logprobs) {
  KLArguments options{kind, straight_through, -INFINITY, INFINITY, -INFINITY, INFINITY, data_or_null<float>(old_logprobs)};
  const auto set = [](const Clamp& clamp, double& low, double& high) {
    if (!clamp) return;
    if (clamp->size() != 2) throw std::invalid_argument("a clamp must be (low, high)");
    low = (*clamp)[0], high = (*clamp)[1];
  };
  set(log_ratio_clamp, options.ratio_low, options.ratio_high);
  set(kl_clamp, options.kl_low, options.kl_high);
  return options;
}

}  // namespace lsc
