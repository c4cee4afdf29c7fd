// Plain data that group_advantages hands to its kernels.
#pragma once

#include <cstdint>

#include "arguments/rows.h"

namespace lsc {

struct GroupRules {
  bool scaled, leave_one_out;
  double eps;
};

// Group g has members [bounds[g], bounds[g + 1]) of `order`, rows of the batch; null: as they lie. Without bounds all groups
// have `size` members.
struct Groups {
  const int64_t *order, *bounds;
  int64_t size, largest;
};

// Columns of a [B, columns] table, in groups.
struct GroupColumns {
  TypedData utility;
  const double* sums;     // [B], in place of `utility`, or null
  int64_t columns;
  const double* weights;  // [columns], or null: 1 each
  Groups groups;
  GroupRules rules;
};

}  // namespace lsc
