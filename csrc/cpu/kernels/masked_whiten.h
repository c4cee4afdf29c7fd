#pragma once

#include "arguments/mask_rows.h"
#include "arguments/rows.h"
#include "arguments/upstream.h"
#include "cpu/isa.h"
#include "math/moments.h"

namespace lsc {

// Elements in one row; of the mask the row is 0.
struct WhitenInputs {
  TypedData x;
  MaskRows mask;
};

constexpr int kWhitenTile = 512;

LSC_DECLARE_KERNELS(
    // Elements [begin, end); what the mask leaves out counts for nothing and becomes 0.
    // The moments are of one tile at most.
    Moments whiten_moments(const WhitenInputs&, int64_t begin, int64_t end);
    void whiten_forward(const WhitenInputs&, const Whitening&, float* out, int64_t begin, int64_t end);
    GradientSums whiten_gradient_sums(const WhitenInputs&, const Upstream&, double mean, int64_t begin, int64_t end);
    void whiten_backward(const WhitenInputs&, const Upstream&, const WhiteningGradient&, void* out, int64_t begin, int64_t end);)

}  // namespace lsc
