// Rows of scores through a formula, a vector of them at a time.
//
// Design constraint: a formula is interpreted once per vector of rows, not per row, and what an instruction does to it is a few
// multiplications. So probabilities and their complements themselves are multiplied and added, in double, with one
// exponential per property and one logarithm per row. That keeps every digit unless a row's scores are so far out that some
// product of them leaves a double's range; such a row, or one with NaN or infinity, is evaluated on its own, in logarithms.
// Which way is taken depends on nothing but the row.
#pragma once

#include <algorithm>
#include <memory>

#include "cpu/kernels/aggregate_rewards.h"
#include "cpu/kernels/doubles.h"
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/transform_tile.h"
#include "cpu/kernels/upstream.h"
#include "math/formula.h"

namespace lsc {
namespace LSC_ISA {

namespace {

// Where the product over a row's properties of the smaller of p and 1 - p is below, logarithms are taken. It bounds every value
// and, inverted, every slope; the upstream gradient comes on top.
constexpr double kRoom = 1e-200;

// What a vector waits for is hidden by the other vectors of its block.
constexpr int kBlockVectors = 8;
constexpr int kBlockRows = kBlockVectors * Doubles::kLanes;
static_assert(kBlockRows <= kTile);

template <typename T>
class FormulaRows {
 public:
  FormulaRows(const TransformInputs& inputs, const Aggregation& how)
      : inputs_(inputs), how_(how), program_(*how.program), scaled_(!is_number(inputs.scale, 1.0)),
        has_floor_(!is_number(inputs.floor, 0.0)), weighted_(!is_number(how.weights, 1.0)) {
    for (int i = 0; i < program_.length; ++i) {
      if (program_.instructions[i].kind == Instruction::Kind::property) instruction_[properties_++] = i;
    }
    judged_.reset(new Judged<Doubles>[kBlockVectors * properties_]);
    values_.reset(new Judgement<Doubles>[program_.length]);
  }

  void values(float* utility, int64_t begin, int64_t end) {
    for_each_block(begin, end, [&](int64_t first, int n) {
      judge_block();
      Doubles good[kBlockVectors], bad[kBlockVectors];
      for (int j = 0; j < vectors_; ++j) {
        const Judgement<Doubles>& whole = evaluate(program_, judged(j), values_.get());
        good[j] = whole.good, bad[j] = whole.bad;
      }
      float u[kBlockRows];
      for (int j = 0; j < vectors_; ++j) store_rounded(u + j * Doubles::kLanes, logarithm(good[j], bad[j]));
      for (int i = 0; i < n; ++i) utility[first + i] = has_room(i) ? u[i] : value(first + i);
    });
  }

  // Of every gradient that is wanted: 0 for the columns that the formula does not name, and for all of a row where nobody asked.
  void gradients(UpstreamTile<kTile>& given, const TransformGradients& out, int64_t begin, int64_t end) {
    const int64_t columns = inputs_.columns;
    if (columns > properties_) {
      const int64_t from = begin * columns, count = (end - begin) * columns;
      std::fill_n(static_cast<T*>(out.scores) + from, count, T{});
      for (float* each : {out.reference, out.scale, out.weights}) {
        if (each) std::fill_n(each + from, count, 0.0f);
      }
    }
    const std::unique_ptr<Slope<Doubles>[]> slopes(new Slope<Doubles>[program_.length]);
    const std::unique_ptr<Visited<Doubles>[]> visited(new Visited<Doubles>[properties_]);
    for_each_block(begin, end, [&](int64_t first, int n) {
      judge_block();
      const float* grad = given.along(first, n);
      for (int j = 0; j < vectors_; ++j) {
        evaluate(program_, judged(j), values_.get());
        differentiate(program_, values_.get(), slopes.get(), visited.get());
        float upstream[Doubles::kLanes];
        const int at = j * Doubles::kLanes, own = std::min(Doubles::kLanes, n - at);
        for (int i = 0; i < Doubles::kLanes; ++i) upstream[i] = i < own ? grad[at + i] : 0.0f;
        for (int i = 0; i < properties_; ++i) property_gradients(i, slopes[instruction_[i]], load_doubles(upstream), j, own, out);
      }
      for (int i = 0; i < n; ++i) {
        if (!has_room(i)) gradients(first + i, grad[i], out);
      }
    });
  }

 private:
  int64_t column_of(int property) const { return program_.instructions[instruction_[property]].operand; }

