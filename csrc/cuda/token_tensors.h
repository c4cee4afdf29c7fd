// What the ops over rows of logits share on the host: their tensors as TokenRows, how many blocks share a row, and which
// of the kernels of cuda/token_rows.h runs.
#pragma once

#include "cuda/tensors.h"
#include "cuda/token_rows.h"

namespace lsc {
namespace cuda {

// Enough to fill a multiprocessor.
constexpr int64_t kBlocksPerMultiprocessor = 4;

inline int64_t blocks_wanted(const Tensor& on) { return kBlocksPerMultiprocessor * multiprocessors(on); }

inline int blocks_per_row(const TokenTensors& tensors, const Tensor& on) {
  const int64_t chunks = (tensors.rows.vocabulary + kChunk - 1) / kChunk;
  const int64_t wanted = blocks_wanted(on), rows = std::max<int64_t>(1, tensors.count);
  return int(std::clamp<int64_t>((wanted + rows - 1) / rows, 1, chunks));
}

// Memory in which blocks that share a row leave its chunks' states and count how many are done; kept while the launch is
// prepared. The counters are the stream's, except in a graph: it may run beside other work of the stream that it was captured
// from, so it has counters of its own, which it sets to 0 itself.
struct Workspace {
  std::optional<Tensor> states, arrivals;

  Workspace(TokenForward& a, const TokenTensors& tensors, const Tensor& on) {
    if (a.blocks_per_row == 1) return;
    const int64_t chunks = (tensors.rows.vocabulary + kChunk - 1) / kChunk;
    const int64_t bytes = tensors.count * chunks * int64_t(sizeof(RowState<double>)), counters = tensors.count;
    states = empty_on(on, Sizes(&bytes, 1), torch::headeronly::ScalarType::Byte);
    a.states = static_cast<RowState<double>*>(states->data_ptr());
    if (is_captured(on)) {
      arrivals = empty_on(on, Sizes(&counters, 1), torch::headeronly::ScalarType::Int);
      a.arrivals = static_cast<unsigned*>(arrivals->data_ptr());
      clear(on, a.arrivals, size_t(counters) * sizeof(unsigned));
    } else {
      a.arrivals = stream_counters(on, blocks_wanted(on));  // rows that are shared are fewer
    }
  }
};

inline TokenForward forward_arguments(const TokenTensors& tensors, const KLArguments* kl, const TokenOutputs& out, const Tensor& on) {
  return {tensors.rows, kl ? *kl : KLArguments{}, kl != nullptr, out, blocks_per_row(tensors, on), nullptr, nullptr};
}

inline TokenBackward backward_arguments(
    const TokenTensors& tensors, const KLArguments* kl, const TokenGradients& grads, const Tensor& on) {
  return {tensors.rows, kl ? *kl : KLArguments{}, kl != nullptr, grads, blocks_per_row(tensors, on)};
}

// Calls with(T{}) for the type of both models' logits, Mixed where they have two.
template <typename With>
void with_logits(const TokenRows& rows, const With& with) {
  if (rows.policy.dtype != rows.ref.dtype) return with(Mixed{});
  switch (rows.policy.dtype) {
    case DType::float32: return with(float{});
    case DType::bfloat16: return with(BFloat16{});
    case DType::float16: return with(Half{});
  }
}

inline Tensor saved_on(const Tensor& like, int64_t count) {
  const int64_t sizes[2] = {count, kSaved};
  return floats_on(like, Sizes(sizes, 2));
}

}  // namespace cuda
}  // namespace lsc
