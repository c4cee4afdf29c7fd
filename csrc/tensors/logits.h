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
    rows.leading = 1;
    rows.sizes[0] = 1, rows.strides[0] = 0;
    for (int64_t d = 0; d < last; ++d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (size == 1) continue;
      int64_t& inner_size = rows.sizes[rows.leading - 1];
      int64_t& inner_stride = rows.strides[rows.leading - 1];
      if (inner_size == 1 || inner_stride == size * stride) {
        inner_size *= size, inner_stride = stride;
      } else {
        if (rows.leading == kMaxLeading) throw std::invalid_argument("logits have too many dimensions that do not lie as one");
        rows.sizes[rows.leading] = size, rows.strides[rows.leading] = stride;
        ++rows.leading;
      }
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
