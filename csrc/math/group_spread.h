// From the sums over a group to its members' advantages and gradients.
#pragma once

#include <cmath>

#include "arguments/groups.h"
#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

// Of a group of n, `squares` being those about the mean, which count where rules.scaled. A = factor (u - mean), and a factor of 0:
// none has an advantage.
struct GroupSpread {
  double members, mean, deviation, divisor, factor;

  LSC_FN GroupSpread(double n, double of_mean, double squares, const GroupRules& rules) : members(n), mean(of_mean) {
    deviation = rules.scaled && n > 1 ? std::sqrt(squares / (n - 1)) : 0;
    divisor = rules.scaled ? deviation + rules.eps : 1;
    factor = n == 1 || divisor == 0 ? 0 : (rules.leave_one_out ? n / (n - 1) : 1) / divisor;
  }

  LSC_FN double advantage(double utility) const { return factor == 0 ? 0.0 : factor * (utility - mean); }

  // What (u - mean) counts for in the gradient, `along` being the sum of g (u - mean).
  LSC_FN double slope(double along) const { return deviation == 0 ? 0 : along / ((members - 1) * deviation * divisor); }

  LSC_FN double gradient(double grad, double utility, double mean_grad, double slope) const {
    const double through_deviation = slope == 0 ? 0 : slope * (utility - mean);
    return factor == 0 ? 0.0 : factor * (grad - mean_grad - through_deviation);
  }
};

}  // namespace LSC_ISA
}  // namespace lsc
