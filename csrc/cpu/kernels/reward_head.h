#pragma once

#include "arguments/hidden.h"
#include "arguments/mask_rows.h"
#include "cpu/isa.h"

namespace lsc {

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
