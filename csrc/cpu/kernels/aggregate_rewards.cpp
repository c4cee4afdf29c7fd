// aggregate_rewards: reads a score and what is not broadcast against it, writes one u per row of K scores; backward reads
// one upstream gradient per row too and writes the gradients that are wanted. A formula is interpreted block by block of
// rows; without one, whole tiles of scores are transformed and summed.
#include "cpu/kernels/aggregate_rewards.h"

#include "cpu/kernels/formula_rows.h"
#include "cpu/kernels/transform_tile.h"
#include "cpu/kernels/upstream.h"

namespace lsc {
namespace LSC_ISA {

namespace {

// The utilities of a tile's scores, each with its weight: what a row sums.
class Terms {
 public:
  Terms(const TransformInputs& inputs, const Aggregation& how)
      : columns_(inputs.columns), how_(how), weighted_(!is_number(how.weights, 1.0)),
        weights_(how.weights, inputs.columns, weighted_) {}

  // A missing score is certainly good if it is ignored, whatever the transform made of it.
  template <typename Tile>
  void drop_missing(const Tile& tile, float* values, int n) const {
    if (!how_.ignore_missing) return;
    alignas(64) float scores[kTile];
    tile.scores(scores);
    for (int i = 0; i < n; ++i) values[i] = scores[i] != scores[i] ? 0 : values[i];
  }

  // Nothing at all comes of a property with weight 0.
  void weigh(float* values, int64_t first, int n) {
    if (!weighted_) return;
    const float* weight = weights_.along(first, first % columns_, columns_, n);
    for (int i = 0; i < n; ++i) values[i] = weight[i] == 0 ? 0 : weight[i] * values[i];
  }

 private:
  const int64_t columns_;
  const Aggregation& how_;
  const bool weighted_;
  Spread<float> weights_;
};

template <int kColumns>
inline void sum_rows(const float* terms, int rows, float* sums) {
  for (int row = 0; row < rows; ++row) {
    float sum = terms[row * kColumns];
    for (int k = 1; k < kColumns; ++k) sum += terms[row * kColumns + k];
    sums[row] = sum;
  }
}

inline void sum_rows(const float* terms, int rows, int columns, float* sums) {
  switch (columns) {
    case 1: return sum_rows<1>(terms, rows, sums);
    case 2: return sum_rows<2>(terms, rows, sums);
    case 3: return sum_rows<3>(terms, rows, sums);
    case 4: return sum_rows<4>(terms, rows, sums);
  }
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
    for (int k = 0; k < columns; ++k) sum += terms[row * columns + k];
    sums[row] = sum;
  }
}

// What is given for each row, once for each of a tile's scores.
inline void repeat(UpstreamTile<kTile>& given, int64_t first, int n, int64_t columns, float* out) {
  const int64_t row = first / columns;
  if (columns > kTile) {
    std::fill_n(out, n, *given.along(row, 1));
    return;
  }
  const int each = int(columns);
  const float* of_row = given.along(row, n / each);
  for (int i = 0, r = 0; i < n; i += each, ++r) std::fill_n(out + i, each, of_row[r]);
}

}  // namespace

void aggregate_forward(const TransformInputs& inputs, const Aggregation& how, float* utility, int64_t begin, int64_t end) {
  const int64_t columns = inputs.columns;
  for_dtype(inputs.dtype, [&](auto type) {
    if (how.program) {
      return FormulaRows<decltype(type)>(inputs, how).values(utility, begin, end);
    }
    TransformTile<decltype(type)> tile(inputs);
    Terms terms(inputs, how);
    alignas(64) float u[kTile];
    double sum = 0;
    tile.for_each(begin, end, [&](int64_t first, int n) {
      tile.values(u);
      terms.drop_missing(tile, u, n);
      terms.weigh(u, first, n);
      if (columns <= kTile) {
        sum_rows(u, n / int(columns), int(columns), utility + first / columns);
      } else {
        if (first % columns == 0) sum = 0;
        for (int i = 0; i < n; ++i) sum += u[i];
        utility[first / columns] = float(sum);
      }
    });
  });
}

void aggregate_backward(const TransformInputs& inputs, const Aggregation& how, const Upstream& grad, const TransformGradients& out, int64_t begin, int64_t end) {
  for_dtype(inputs.dtype, [&](auto type) {
    using T = decltype(type);
    UpstreamTile<kTile> given(grad);
    if (how.program) {
      return FormulaRows<T>(inputs, how).gradients(given, out, begin, end);
    }
    TransformTile<T> tile(inputs);
    Terms terms(inputs, how);
    alignas(64) float upstream[kTile], slope[kTile], to_scores[kTile];
    tile.for_each(begin, end, [&](int64_t first, int n) {
      repeat(given, first, n, inputs.columns, upstream);
      if (out.weights) {
        tile.values(to_scores);
        terms.drop_missing(tile, to_scores, n);
        for (int i = 0; i < n; ++i) out.weights[first + i] = upstream[i] == 0 ? 0 : upstream[i] * to_scores[i];
      }
      tile.slopes(slope);
      terms.drop_missing(tile, slope, n);
      terms.weigh(upstream, first, n);
      // a slope that nobody asked for counts for nothing, even if it is NaN
      for (int i = 0; i < n; ++i) to_scores[i] = upstream[i] == 0 ? 0 : upstream[i] * slope[i];
      write_gradients(tile, to_scores, n, first, out);
    });
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
