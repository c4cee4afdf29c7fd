// group_advantages on the CPU. A number per sequence, once per step: plain fp64, one thread, no build per instruction set.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "cpu/segments.h"
#include "cpu/tensors.h"
#include "math/group_spread.h"

namespace lsc {

namespace {

// The members of each group, one group after another, each in the order of the batch.
struct Groups {
  std::vector<int64_t> members, bounds{0};

  explicit Groups(const Tensor& ids) : members(ids.size(0)) {
    std::vector<int64_t> id(members.size());
    for (size_t i = 0; i < id.size(); ++i) id[i] = integer_at(ids, int64_t(i));
    std::iota(members.begin(), members.end(), 0);
    std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
    for (size_t i = 1; i <= members.size(); ++i) {
      if (i == members.size() || id[members[i]] != id[members[i - 1]]) bounds.push_back(int64_t(i));
    }
  }

  // The whole batch as one.
  explicit Groups(int64_t batch) : members(batch) {
    std::iota(members.begin(), members.end(), 0);
    if (batch) bounds.push_back(batch);
  }

  template <typename Each>
  void for_each(const Each& each) const {
    for (size_t g = 0; g + 1 < bounds.size(); ++g) each(members.data() + bounds[g], bounds[g + 1] - bounds[g]);
  }
};

// A column of a [B, K] table.
struct Column {
  double* values;
  int64_t stride;
  double& operator[](int64_t row) const { return values[row * stride]; }
};

Spread spread_of(const Column& utility, const int64_t* members, int64_t n, const GroupRules& rules) {
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) sum += utility[members[i]];
  const double mean = sum / double(n);
  for (int64_t i = 0; i < n; ++i) squares += (utility[members[i]] - mean) * (utility[members[i]] - mean);
  return {double(n), mean, squares, rules};
}

// In place: utilities become advantages.
void score(const Column& column, const Groups& groups, const GroupRules& rules) {
  groups.for_each([&](const int64_t* members, int64_t n) {
    const Spread spread = spread_of(column, members, n, rules);
    for (int64_t i = 0; i < n; ++i) column[members[i]] = spread.advantage(column[members[i]]);
  });
}

// In place: the gradient to the advantages becomes that to the utilities.
void score_backward(const Column& grad, const Column& utility, const Groups& groups, const GroupRules& rules) {
  groups.for_each([&](const int64_t* members, int64_t n) {
    const Spread spread = spread_of(utility, members, n, rules);
    double sum = 0, along = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double g = grad[members[i]];
      sum += g;
      along += g * (utility[members[i]] - spread.mean);
    }
    const double slope = spread.slope(along);
    for (int64_t i = 0; i < n; ++i) {
      double& g = grad[members[i]];
      g = spread.gradient(g, utility[members[i]], sum / double(n), slope);
    }
  });
}

// Forward: the table of utilities becomes that of the scores, and the sum of its columns.
struct Chain {
  int64_t batch, columns;
  std::vector<double> table, weights;
  Groups groups;
  GroupRules rules;
  bool over_batch;

  Chain(const Tensor& utility, const Tensor& group, const std::optional<Tensor>& weight, const GroupRules& rules, bool over_batch)
      : batch(utility.size(0)), columns(utility.dim() == 2 ? utility.size(1) : 1), weights(columns, 1.0), groups(group), rules(rules),
        over_batch(over_batch) {
    const Tensor contiguous = dense(utility);
    const auto* values = static_cast<const double*>(contiguous.data_ptr());
    table.assign(values, values + batch * columns);
    if (!weight) return;
    const Tensor given = dense(*weight);
    std::copy_n(static_cast<const double*>(given.data_ptr()), columns, weights.begin());
  }

  Column column(std::vector<double>& of, int64_t k) const { return {of.data() + k, columns}; }

  std::vector<double> weighted_sum(std::vector<double> scores) const {
    std::vector<double> sums(batch);
    for (int64_t k = 0; k < columns; ++k) score(column(scores, k), groups, rules);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t k = 0; k < columns; ++k) sums[b] += weights[k] * scores[b * columns + k];
    }
    return sums;
  }

  GroupRules batch_rules() const { return {true, false, rules.eps}; }
};

Tensor doubles(Sizes sizes) { return empty(sizes, torch::headeronly::ScalarType::Double); }

}  // namespace

// utility, weights and the result are of doubles, grad of floats.
static Tensor forward(
    Tensor utility, Tensor group, std::optional<Tensor> weights, bool scaled, bool leave_one_out, bool over_batch, double eps) {
  const Chain chain(utility, group, weights, {scaled, leave_one_out, eps}, over_batch);
  std::vector<double> sums = chain.weighted_sum(chain.table);
  if (over_batch) score({sums.data(), 1}, Groups(chain.batch), chain.batch_rules());
  const Tensor advantages = doubles(Sizes(&chain.batch, 1));
  std::copy(sums.begin(), sums.end(), static_cast<double*>(advantages.data_ptr()));
  return advantages;
}

static Tensor backward(
    Tensor grad, Tensor utility, Tensor group, std::optional<Tensor> weights, bool scaled, bool leave_one_out, bool over_batch,
    double eps) {
  Chain chain(utility, group, weights, {scaled, leave_one_out, eps}, over_batch);
  const Tensor upstream = dense(grad);
  std::vector<double> to_sums(floats(upstream), floats(upstream) + chain.batch);
  if (over_batch) {
    std::vector<double> sums = chain.weighted_sum(chain.table);
    score_backward({to_sums.data(), 1}, {sums.data(), 1}, Groups(chain.batch), chain.batch_rules());
  }
  const Tensor to_utility = doubles(utility.sizes());
  auto* out = static_cast<double*>(to_utility.data_ptr());
  for (int64_t k = 0; k < chain.columns; ++k) {
    for (int64_t b = 0; b < chain.batch; ++b) out[b * chain.columns + k] = chain.weights[k] * to_sums[b];
    score_backward({out + k, chain.columns}, chain.column(chain.table, k), chain.groups, chain.rules);
  }
  return to_utility;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("group_advantages_forward(Tensor utility, Tensor group, Tensor? weights, bool scaled, bool leave_one_out, bool over_batch,"
        " float eps) -> Tensor");
  m.def("group_advantages_backward(Tensor grad, Tensor utility, Tensor group, Tensor? weights, bool scaled, bool leave_one_out,"
        " bool over_batch, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("group_advantages_forward", TORCH_BOX(&forward));
  m.impl("group_advantages_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