  double at_score(const Operand& operand, int64_t at) const {
    switch (operand.layout) {
      case Operand::Layout::column: return operand.data[at % inputs_.columns];
      case Operand::Layout::full: return operand.data[at];
      case Operand::Layout::number: break;
    }
    return operand.number;
  }

  double score(int64_t at) const { return to_float(static_cast<const T*>(inputs_.scores)[at]); }

  double centred(int64_t at) const {
    return (score(at) - at_score(inputs_.reference, at)) / at_score(inputs_.scale, at);
  }

  // ---- a block ----

  // each(first, n) for blocks of up to kBlockRows rows; what lies beyond n repeats the last.
  template <typename Each>
  void for_each_block(int64_t begin, int64_t end, const Each& each) {
    for (int64_t first = begin; first < end; first += kBlockRows) {
      const int n = int(std::min<int64_t>(kBlockRows, end - first));
      vectors_ = (n + Doubles::kLanes - 1) / Doubles::kLanes;
      for (int i = 0; i < vectors_ * Doubles::kLanes; ++i) begins_[i] = (first + std::min(i, n - 1)) * inputs_.columns;
      each(first, n);
    }
  }

  bool has_room(int row) const { return room_[row] > kRoom; }

  // The properties of vector j of the block.
  Judged<Doubles>* judged(int j) const { return judged_.get() + j * properties_; }

  // Of vector j, a column of a table as large as the scores.
  template <typename From>
  Doubles gathered(const From* table, int64_t column, int j) const {
    DoubleLanes lanes;
    for (int i = 0; i < Doubles::kLanes; ++i) lanes[i] = to_float(table[begins_[j * Doubles::kLanes + i] + column]);
    return lanes;
  }

  Doubles operand(const Operand& operand, int64_t column, int j) const {
    switch (operand.layout) {
      case Operand::Layout::column: return Doubles(double(operand.data[column]));
      case Operand::Layout::full: return gathered(operand.data, column, j);
      case Operand::Layout::number: break;
    }
    return Doubles(operand.number);
  }

  Doubles scores(int64_t column, int j) const { return gathered(static_cast<const T*>(inputs_.scores), column, j); }

  Doubles centred(int64_t column, int j) const {
    const Doubles difference = scores(column, j) - operand(inputs_.reference, column, j);
    return scaled_ ? difference / operand(inputs_.scale, column, j) : difference;
  }

  void judge_block() {
    Doubles room[kBlockVectors], z[kBlockVectors], e[kBlockVectors];
    std::fill_n(room, kBlockVectors, Doubles(1.0));
    for (int i = 0; i < properties_; ++i) {
      const int64_t column = column_of(i);
      for (int j = 0; j < vectors_; ++j) z[j] = centred(column, j);
      for (int j = 0; j < vectors_; ++j) e[j] = exponential_of_negative(Doubles(0.0) - abs(z[j]));
      for (int j = 0; j < vectors_; ++j) room[j] = room[j] * judge_rows(judged(j)[i], z[j], e[j], column, j);
    }
    static_assert(sizeof room == sizeof room_);
    std::memcpy(room_, room, sizeof room_);
  }

  // A property from z and e^-|z|, as `judge` of math/formula.h; gives the smallest of its probabilities, what is certain by decree
  // not counting.
  Doubles judge_rows(Judged<Doubles>& property, Doubles z, Doubles e, int64_t column, int j) const {
    const Doubles zero(0.0), one(1.0), larger = one / (one + e), smaller = e * larger;
    const Chosen below = z < zero;
    Doubles good = select(below, smaller, larger), bad = select(below, larger, smaller), slope = bad, least = smaller;
    if (has_floor_) {
      const Doubles floor = operand(inputs_.floor, column, j), right = one - floor, sigmoid = good;
      good = floor + right * sigmoid, bad = right * bad;
      // beyond 700 the exponential is that of 700, which a gradient times z would show
      slope = bad * sigmoid / good, least = select(abs(z) < Doubles(700.0), smaller_of(good, bad), zero);
    }
    Doubles unweighted_good = good, unweighted_bad = bad;
    if (weighted_) {
      const Doubles weight = operand(how_.weights, column, j);
      const ExponentialPair power = exponential_pair(weight * logarithm(good, bad));
      good = power.power, bad = power.rest, slope = weight * slope;
      // nothing at all comes of a property with weight 0
      least = select(weight == zero, least, smaller_of(least, smaller_of(good, bad)));
    }
    if (how_.ignore_missing) {
      const Chosen missing = is_nan(scores(column, j));
      good = select(missing, one, good), bad = select(missing, zero, bad), slope = select(missing, zero, slope);
      unweighted_good = select(missing, one, unweighted_good), unweighted_bad = select(missing, zero, unweighted_bad);
      least = select(missing, one, least);
    }
    property.weighted.good = good, property.weighted.bad = bad, property.slope = slope;
    property.unweighted.good = unweighted_good, property.unweighted.bad = unweighted_bad;
    return least;
  }

