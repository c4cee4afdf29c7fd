// From the sums of masked_whiten to what each element is put through. Once per tensor, never in cpu/kernels/.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/fn.h"
#include "math/moments.h"

namespace lsc {

// 1 / sqrt(variance + eps); 0 where that is infinite.
LSC_FN inline double whitening_scale(const Moments& moments, double eps, int64_t correction) {
  const double degrees = moments.count - double(correction), variance = degrees > 0 ? moments.m2 / degrees : 0;
  return variance + eps == 0 ? 0 : 1 / std::sqrt(variance + eps);
}

LSC_FN inline Whitening whitening_of(const Moments& moments, bool shift_mean, double eps, int64_t correction) {
  return {moments.mean, whitening_scale(moments, eps, correction), shift_mean ? 0 : moments.mean};
}

LSC_FN inline WhiteningGradient whitening_gradient_of(
    const Moments& moments, const GradientSums& sums, bool shift_mean, double eps, int64_t correction) {
  const double scale = whitening_scale(moments, eps, correction), degrees = moments.count - double(correction);
  const double mean_grad = moments.count > 0 ? sums.sum / moments.count : 0;
  return {moments.mean, scale, degrees > 0 ? -scale * (scale * (scale * sums.along / degrees)) : 0,
          (shift_mean ? 0 : mean_grad) - scale * mean_grad};
}

}  // namespace lsc
