// What the ops over rows of logits share: their tensors as TokenRows.
#pragma once

#include "tensors/tensor.h"

namespace lsc {

// A [..., V] tensor as rows, copied only where the vocabulary is not dense.
struct LogitRows {
  explicit LogitRows(const Tensor& logits) : tensor(logits) {
    const int64_t last = logits.dim() - 1;
    if (logits.size(last) > 1 && logits.stride(last) != 1) tensor = torch::stable::contiguous(logits);
    rows.data = tensor.data_ptr();
    rows.dtype = dtype_of(tensor);
    if (!join_dimensions(tensor, last, kMaxLeading, rows.leading, rows.sizes, rows.strides)) {
      throw std::invalid_argument("logits have too many dimensions that do not lie as one");
    }
  }

  Tensor tensor;
  Rows rows;
};

// The arguments of a row op, held alive while its kernels run.
class TokenTensors {
 public:
  TokenTensors(
      const Tensor& policy, const std::optional<Tensor>& ref, const Tensor& actions, const std::optional<Tensor>& mask,
      const std::optional<Tensor>& temperatures, double temperature)
      : policy_(policy), actions_(dense(actions)), mask_(dense(mask)), temperatures_(dense(temperatures)) {
    if (ref) ref_.emplace(*ref);
    rows.vocabulary = policy.size(policy.dim() - 1);
    rows.policy = policy_.rows;
    rows.ref = ref_ ? ref_->rows : Rows{};
    rows.actions = actions_.data_ptr();
    rows.actions_are_int32 = actions_.scalar_type() == torch::headeronly::ScalarType::Int;
    rows.mask = data_or_null<bool>(mask_);
    rows.temperatures = data_or_null<double>(temperatures_);
    rows.temperature = temperature;
    count = actions_.numel();
  }

  Sizes sizes() const { return actions_.sizes(); }

  TokenRows rows;
  int64_t count;

 private:
  LogitRows policy_;
  std::optional<LogitRows> ref_;
  Tensor actions_;
  std::optional<Tensor> mask_, temperatures_;
};

}  // namespace lsc