  // The gradients of vector j's n first rows to a property.
  void property_gradients(int property, const Slope<Doubles>& slope, Doubles upstream, int j, int n, const TransformGradients& out) const {
    const Judged<Doubles>& own = judged(j)[property];
    const int64_t column = column_of(property);
    const Doubles size = slope_at(own, slope), zero(0.0);
    // what nobody asked for counts for nothing, even if it is NaN
    const Chosen none = either(upstream == zero, size == zero);
    const Doubles factor = Doubles(slope.falls ? -1.0 : 1.0) * upstream * size;
    Doubles to_score = select(none, zero, factor * own.slope);
    if (scaled_) to_score = to_score / operand(inputs_.scale, column, j);
    const int64_t* begins = begins_ + j * Doubles::kLanes;
    scatter(to_score, begins, n, static_cast<T*>(out.scores) + column);
    if (out.reference) scatter(zero - to_score, begins, n, out.reference + column);
    if (out.scale) scatter(select(to_score == zero, zero, zero - to_score * centred(column, j)), begins, n, out.scale + column);
    if (out.weights) {
      const Doubles log_p = logarithm(own.unweighted.good, own.unweighted.bad);
      scatter(select(none, zero, factor * log_p), begins, n, out.weights + column);
    }
  }

  template <typename To>
  static void scatter(Doubles values, const int64_t* places, int n, To* table) {
    float rounded[Doubles::kLanes];
    store_rounded(rounded, values);
    for (int i = 0; i < n; ++i) from_float(rounded[i], table + places[i]);
  }

  // ---- a row in logarithms ----

  void judge_row(int64_t row) {
    for (int i = 0; i < properties_; ++i) {
      const int64_t at = row * inputs_.columns + column_of(i);
      const double given = score(at);
      row_.judged[i] = how_.ignore_missing && given != given
                           ? certainly_good()
                           : judge(centred(at), at_score(inputs_.floor, at), at_score(how_.weights, at));
    }
  }

  float value(int64_t row) {
    judge_row(row);
    return float(evaluate(program_, row_.judged, row_.values).good.log);
  }

  void gradients(int64_t row, double upstream, const TransformGradients& out) {
    if (upstream != 0) {
      judge_row(row);
      evaluate(program_, row_.judged, row_.values);
      differentiate(program_, row_.values, row_.slopes, row_.visited);
    }
    for (int i = 0; i < properties_; ++i) {
      const int64_t at = row * inputs_.columns + column_of(i);
      const PropertyGradient of_property =
          upstream == 0 ? PropertyGradient{0.0, 0.0} : gradient(row_.judged[i], row_.slopes[instruction_[i]]);
      const double to_score = upstream * of_property.z / at_score(inputs_.scale, at);
      from_float(float(to_score), static_cast<T*>(out.scores) + at);
      if (out.reference) out.reference[at] = float(-to_score);
      if (out.scale) out.scale[at] = to_score == 0 ? 0.0f : float(-to_score * centred(at));
      if (out.weights) out.weights[at] = float(upstream * of_property.weight);
    }
  }

  const TransformInputs& inputs_;
  const Aggregation& how_;
  const Program& program_;
  const bool scaled_, has_floor_, weighted_;
  int properties_ = 0, instruction_[kMaxProperties];
  // the block in place
  int vectors_;
  int64_t begins_[kBlockRows];
  double room_[kBlockRows];
  std::unique_ptr<Judged<Doubles>[]> judged_;
  std::unique_ptr<Judgement<Doubles>[]> values_;
  struct {
    Judged<Log> judged[kMaxProperties];
    Judgement<Log> values[kMaxInstructions];
    Slope<Log> slopes[kMaxInstructions];
    Visited<Log> visited[kMaxProperties];
  } row_;
};

}  // namespace

}  // namespace LSC_ISA
}  // namespace lsc
