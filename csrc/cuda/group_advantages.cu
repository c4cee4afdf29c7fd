// group_advantages on CUDA, in double: a number per sequence.
//
// PyTorch sorts the ids on the device, stably: each group lies together, its members in the order of the batch. A warp for every
// position and column sees by its neighbour whether a group begins there; the first member's warp goes over the group, in turn
// for its mean, its spread and its results, and all other warps leave. So the host never learns how many groups there are,
// nothing waits, and a group's bits do not depend on other groups. Comparing all ids with all, which would need no sort, is B^2
// work. Groups of one size lie together as they come: a warp for each. Where the whole batch is one group, a block of 256 threads
// is its only one.
#include <array>

#include "cuda/mask.h"
#include "cuda/transform_tensors.h"
#include "math/group_spread.h"

namespace lsc {
namespace cuda {

constexpr int kBatchThreads = 256;

// Columns of a [count, columns] table in groups. Forward where no gradient is given.
struct GroupColumns {
  const double* utility;
  const float* grad;          // [count], or null
  const double* grad_double;  // [count], or null
  const double* weights;      // [columns], of the gradient, or null
  const void* ids;            // [count], sorted, or null: groups of `size`
  bool ids_are_int32;
  const int64_t* order;
  int64_t count, columns, size;  // size: 0 with ids, whose data is null where there are none
  GroupRules rules;
  double* out;

  LSC_FN int64_t places() const { return size > 0 ? count / size : count; }
};

struct WeightedSums {
  const double *table, *weights;  // weights: or null
  int64_t count, columns;
  double* out;
};

template <int kThreads>
LSC_KERNEL(kThreads, 4) group_columns(LSC_ARGUMENT GroupColumns a) {
  auto& memory = block_memory<BlockSum<kThreads>>();
  const int64_t places = a.places(), place = block_index() % places, column = block_index() / places;
  const int64_t begin = a.ids ? place : place * a.size, end = a.ids ? a.count : begin + a.size;
  const int64_t id = a.ids ? integer_at(a.ids, a.ids_are_int32, begin) : 0;
  if (a.ids && begin > 0 && integer_at(a.ids, a.ids_are_int32, begin - 1) == id) return;
  const bool backward = a.grad || a.grad_double;
  const double weight = a.weights ? a.weights[column] : 1;

  // each(row) for the group's members, shared out over the threads
  const auto members = [&](const auto& each) {
    for (int64_t i = begin + thread_index(); i < end && (!a.ids || integer_at(a.ids, a.ids_are_int32, i) == id); i += kThreads) {
      each(a.ids ? a.order[i] : i);
    }
  };
  const auto utility = [&](int64_t row) { return a.utility[row * a.columns + column]; };
  const auto upstream = [&](int64_t row) { return weight * (a.grad ? double(a.grad[row]) : a.grad_double[row]); };

  double n = 0, sum = 0, sum_grad = 0, squares = 0, along = 0;
  members([&](int64_t row) {
    n += 1, sum += utility(row);
    if (backward) sum_grad += upstream(row);
  });
  n = block_sum(memory, n);
  const double mean = block_sum(memory, sum) / n, mean_grad = block_sum(memory, sum_grad) / n;
  members([&](int64_t row) {
    const double centred = utility(row) - mean;
    squares += centred * centred;
    if (backward) along += upstream(row) * centred;
  });
  squares = block_sum(memory, squares), along = block_sum(memory, along);
  const GroupSpread spread(n, mean, squares, a.rules);
  const double slope = spread.slope(along);
  members([&](int64_t row) {
    const double u = utility(row);
    a.out[row * a.columns + column] = backward ? spread.gradient(upstream(row), u, mean_grad, slope) : spread.advantage(u);
  });
}

LSC_KERNEL(kElementThreads, 1) weighted_sums(LSC_ARGUMENT WeightedSums a) {
  const int64_t row = block_index() * kElementThreads + thread_index();
  if (row >= a.count) return;
  double sum = 0;
  for (int64_t k = 0; k < a.columns; ++k) sum += (a.weights ? a.weights[k] : 1.0) * a.table[row * a.columns + k];
  a.out[row] = sum;
}

namespace {

struct Sorted {
  Tensor ids, order;
};

Sorted sorted(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

constexpr auto kDouble = torch::headeronly::ScalarType::Double;

Tensor in(torch::headeronly::ScalarType dtype, const Tensor& tensor) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.data_ptr()); }

// The stages: columns by group, then with over_batch their weighted sums over the whole batch.
struct Stages {
  Tensor utility;
  std::optional<Tensor> weights;
  std::optional<Sorted> groups;
  GroupColumns columns;
  bool over_batch;

