// group_advantages on the CPU: which rows are in a group, and threads over the groups. In fp64 inside.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <numeric>

#include "cpu/kernels/group_advantages.h"
#include "cpu/segments.h"
#include "cpu/tensors.h"

namespace lsc {

namespace {

// The members of each group, one group after another, each in the order of the batch.
class Members {
 public:
  int64_t count;

  Members(const std::optional<Tensor>& ids, int64_t size, int64_t batch) : count(ids ? 0 : batch / size), size_(size), largest_(size) {
    if (ids) by_id(*ids, batch);
  }

  // The whole batch as one.
  explicit Members(int64_t batch) : count(batch > 0), size_(batch), largest_(batch) {}

  Groups groups() const {
    return {order_.empty() ? nullptr : order_.data(), bounds_.empty() ? nullptr : bounds_.data(), size_, largest_};
  }

 private:
  void by_id(const Tensor& ids, int64_t batch) {
    const std::vector<int64_t> id = integers_of(ids);
    if (!std::is_sorted(id.begin(), id.end())) sort(id);
    const auto id_at = [&](int64_t place) { return id[order_.empty() ? place : order_[place]]; };
    bounds_.push_back(0);
    for (int64_t i = 1; i <= batch; ++i) {
      if (i < batch && id_at(i) == id_at(i - 1)) continue;
      largest_ = std::max(largest_, i - bounds_.back());
      bounds_.push_back(i);
    }
    count = int64_t(bounds_.size()) - 1;
  }

  // By counting, where ids lie as close together as those of prompts do.
  void sort(const std::vector<int64_t>& id) {
    order_.resize(id.size());
    const auto [least, most] = std::minmax_element(id.begin(), id.end());
    const uint64_t range = uint64_t(*most) - uint64_t(*least);
    if (range >= 4 * id.size()) {
      std::iota(order_.begin(), order_.end(), 0);
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return id[a] < id[b]; });
      return;
    }
    std::vector<int64_t> place(range + 2);
    for (const int64_t each : id) ++place[each - *least + 1];
    std::partial_sum(place.begin(), place.end(), place.begin());
    for (size_t i = 0; i < id.size(); ++i) order_[place[id[i] - *least]++] = int64_t(i);
  }

  std::vector<int64_t> order_, bounds_;
  int64_t size_, largest_;
};

constexpr int64_t kScoresPerTask = 1 << 14;

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

// The columns by group, and with over_batch their weighted sum, the whole batch being one group.
struct Chain {
  Tensor utility;
  std::optional<Tensor> weights;
  int64_t batch;
  Members members, everyone;
  GroupColumns columns;
  GroupRules batch_rules;

  Chain(const Tensor& given, const std::optional<Tensor>& group, int64_t size, const std::optional<Tensor>& given_weights, const GroupRules& rules)
      : utility(dense(given)), weights(dense(given_weights)), batch(utility.size(0)), members(group, size, batch), everyone(batch),
        batch_rules{true, false, rules.eps} {
    const int64_t count = utility.dim() == 2 ? utility.size(1) : 1;
    columns = {typed(utility), nullptr, count, data_or_null<double>(weights), members.groups(), rules};
  }
  Chain(const Chain&) = delete;  // `columns` points into it

  // run(begin, end) for all groups.
  template <typename Run>
  void over_groups(const Run& run) const {
    const int64_t scores = batch * std::max<int64_t>(1, columns.columns), groups = members.count;
    torch::stable::parallel_for(0, groups, std::max<int64_t>(1, kScoresPerTask * groups / std::max<int64_t>(1, scores)), run);
  }

  void scores(float* advantages, double* sums) const {
    auto* kernel = LSC_DISPATCH_ISA(group_forward);
    over_groups([&](int64_t begin, int64_t end) { kernel(columns, advantages, sums, begin, end); });
  }

  std::vector<double> sums() const {
    std::vector<double> result(batch);
    scores(nullptr, result.data());
    return result;
  }

  GroupColumns whole_batch(const std::vector<double>& sums) const {
    return {columns.utility, sums.data(), 1, nullptr, everyone.groups(), batch_rules};
  }
};

}  // namespace

static Tensor forward(
    Tensor utility, std::optional<Tensor> group, int64_t size, std::optional<Tensor> weights, bool scaled, bool leave_one_out,
    bool over_batch, double eps) {
  const Chain chain(utility, group, size, weights, {scaled, leave_one_out, eps});
  const Tensor advantages = empty_large(Sizes(&chain.batch, 1), kFloat);
  if (over_batch) {
    const std::vector<double> sums = chain.sums();
    LSC_DISPATCH_ISA(group_forward)(chain.whole_batch(sums), floats(advantages), nullptr, 0, chain.everyone.count);
  } else {
    chain.scores(floats(advantages), nullptr);
  }
  return advantages;
}

static Tensor backward(
    Tensor grad, Tensor utility, std::optional<Tensor> group, int64_t size, std::optional<Tensor> weights, bool scaled,
    bool leave_one_out, bool over_batch, double eps) {
  const Chain chain(utility, group, size, weights, {scaled, leave_one_out, eps});
  const Tensor upstream = dense(grad), to_utility = empty_large(utility.sizes(), utility.scalar_type());
  auto* kernel = LSC_DISPATCH_ISA(group_backward);
  std::vector<double> to_sums;
  if (over_batch) {
    const std::vector<double> sums = chain.sums();
    to_sums.resize(chain.batch);
    kernel(chain.whole_batch(sums), floats(upstream), nullptr, to_sums.data(), 0, chain.everyone.count);
  }
  chain.over_groups([&](int64_t begin, int64_t end) {
    kernel(chain.columns, over_batch ? nullptr : floats(upstream), to_sums.data(), to_utility.data_ptr(), begin, end);
  });
  return to_utility;
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("group_advantages_forward(Tensor utility, Tensor? group, int size, Tensor? weights, bool scaled, bool leave_one_out,"
        " bool over_batch, float eps) -> Tensor");
  m.def("group_advantages_backward(Tensor grad, Tensor utility, Tensor? group, int size, Tensor? weights, bool scaled,"
        " bool leave_one_out, bool over_batch, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) {
  m.impl("group_advantages_forward", TORCH_BOX(&forward));
  m.impl("group_advantages_backward", TORCH_BOX(&backward));
}

}  // namespace lsc
