// What masked_whiten is made of between its passes: plain data.
#pragma once

namespace lsc {

struct Moments {
  double count, mean, m2;  // m2: the sum of squares about the mean
};

// Of the upstream gradient g: its sum, and that of g (x - mean).
struct GradientSums {
  double sum, along;
};

// y = scale (x - mean) + shift, and the gradient to x: of_grad g + of_centred (x - mean) + constant.
struct Whitening {
  double mean, scale, shift;
};
struct WhiteningGradient {
  double mean, of_grad, of_centred, constant;
};

}  // namespace lsc
