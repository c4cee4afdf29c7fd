// group_advantages: a group's column is brought into an array of doubles, where its members lie side by side whatever their
// dtype and place, and is gone over three times there: for its mean, its spread and its results.
//
// Bytes: utility, and in backward the upstream gradient, read once; one result per row, or per score, written once.
#include "cpu/kernels/group_advantages.h"

#include <vector>

#include "cpu/kernels/tiles.h"
#include "math/group_spread.h"

namespace lsc {
namespace LSC_ISA {

namespace {

template <typename T>
inline double number(T value) { return double(to_float(value)); }
template <>
inline double number(double value) { return value; }

template <typename T>
inline void put(double value, T* out) { from_float(float(value), out); }
template <>
inline void put(double value, double* out) { *out = value; }

// Calls run(table) with the table's data.
template <typename Run>
inline void for_table(const GroupColumns& in, const Run& run) {
  if (in.sums) return run(in.sums);
  for_dtype(in.utility.dtype, [&](auto type) { run(static_cast<const decltype(type)*>(in.utility.data)); });
}

// The members of a group: rows of the batch.
struct Members {
  int64_t n;
  const int64_t* rows;  // null: one after another from `first`
  int64_t first;

  Members(const Groups& groups, int64_t group) {
    first = groups.bounds ? groups.bounds[group] : group * groups.size;
    n = groups.bounds ? groups.bounds[group + 1] - first : groups.size;
    rows = groups.order ? groups.order + first : nullptr;
  }

  // each(i, row) for all of them.
  template <typename Each>
  void for_each(const Each& each) const {
    if (rows) {
      for (int64_t i = 0; i < n; ++i) each(i, rows[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) each(i, first + i);
    }
  }

  template <typename T>
  void load(const T* table, int64_t columns, int64_t column, double* out) const {
    if (columns == 1) return for_each([&](int64_t i, int64_t row) { out[i] = number(table[row]); });
    for_each([&](int64_t i, int64_t row) { out[i] = number(table[row * columns + column]); });
  }
};

// The sum of term(i), in partial sums that are the same for every instruction set.
template <typename Term>
inline double sum_of(int64_t n, const Term& term) {
  constexpr int kPartial = 8;
  double partial[kPartial] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kPartial <= n; i += kPartial) {
    for (int j = 0; j < kPartial; ++j) partial[j] += term(i + j);
  }
  for (; i < n; ++i) sum += term(i);
  if (n < kPartial) return sum;
  return sum + (((partial[0] + partial[4]) + (partial[2] + partial[6])) + ((partial[1] + partial[5]) + (partial[3] + partial[7])));
}

inline GroupSpread spread_of(const double* x, int64_t n, const GroupRules& rules) {
  const double mean = sum_of(n, [&](int64_t i) { return x[i]; }) / double(n);
  const double squares = rules.scaled ? sum_of(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) : 0;
  return {double(n), mean, squares, rules};
}

template <typename Table, typename Out>
void forward(const GroupColumns& in, const Table* table, Out* out, int64_t begin, int64_t end) {
  std::vector<double> x(in.groups.largest), sums(in.groups.largest);
  for (int64_t g = begin; g < end; ++g) {
    const Members members(in.groups, g);
    for (int64_t k = 0; k < in.columns; ++k) {
      members.load(table, in.columns, k, x.data());
      const GroupSpread spread = spread_of(x.data(), members.n, in.rules);
      const double weight = in.weights ? in.weights[k] : 1;
      for (int64_t i = 0; i < members.n; ++i) sums[i] = (k ? sums[i] : 0) + weight * spread.advantage(x[i]);
    }
    members.for_each([&](int64_t i, int64_t row) { put(sums[i], out + row); });
  }
}

template <typename Table, typename Grad>
void backward(const GroupColumns& in, const Table* table, const Grad* grad, Table* out, int64_t begin, int64_t end) {
  std::vector<double> x(in.groups.largest), g(in.groups.largest);
  for (int64_t group = begin; group < end; ++group) {
    const Members members(in.groups, group);
    for (int64_t k = 0; k < in.columns; ++k) {
      members.load(table, in.columns, k, x.data());
      members.load(grad, 1, 0, g.data());
      const double weight = in.weights ? in.weights[k] : 1;
      for (int64_t i = 0; i < members.n; ++i) g[i] *= weight;
      const GroupSpread spread = spread_of(x.data(), members.n, in.rules);
      const double mean_grad = sum_of(members.n, [&](int64_t i) { return g[i]; }) / double(members.n);
      const double slope = in.rules.scaled ? spread.slope(sum_of(members.n, [&](int64_t i) { return g[i] * (x[i] - spread.mean); })) : 0;
      for (int64_t i = 0; i < members.n; ++i) g[i] = spread.gradient(g[i], x[i], mean_grad, slope);
      members.for_each([&](int64_t i, int64_t row) { put(g[i], out + row * in.columns + k); });
    }
  }
}

}  // namespace

void group_forward(const GroupColumns& in, float* advantages, double* sums, int64_t begin, int64_t end) {
  for_table(in, [&](const auto* table) {
    if (sums) return forward(in, table, sums, begin, end);
    forward(in, table, advantages, begin, end);
  });
}

void group_backward(const GroupColumns& in, const float* grad, const double* grad_of_sums, void* out, int64_t begin, int64_t end) {
  for_table(in, [&]<typename Table>(const Table* table) {
    if (grad) return backward(in, table, grad, static_cast<Table*>(out), begin, end);
    backward(in, table, grad_of_sums, static_cast<Table*>(out), begin, end);
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
