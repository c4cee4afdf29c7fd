// token_kl and token_logprobs over rows [begin, end), or over chunks of rows where rows are few.
#include "cpu/kernels/token_kl.h"

#include <cstring>

#include "cpu/kernels/token_rows.h"

namespace lsc {
namespace LSC_ISA {

namespace {

int64_t chunks_of(const TokenRows& rows) { return (rows.vocabulary + kChunk - 1) / kChunk; }

}  // namespace

void token_rows_forward(const TokenRows& rows, const KLArguments* kl, const TokenOutputs& out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!counted(rows, row)) {
      write_nothing(row, out);
    } else {
      write_row(rows, row, is_reverse(kl) ? read_row<true>(rows, row) : read_row<false>(rows, row), kl, out);
    }
  }
}

int64_t token_chunks(const TokenRows& rows, int64_t* state_bytes) {
  *state_bytes = sizeof(RowState<double>);
  return chunks_of(rows);
}

void token_chunks_read(const TokenRows& rows, const KLArguments* kl, void* states, int64_t begin, int64_t end) {
  const int64_t chunks = chunks_of(rows);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / chunks, first = i % chunks * kChunk;
    const int64_t last = first + kChunk < rows.vocabulary ? first + kChunk : rows.vocabulary;
    if (!counted(rows, row)) continue;
    static_cast<RowState<double>*>(states)[i] =
        is_reverse(kl) ? read_chunk<true>(rows, row, first, last) : read_chunk<false>(rows, row, first, last);
  }
}

void token_chunks_finish(const TokenRows& rows, const KLArguments* kl, void* states, const TokenOutputs& out, int64_t count) {
  const int64_t chunks = chunks_of(rows);
  for (int64_t row = 0; row < count; ++row) {
    if (!counted(rows, row)) {
      write_nothing(row, out);
      continue;
    }
    RowState<double>* state = static_cast<RowState<double>*>(states) + row * chunks;
    for (int64_t i = 1; i < chunks; ++i) merge(state[0], state[i], temperature_at(rows, row), is_reverse(kl));
    write_row(rows, row, state[0], kl, out);
  }
}

void token_rows_backward(const TokenRows& rows, const KLArguments* kl, const TokenGradients& grads, int64_t begin, int64_t end) {
  const auto clear = [&](void* gradient, DType dtype, int64_t row) {
    const int64_t bytes = rows.vocabulary * (dtype == DType::float32 ? 4 : 2);
    if (gradient) std::memset(static_cast<char*>(gradient) + row * bytes, 0, bytes);
  };
  for (int64_t row = begin; row < end; ++row) {
    if (counted(rows, row)) {
      write_row_gradients(rows, row, kl, grads);
    } else {
      clear(grads.policy, rows.policy.dtype, row);
      clear(grads.ref, rows.ref.dtype, row);
    }
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
