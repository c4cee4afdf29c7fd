// reward_head: a few dot products per row that is read, and nothing else of hidden is touched.
//
// Forward: a tile of the row, converted to floats, is multiplied with every weight while it is in the first cache. Sums run
// in fp32 in the lanes of four vectors, which are added up in fp64. Backward to hidden: one scaled sum of the weights per row. Backward to
// weight: a thread owns columns of H and goes through all rows, so that no two threads add to one place and the order of
// the additions is always the same; fp32 over blocks of rows, fp64 over blocks.
#include "cpu/kernels/reward_head.h"

#include <algorithm>
#include <vector>

#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 1024;
constexpr int kRowsPerBlock = 64;

int64_t row_offset(const HiddenRows& rows, int64_t row) {
  int64_t offset = 0;
  for (int d = rows.leading - 1; d >= 0; --d) {
    offset += row % rows.sizes[d] * rows.strides[d];
    row /= rows.sizes[d];
  }
  return offset;
}

int64_t row_of(const HeadInputs& in, int64_t output) { return in.positions ? in.positions[output] : output; }

// n columns of a row as floats, followed by zeros up to a whole vector.
template <typename T>
void load_hidden(const HiddenRows& hidden, int64_t offset, int64_t column, int n, float* out) {
  const T* from = static_cast<const T*>(hidden.data) + offset + column * hidden.column_stride;
  if (hidden.column_stride == 1) return load_tile(from, n, out);
  for (int i = 0; i < n; ++i) out[i] = to_float(from[i * hidden.column_stride]);
  for (int i = n; i % Vec::kLanes; ++i) out[i] = 0.0f;
}

// `hidden` ends in zeros up to a whole vector; `weight` ends after n.
double dot(const float* hidden, const float* weight, int n) {
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int i = 0;
  for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes) {
    for (int j = 0; j < 4; ++j) {
      const int at = i + j * Vec::kLanes;
      sums[j] = fma(load(hidden + at), load(weight + at), sums[j]);
    }
  }
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) sums[0] = fma(load(hidden + i), load(weight + i), sums[0]);
  if (i < n) sums[1] = fma(load(hidden + i), load_first(weight + i, n - i, 0.0f), sums[1]);
  WideSum total;
  for (const Vec& each : sums) total.add(each);
  return total.total();
}

// out += factor * values
void add_scaled(float factor, const float* values, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] += factor * values[i];
}

bool all_zero(const float* values, int64_t n) {
  return std::all_of(values, values + n, [](float value) { return value == 0; });
}

}  // namespace

void head_last_counted(const MaskRows& mask, int64_t length, int64_t* positions, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t last = last_counted(mask, row, length);
    positions[row] = last < 0 ? -1 : row * length + last;
  }
}

void head_counted(const MaskRows& mask, int64_t* positions, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) positions[row] = is_counted(mask, 0, row) ? row : -1;
}

void head_scores(const HeadInputs& in, float* scores, int64_t begin, int64_t end) {
  const int64_t width = in.hidden.width;
  std::vector<double> sums(in.properties);
  alignas(64) float hidden[kTile];
  for_dtype(in.hidden.dtype, [&](auto type) {
    for (int64_t output = begin; output < end; ++output) {
      float* out = scores + output * in.properties;
      const int64_t row = row_of(in, output);
      if (row < 0) {
        std::fill_n(out, in.properties, float(in.without_row));
        continue;
      }
      for (int64_t k = 0; k < in.properties; ++k) sums[k] = in.bias ? in.bias[k] : 0.0;
      const int64_t offset = row_offset(in.hidden, row);
      for (int64_t column = 0; column < width; column += kTile) {
        const int n = int(std::min<int64_t>(kTile, width - column));
        load_hidden<decltype(type)>(in.hidden, offset, column, n, hidden);
        for (int64_t k = 0; k < in.properties; ++k) sums[k] += dot(hidden, in.weight + k * width + column, n);
      }
      std::copy(sums.begin(), sums.end(), out);
    }
  });
}

void head_to_hidden(const HeadInputs& in, const float* grad, void* to_hidden, int64_t begin, int64_t end) {
  const int64_t width = in.hidden.width;
  alignas(64) float gradient[kTile];
  for_dtype(in.hidden.dtype, [&](auto type) {
    for (int64_t output = begin; output < end; ++output) {
      const int64_t row = row_of(in, output);
      if (row < 0) continue;
      for (int64_t column = 0; column < width; column += kTile) {
        const int n = int(std::min<int64_t>(kTile, width - column));
        std::fill_n(gradient, n, 0.0f);
        for (int64_t k = 0; k < in.properties; ++k) {
          add_scaled(grad[output * in.properties + k], in.weight + k * width + column, n, gradient);
        }
        store_tile(static_cast<decltype(type)*>(to_hidden) + row * width + column, gradient, n);
      }
    }
  });
}

void head_to_weight(const HeadInputs& in, const float* grad, int64_t outputs, float* to_weight, int64_t begin, int64_t end) {
  const int64_t width = in.hidden.width;
  alignas(64) float hidden[kTile];
  for_dtype(in.hidden.dtype, [&](auto type) {
    for (int64_t column = begin; column < end; column += kTile) {
      const int n = int(std::min<int64_t>(kTile, end - column));
      std::vector<double> totals(in.properties * n);
      std::vector<float> block(in.properties * n);
      for (int64_t first = 0; first < outputs; first += kRowsPerBlock) {
        for (int64_t output = first; output < std::min(outputs, first + kRowsPerBlock); ++output) {
          const float* upstream = grad + output * in.properties;
          const int64_t row = row_of(in, output);
          // a row without upstream gradient counts for nothing, even if it holds NaN
          if (row < 0 || all_zero(upstream, in.properties)) continue;
          load_hidden<decltype(type)>(in.hidden, row_offset(in.hidden, row), column, n, hidden);
          for (int64_t k = 0; k < in.properties; ++k) add_scaled(upstream[k], hidden, n, block.data() + k * n);
        }
        for (size_t i = 0; i < totals.size(); ++i) totals[i] += block[i];
        std::fill(block.begin(), block.end(), 0.0f);
      }
      for (int64_t k = 0; k < in.properties; ++k) {
        std::copy_n(totals.data() + k * n, n, to_weight + k * width + column);
      }
    }
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
