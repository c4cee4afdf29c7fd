#pragma once

#include "cpu/isa.h"
#include "cpu/kernels/mask_rows.h"
#include "cpu/kernels/rows.h"

namespace lsc {

// hidden [..., H] of any strides; a row is named by its number among the leading dimensions.
constexpr int kMaxHiddenLeading = 8;
struct HiddenRows {
  const void* data;
  DType dtype;
  int64_t width, column_stride;  // H
  int leading;
  int64_t sizes[kMaxHiddenLeading], strides[kMaxHiddenLeading];
};

struct HeadInputs {
  HiddenRows hidden;
  const int64_t* positions;    // [R] the row of hidden that is read, -1 for none; null: row r itself
  double without_row;          // the score where there is none
  int64_t properties;          // K
  const float* weight;         // [K, H]
  const float* bias;           // [K], or null
};

LSC_DECLARE_KERNELS(
    // Sequences [begin, end) of `length` positions each: the row of their last counted position, -1 where there is none.
    void head_last_counted(const MaskRows&, int64_t length, int64_t* positions, int64_t begin, int64_t end);
    // Rows [begin, end) of a mask [1, R]: the row itself where it counts, else -1.
    void head_counted(const MaskRows&, int64_t* positions, int64_t begin, int64_t end);
    // Outputs [begin, end): scores [R, K].
    void head_scores(const HeadInputs&, float* scores, int64_t begin, int64_t end);
    // Outputs [begin, end): the rows of the contiguous gradient of hidden that they were read from, of hidden's dtype.
    void head_to_hidden(const HeadInputs&, const float* grad, void* to_hidden, int64_t begin, int64_t end);
    // Columns [begin, end) of the gradient of weight [K, H], over all R outputs.
    void head_to_weight(const HeadInputs&, const float* grad, int64_t outputs, float* to_weight, int64_t begin, int64_t end);)

}  // namespace lsc
