// One score's utility, and the slope it passes a gradient through: what lsc_transform, aggregate_rewards and shaped_rewards
// share on the device. The formulas are those of math/log_sigmoid.h, one lane wide.
#pragma once

#include "arguments/transform.h"
#include "cuda/device.h"

namespace lsc {
namespace LSC_ISA {

// What math/log_sigmoid.h asks of a vector type, of a float. NaN travels: max(limit, x) is NaN where x is.
constexpr float kExp2Floor = -160.0f;
LSC_DEVICE float max(float limit, float x) { return limit > x ? limit : x; }
LSC_DEVICE float min(float limit, float x) { return limit < x ? limit : x; }
LSC_DEVICE float abs(float a) { return fabsf(a); }
LSC_DEVICE float round(float a) { return rintf(a); }
LSC_DEVICE float select(bool where, float yes, float no) { return where ? yes : no; }
// a 2^n for whole n in [kExp2Floor, 0]; 0 at kExp2Floor
LSC_DEVICE float scale2(float a, float n) {
  const int whole = int(n), half = whole / 2;
  return a * bits_to_float(uint32_t(half + 127) << 23) * bits_to_float(uint32_t(whole - half + 127) << 23);
}

}  // namespace LSC_ISA
}  // namespace lsc

#include "math/log_sigmoid.h"

namespace lsc {
namespace LSC_ISA {

// One of reference reward, scale, floor, weights: a number, or float32 with a stride for rows and one for columns.
struct DeviceOperand {
  double number;
  const float* data;
  int64_t row_stride, column_stride;

  LSC_FN double at(int64_t row, int64_t column) const {
    return data ? double(data[row * row_stride + column * column_stride]) : number;
  }
};

// Scores [rows, columns], contiguous.
struct DeviceScores {
  const void* scores;
  DType dtype;
  int64_t rows, columns;
  DeviceOperand reference, scale, floor, weights;
  bool ignore_missing;
};

LSC_DEVICE float load_one(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::bfloat16: return to_float(static_cast<const BFloat16*>(data)[i]);
    case DType::float16: return to_float(static_cast<const Half*>(data)[i]);
    case DType::float32: break;
  }
  return static_cast<const float*>(data)[i];
}
LSC_DEVICE void store_one(DType dtype, void* data, int64_t i, float value) {
  switch (dtype) {
    case DType::bfloat16: return from_float(value, static_cast<BFloat16*>(data) + i);
    case DType::float16: return from_float(value, static_cast<Half*>(data) + i);
    case DType::float32: static_cast<float*>(data)[i] = value;
  }
}

// A score, centred: z is a pair of floats, exact to 2^-48.
struct Centred {
  float score, z, low;
  double scale;

  LSC_DEVICE Centred(const DeviceScores& in, float given, int64_t row, int64_t column) : score(given) {
    const double reference = in.reference.at(row, column);
    scale = in.scale.at(row, column);
    const double exact = (double(score) - reference) / scale;
    z = float(exact);
    low = fabsf(z) < 1e3f ? float(exact - double(z)) : 0.0f;
  }
};

LSC_DEVICE Utility<float> utility_of(const DeviceScores& in, const Centred& c, int64_t row, int64_t column) {
  const double rate = in.floor.at(row, column);
  if (rate == 0) return {log_sigmoid(c.z, c.low), log_sigmoid_slope(c.z, c.low)};
  const double log_rate = std::log(rate);
  Floor<float> floor;
  // a floor below the smallest float still stops log f
  floor.rate = fmaxf(float(rate), 0x1p-149f), floor.complement = float(1.0 - rate);
  floor.log_rate = float(log_rate), floor.log_low = float(log_rate - double(floor.log_rate));
  return log_sigmoid_with_floor(c.z, c.low, floor);
}

// u of one score, 0 where a missing one is ignored.
LSC_DEVICE float value_of(const DeviceScores& in, float score, int64_t row, int64_t column) {
  if (in.ignore_missing && score != score) return 0;
  return utility_of(in, Centred(in, score, row, column), row, column).value;
}

// The weighted sum of a row's utilities; score(k) is its k-th score. Nothing at all comes of a property with weight 0.
template <typename Score>
LSC_DEVICE float aggregate_row(const DeviceScores& in, int64_t row, const Score& score) {
  double sum = 0;
  for (int64_t k = 0; k < in.columns; ++k) {
    const double weight = in.weights.at(row, k);
    if (weight != 0) sum += weight * value_of(in, score(k), row, k);
  }
  return float(sum);
}

// Written for every score, contiguous; each null where it is not wanted. `scores` is of the scores' dtype.
struct DeviceGradients {
  void* scores;
  float *reference, *scale, *weights;
};

// The gradients of one score, given that to its utility: (1, -1, -z) / scale times the slope.
LSC_DEVICE void write_score_gradients(
    const DeviceScores& in, const DeviceGradients& out, int64_t row, int64_t column, float upstream) {
  const int64_t i = row * in.columns + column;
  const float score = load_one(in.dtype, in.scores, i);
  const Centred c(in, score, row, column);
  const bool missing = in.ignore_missing && score != score;
  const double weight = in.weights.at(row, column);
  const Utility<float> u = missing ? Utility<float>{0, 0} : utility_of(in, c, row, column);
  if (out.weights) out.weights[i] = upstream == 0 ? 0.0f : upstream * u.value;
  // a slope that nobody asked for counts for nothing, even if it is NaN
  const float weighted = weight == 0 ? 0.0f : float(weight * upstream);
  const float to_z = weighted == 0 ? 0.0f : float(weighted * u.slope / c.scale);
  if (out.scores) store_one(in.dtype, out.scores, i, to_z);
  if (out.reference) out.reference[i] = -to_z;
  if (out.scale) out.scale[i] = to_z == 0 ? 0.0f : -to_z * c.z;
}

}  // namespace LSC_ISA
}  // namespace lsc
