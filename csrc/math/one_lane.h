// What math/ asks of a vector of doubles (cpu/kernels/doubles.h), of one double. Comparisons with NaN are false.
#pragma once

#include <cmath>

#include "math/fn.h"

namespace lsc {
namespace LSC_ISA {

LSC_FN inline double select(bool where, double yes, double no) { return where ? yes : no; }
LSC_FN inline bool either(bool a, bool b) { return a || b; }
LSC_FN inline bool all(bool a) { return a; }
LSC_FN inline double abs(double a) { return std::fabs(a); }
LSC_FN inline double exponential(double a) { return std::exp(a); }

}  // namespace LSC_ISA
}  // namespace lsc
