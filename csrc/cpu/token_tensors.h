// What the ops over rows of logits share: their tensors as TokenRows, checked actions, and threads.
#pragma once

#include <string>

#include "cpu/kernels/token_kl.h"
#include "cpu/tensors.h"

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

  void check_actions() const {
    if (rows.actions_are_int32) {
      check_actions(static_cast<const int32_t*>(rows.actions));
    } else {
      check_actions(static_cast<const int64_t*>(rows.actions));
    }
  }

  TokenRows rows;
  int64_t count;

 private:
  template <typename T>
  void check_actions(const T* actions) const {
    constexpr int64_t ignore_index = -100;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t action = actions[i];
      if ((action < 0 || action >= rows.vocabulary) && action != ignore_index && (!rows.mask || rows.mask[i])) {
        throw std::out_of_range(
            "actions must be in [0, V) with V = " + std::to_string(rows.vocabulary) +
            ", or -100 to leave a position out; got " + std::to_string(action));
      }
    }
  }

  LogitRows policy_;
  std::optional<LogitRows> ref_;
  Tensor actions_;
  std::optional<Tensor> mask_, temperatures_;
};

// Below this many logits a second thread costs more than it saves.
constexpr int64_t kLogitsPerTask = 32768;

inline int64_t rows_per_task(const TokenRows& rows) { return (kLogitsPerTask + rows.vocabulary - 1) / rows.vocabulary; }

// Too few rows to keep the threads busy: several threads then share a row.
inline bool few_rows(const TokenTensors& tensors) {
  int64_t state_bytes = 0;
  const int64_t threads = torch::stable::get_num_threads();
  return threads > 1 && tensors.count < 2 * threads && LSC_DISPATCH_ISA(token_chunks)(tensors.rows, &state_bytes) > 1;
}

inline void forward_few_rows(const TokenTensors& tensors, const KLArguments* kl, const TokenOutputs& out) {
  const TokenRows& rows = tensors.rows;
  int64_t state_bytes = 0;
  const int64_t chunks = LSC_DISPATCH_ISA(token_chunks)(rows, &state_bytes);
  auto* read = LSC_DISPATCH_ISA(token_chunks_read);
  std::vector<std::max_align_t> states((tensors.count * chunks * state_bytes) / sizeof(std::max_align_t) + 1);
  torch::stable::parallel_for(0, tensors.count * chunks, 1, [&](int64_t begin, int64_t end) { read(rows, kl, states.data(), begin, end); });
  LSC_DISPATCH_ISA(token_chunks_finish)(rows, kl, states.data(), out, tensors.count);
}

inline void forward_rows(const TokenTensors& tensors, const KLArguments* kl, const TokenOutputs& out) {
  if (few_rows(tensors)) return forward_few_rows(tensors, kl, out);
  auto* forward = LSC_DISPATCH_ISA(token_rows_forward);
  torch::stable::parallel_for(0, tensors.count, rows_per_task(tensors.rows), [&](int64_t begin, int64_t end) {
    forward(tensors.rows, kl, out, begin, end);
  });
}

inline void backward_rows(const TokenTensors& tensors, const KLArguments* kl, const TokenGradients& grads) {
  const TokenRows& rows = tensors.rows;
  auto* backward = LSC_DISPATCH_ISA(token_rows_backward);
  torch::stable::parallel_for(0, tensors.count, rows_per_task(rows), [&](int64_t begin, int64_t end) { backward(rows, kl, grads, begin, end); });
}

// A gradient of [..., V], contiguous.
inline Tensor empty_gradient(const Tensor& logits) { return empty_large(logits.sizes(), logits.scalar_type()); }

inline Tensor empty_saved(int64_t count) {
  const int64_t sizes[2] = {count, kSaved};
  return empty(Sizes(sizes, 2), torch::headeronly::ScalarType::Float);
}

}  // namespace lsc