  Stages(const Tensor& given, const std::optional<Tensor>& group, int64_t size, const std::optional<Tensor>& given_weights, const GroupRules& rules, bool over)
      : utility(dense(in(kDouble, given))), weights(dense(given_weights)), over_batch(over) {
    columns = {doubles(utility), nullptr, nullptr, nullptr, nullptr, false, nullptr,
               utility.size(0), utility.dim() == 2 ? utility.size(1) : 1, size, rules, nullptr};
    if (!group) return;
    groups = sorted(*group);
    columns.ids = groups->ids.data_ptr();
    columns.ids_are_int32 = groups->ids.scalar_type() == torch::headeronly::ScalarType::Int;
    columns.order = static_cast<const int64_t*>(groups->order.data_ptr());
  }

  Tensor empty_like(const Tensor& like) const { return empty_on(utility, like.sizes(), kDouble); }
  Tensor per_row() const { return empty_on(utility, Sizes(&columns.count, 1), kDouble); }

  void each(GroupColumns a, const Tensor& out) const {
    a.out = doubles(out);
    launch(&group_columns<kWarp>, a.places() * a.columns, kWarp, utility, a);
  }

  Tensor sums() const {
    const Tensor table = empty_like(utility), out = per_row();
    each(columns, table);
    launch(&weighted_sums, element_blocks(columns.count), kElementThreads, utility,
           WeightedSums{doubles(table), data_or_null<double>(weights), columns.count, columns.columns, doubles(out)});
    return out;
  }

  Tensor batch(const Tensor& sums, const float* grad) const {
    const Tensor out = per_row();
    launch(&group_columns<kBatchThreads>, columns.count > 0, kBatchThreads, utility,
           GroupColumns{doubles(sums), grad, nullptr, nullptr, nullptr, false, nullptr, columns.count, 1, columns.count, {true, false, columns.rules.eps}, doubles(out)});
    return out;
  }
};

}  // namespace

static Tensor forward(
    Tensor utility, std::optional<Tensor> group, int64_t size, std::optional<Tensor> weights, bool scaled, bool leave_one_out,
    bool over_batch, double eps) {
  constexpr auto result = torch::headeronly::ScalarType::Float;
  const Stages stages(utility, group, size, weights, {scaled, leave_one_out, eps}, over_batch);
  if (over_batch) return in(result, stages.batch(stages.sums(), nullptr));
  const Tensor advantages = stages.per_row();
  stages.each(stages.columns, advantages);
  return in(result, advantages);
}

static Tensor backward(
    Tensor grad, Tensor utility, std::optional<Tensor> group, int64_t size, std::optional<Tensor> weights, bool scaled,
    bool leave_one_out, bool over_batch, double eps) {
  const Stages stages(utility, group, size, weights, {scaled, leave_one_out, eps}, over_batch);
  const Tensor upstream = dense(grad), to_utility = stages.empty_like(stages.utility);
  GroupColumns columns = stages.columns;
  columns.weights = data_or_null<double>(stages.weights);
  std::optional<Tensor> to_sums;
  if (over_batch) {
    to_sums = stages.batch(stages.sums(), floats(upstream));
    columns.grad_double = doubles(*to_sums);
  } else {
    columns.grad = floats(upstream);
  }
  stages.each(columns, to_utility);
  return in(utility.scalar_type(), to_utility);
}

LSC_CUDA_OPS(m) {
  m.impl("group_advantages_forward", TORCH_BOX(&forward));
  m.impl("group_advantages_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
