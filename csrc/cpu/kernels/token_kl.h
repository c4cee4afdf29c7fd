#pragma once

#include "arguments/rows.h"
#include "cpu/isa.h"

namespace lsc {

LSC_DECLARE_KERNELS(
    // Rows [begin, end), each by one thread.
    void token_rows_forward(const TokenRows&, const KLArguments*, const TokenOutputs&, int64_t begin, int64_t end);
    void token_rows_backward(const TokenRows&, const KLArguments*, const TokenGradients&, int64_t begin, int64_t end);
    // Few rows: chunks of rows by several threads, then the rows from their chunks. The result is the same bits.
    int64_t token_chunks(const TokenRows&, int64_t* state_bytes);
    void token_chunks_read(const TokenRows&, const KLArguments*, void* states, int64_t begin, int64_t end);
    void token_chunks_finish(const TokenRows&, const KLArguments*, void* states, const TokenOutputs&, int64_t rows);)

}  // namespace lsc
