// The upstream gradient, tile by tile: the memory where it lies, or what is gathered from there.
#pragma once

#include <algorithm>

#include "arguments/upstream.h"

namespace lsc {
namespace LSC_ISA {

namespace {

// Tiles of at most kMost elements.
template <int kMost>
class UpstreamTile {
 public:
  explicit UpstreamTile(const Upstream& upstream) : upstream_(upstream) {}

  // The n values from element `first` on. What follows them is not to be read.
  const float* along(int64_t first, int n) {
    int64_t row = first / upstream_.inner, column = first % upstream_.inner;
    const bool within = column + n <= upstream_.inner;
    const float* from = at(row, column);
    if (within && upstream_.inner_stride == 1) return from;
    if (within && from == repeated_) return values_;
    repeated_ = nullptr;
    if (within) {
      std::fill_n(values_, kMost, *from);
      repeated_ = from;
      return values_;
    }
    for (int i = 0; i < n; ++row, column = 0) {
      const int in_row = int(std::min<int64_t>(n - i, upstream_.inner - column));
      from = at(row, column);
      if (upstream_.inner_stride == 1) {
        std::copy_n(from, in_row, values_ + i);
      } else {
        std::fill_n(values_ + i, in_row, *from);
      }
      i += in_row;
    }
    return values_;
  }

 private:
  const float* at(int64_t row, int64_t column) const {
    return upstream_.data + row * upstream_.outer_stride + column * upstream_.inner_stride;
  }

  const Upstream& upstream_;
  const float* repeated_ = nullptr;  // of which values_ is full
  alignas(64) float values_[kMost];
};

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
