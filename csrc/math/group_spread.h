// From the sums over a group to its members' advantages and gradients. Never in cpu/kernels/.
#pragma once

#include <cmath>

#include "math/fn.h"

namespace lsc {

struct GroupRules {
  bool scaled, leave_one_out;
  double eps;
};

// Of a group of n, `squares` being those about the mean. A = factor (u - mean) / divisor; a factor of 0: none has an advantage.
struct Spread {
  double members, mean, deviation, factor, divisor;
  bool scaled;

  LSC_FN Spread(double n, double of_mean, double squares, const GroupRules& rules) : members(n), mean(of_mean), scaled(rules.scaled) {
    deviation = n > 1 ? std::sqrt(squares / (n - 1)) : 0;
    divisor = scaled ? deviation + rules.eps : 1;
    factor = n == 1 || divisor == 0 ? 0 : rules.leave_one_out ? n / (n - 1) : 1;
  }

  LSC_FN double advantage(double utility) const { return factor == 0 ? 0.0 : factor * (utility - mean) / divisor; }

  // What (u - mean) counts for in the gradient, `along` being the sum of g (u - mean).
  LSC_FN double slope(double along) const { return scaled && deviation != 0 ? along / ((members - 1) * deviation * divisor) : 0; }

  LSC_FN double gradient(double grad, double utility, double mean_grad, double slope) const {
    const double through_deviation = slope == 0 ? 0 : slope * (utility - mean);
    return factor == 0 ? 0.0 : factor / divisor * (grad - mean_grad - through_deviation);
  }
};

}  // namespace lsc
