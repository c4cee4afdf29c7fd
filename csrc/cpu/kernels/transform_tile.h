// Scores, tile by tile, as utilities and slopes.
//
// Design constraint: one pass over the scores whatever is broadcast against them. A tile is a stretch of contiguous
// scores that stays in the first-level cache: whole rows, or a part of a long one. Within a tile every operand is an
// array as long as the tile; one that is broadcast is spread into such an array once per thread, as all tiles of whole
// rows begin at a row's beginning.
//
// z is a pair of floats, exact to 2^-48: formed in fp32 with the rounding kept where there is nothing to divide by, else
// in fp64.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "arguments/transform.h"
#include "cpu/kernels/tiles.h"
#include "math/log_sigmoid.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 256;

// One operand along a tile.
template <typename T>
class Spread {
 public:
  // Left alone when the tile has no use for it.
  Spread(const Operand& operand, int64_t columns, bool used = true) : operand_(operand) {
    if (!used) return;
    if (operand.layout == Operand::Layout::number) std::fill_n(values_, kTile, T(operand.number));
    if (operand.layout == Operand::Layout::column && columns <= kTile) {
      for (int i = 0; i < kTile; ++i) values_[i] = T(operand.data[i % columns]);
    }
  }

  // The n values from score `first` on, which is in column `column`.
  const T* along(int64_t first, int64_t column, int64_t columns, int n) {
    const bool part_of_row = operand_.layout == Operand::Layout::column && columns > kTile;
    if (operand_.layout == Operand::Layout::full || part_of_row) {
      const float* from = operand_.data + (part_of_row ? column : first);
      for (int i = 0; i < n; ++i) values_[i] = T(from[i]);
    }
    return values_;
  }

 private:
  const Operand& operand_;
  alignas(64) T values_[kTile] = {};
};

inline bool is_number(const Operand& operand, double value) {
  return operand.layout == Operand::Layout::number && operand.number == value;
}

template <typename T>
class TransformTile {
 public:
  explicit TransformTile(const TransformInputs& inputs)
      : inputs_(inputs),
        scaled_(!is_number(inputs.scale, 1.0)),
        plain_difference_(!scaled_ &&
                          (inputs.reference.layout != Operand::Layout::number ||
                           double(float(inputs.reference.number)) == inputs.reference.number)),
        has_floor_(!is_number(inputs.floor, 0.0)),
        reference_(inputs.reference, inputs.columns, plain_difference_),
        exact_reference_(inputs.reference, inputs.columns, !plain_difference_),
        scale_(inputs.scale, inputs.columns, !plain_difference_),
        floor_(inputs.floor, inputs.columns, has_floor_) {}

