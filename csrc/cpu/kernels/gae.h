#pragma once

#include "arguments/mask_rows.h"
#include "arguments/rows.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"
#include "math/holes.h"

namespace lsc {

// Sequences one after the other: those of [B, T], or packed ones.
struct SequenceRows {
  const int64_t* bounds;  // [B + 1], or null: all of `length`
  int64_t length;
  MaskRows mask;          // of packed sequences the row is the first token, and its stride that of a column
};

struct GaeRules {
  double gamma, lam;
  Holes holes;
};

struct GaeInputs {
  TypedData rewards, values, bootstrap;  // values, [B] bootstrap: null is 0
};

struct GaeUpstream {
  Upstream advantages, returns;  // each with null data where there is none
};

// values is null where it is not wanted.
struct GaeGradients {
  float *rewards, *values, *bootstrap;
};

LSC_DECLARE_KERNELS(
    // Sequences [begin, end). Without values only the returns are written.
    void gae_forward(const SequenceRows&, const GaeRules&, const GaeInputs&, float* advantages, float* returns, int64_t begin, int64_t end);
    void gae_backward(const SequenceRows&, const GaeRules&, const GaeUpstream&, const GaeGradients&, int64_t begin, int64_t end);)

}  // namespace lsc
