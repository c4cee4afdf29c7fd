// What the ops over rows of logits share on the CPU: checked actions, threads, and the tensors they write.
#pragma once

#include <string>

#include "cpu/kernels/token_kl.h"
#include "cpu/tensors.h"
#include "tensors/logits.h"

namespace lsc {

template <typename T>
void check_actions(const TokenTensors& tensors, const T* actions) {
  constexpr int64_t ignore_index = -100;
  const TokenRows& rows = tensors.rows;
  for (int64_t i = 0; i < tensors.count; ++i) {
    const int64_t action = actions[i];
    if ((action < 0 || action >= rows.vocabulary) && action != ignore_index && (!rows.mask || rows.mask[i])) {
      throw std::out_of_range(
          "actions must be in [0, V) with V = " + std::to_string(rows.vocabulary) +
          ", or -100 to leave a position out; got " + std::to_string(action));
    }
  }
}

inline void check_actions(const TokenTensors& tensors) {
  if (tensors.rows.actions_are_int32) {
    check_actions(tensors, static_cast<const int32_t*>(tensors.rows.actions));
  } else {
    check_actions(tensors, static_cast<const int64_t*>(tensors.rows.actions));
  }
}

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