  // Tiles of rows [begin, end): calls each(first score, n) with the tile in place.
  template <typename Each>
  void for_each(int64_t begin, int64_t end, Each&& each) {
    const int64_t columns = inputs_.columns;
    if (columns <= kTile) {
      const int64_t rows = kTile / columns;
      for (int64_t row = begin; row < end; row += rows) {
        bring(row * columns, 0, int(std::min(rows, end - row) * columns));
        each(row * columns, n_);
      }
    } else {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t column = 0; column < columns; column += kTile) {
          bring(row * columns + column, column, int(std::min<int64_t>(kTile, columns - column)));
          each(row * columns + column, n_);
        }
      }
    }
  }

  void values(float* out) {
    if (plain_difference_ && !has_floor_) {
      return directly(out, [](Vec z, Vec low) { return log_sigmoid(z, low); });
    }
    centre();
    for (int i = 0; i < n_; i += Vec::kLanes) {
      const Vec z = load(z_ + i), low = load(low_ + i);
      store(out + i, has_floor_ ? log_sigmoid_with_floor(z, low, floor_at(i)).value : log_sigmoid(z, low));
    }
  }

  void slopes(float* out) {
    if (plain_difference_ && !has_floor_) {
      return directly(out, [](Vec z, Vec low) { return log_sigmoid_slope(z, low); });
    }
    centre();
    for (int i = 0; i < n_; i += Vec::kLanes) {
      const Vec z = load(z_ + i), low = load(low_ + i);
      store(out + i, has_floor_ ? log_sigmoid_with_floor(z, low, floor_at(i)).slope : log_sigmoid_slope(z, low));
    }
  }

  void scores(float* out) const { load_tile(from_, n_, out); }

  const float* z() {
    centre();
    return z_;
  }

  const double* scale() const { return scaled_ ? scale_now_ : nullptr; }  // null where it is 1

 private:
  struct Difference {
    Vec z, low;
  };

  void bring(int64_t first, int64_t column, int n) {
    n_ = n;
    from_ = static_cast<const T*>(inputs_.scores) + first;
    centred_ = false;
    const int64_t columns = inputs_.columns;
    if (plain_difference_) {
      reference_now_ = reference_.along(first, column, columns, n);
    } else {
      exact_reference_now_ = exact_reference_.along(first, column, columns, n);
      scale_now_ = scale_.along(first, column, columns, n);
    }
    if (has_floor_) take_floor(floor_.along(first, column, columns, n), n);
  }

  // s - r and what the subtraction rounded away: nothing where it is beyond all use, or NaN because z saturates.
  static Difference subtract(Vec s, Vec r) {
    const Vec z = s - r, back = z - s;
    const Vec low = (s - (z - back)) - (r + back);
    return {z, select(abs(low) < Vec(1.0f), low, Vec(0.0f))};
  }

  // of(z, low) of every score, without a detour through memory.
  template <typename Of>
  void directly(float* out, const Of& of) const {
    int i = 0;
    for (; i + Vec::kLanes <= n_; i += Vec::kLanes) {
      const Difference d = subtract(load(from_ + i), load(reference_now_ + i));
      store(out + i, of(d.z, d.low));
    }
    if (i < n_) {
      const Difference d = subtract(load_first(from_ + i, n_ - i, 0.0f), load(reference_now_ + i));
      store(out + i, of(d.z, d.low));
    }
  }

  void centre() {
    if (centred_) return;
    centred_ = true;
    alignas(64) float scores[kTile];
    load_tile(from_, n_, scores);
    if (!plain_difference_) return divide(scores);
    for (int i = 0; i < n_; i += Vec::kLanes) {
      const Difference d = subtract(load(scores + i), load(reference_now_ + i));
      store(z_ + i, d.z);
      store(low_ + i, d.low);
    }
  }

  void divide(const float* scores) {
    for (int i = 0; i < n_; ++i) {
      const double exact = (double(scores[i]) - exact_reference_now_[i]) / scale_now_[i];
      const float z = float(exact);
      z_[i] = z;
      low_[i] = std::fabs(z) < 1e3f ? float(exact - double(z)) : 0.0f;
    }
  }

  void take_floor(const double* rate, int n) {
    const bool every_tile = inputs_.floor.layout == Operand::Layout::full || inputs_.columns > kTile;
    if (!every_tile && n <= floor_taken_) return;
    for (int i = 0; i < n; ++i) {
      const double log_rate = rate[i] > 0 ? std::log(rate[i]) : 0.0;
      // a floor below the smallest float still stops log f
      floor_rate_[i] = rate[i] > 0 ? std::max(float(rate[i]), std::numeric_limits<float>::denorm_min()) : 0.0f;
      floor_complement_[i] = float(1.0 - rate[i]);
      floor_log_[i] = float(log_rate);
      floor_log_low_[i] = float(log_rate - double(floor_log_[i]));
    }
    floor_taken_ = n;
  }

  Floor<Vec> floor_at(int i) const {
    return {load(floor_rate_ + i), load(floor_complement_ + i), load(floor_log_ + i), load(floor_log_low_ + i)};
  }

  const TransformInputs& inputs_;
  const bool scaled_, plain_difference_, has_floor_;
  Spread<float> reference_;
  Spread<double> exact_reference_, scale_, floor_;
  // the tile in place
  const T* from_ = nullptr;
  const float* reference_now_ = nullptr;
  const double *exact_reference_now_ = nullptr, *scale_now_ = nullptr;
  int n_ = 0, floor_taken_ = 0;
  bool centred_ = false;
  // whole vectors are computed at a tile's end, on what is left from before
  alignas(64) float z_[kTile] = {}, low_[kTile] = {};
  alignas(64) float floor_rate_[kTile] = {}, floor_complement_[kTile] = {}, floor_log_[kTile] = {}, floor_log_low_[kTile] = {};
};

// The tile's gradients to scores, reference and scale, from that to z: (1, -1, -z) / scale. `to_z` is overwritten.
template <typename T>
inline void write_gradients(TransformTile<T>& tile, float* to_z, int n, int64_t first, const TransformGradients& out) {
  if (const double* scale = tile.scale()) {
    for (int i = 0; i < n; ++i) to_z[i] = float(to_z[i] / scale[i]);
  }
  if (out.scores) store_tile(static_cast<T*>(out.scores) + first, to_z, n);
  if (out.reference) {
    for (int i = 0; i < n; ++i) out.reference[first + i] = -to_z[i];
  }
  if (out.scale) {
    const float* z = tile.z();
    for (int i = 0; i < n; ++i) out.scale[first + i] = to_z[i] == 0 ? 0 : -to_z[i] * z[i];
  }
}

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
