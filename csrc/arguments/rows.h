// What the torch-facing side of an op hands to its kernels: plain data, no torch, no inline code.
#pragma once

#include <cstdint>

namespace lsc {

enum class DType : int32_t { float32, bfloat16, float16 };

struct TypedData {
  const void* data;  // contiguous, or null where there is none
  DType dtype;
};

// [..., V] tensor whose last dimension has stride 1; the leading dimensions may have any strides, also 0.
constexpr int kMaxLeading = 8;
struct Rows {
  const void* data;
  DType dtype;
  int leading;  // dimensions that are left after joining those that lie as one, at least 1
  int64_t sizes[kMaxLeading], strides[kMaxLeading];
};

struct TokenRows {
  int64_t vocabulary;
  Rows policy, ref;             // ref.data is null where there is no reference
  const void* actions;          // [N]
  bool actions_are_int32;
  const bool* mask;             // [N], or null: all counted
  const double* temperatures;   // [N], or null: `temperature` for all
  double temperature;
};

struct KLArguments {
  int64_t kind;
  bool straight_through;
  double ratio_low, ratio_high, kl_low, kl_high;
  const float* old_logprobs;    // [N], or null
};

// What the forward pass saves of a row for the backward pass: columns of a [N, kSaved] float tensor.
// kMeanLogit is the mean of (x - m)/T under pi, kOffset is L - KL(pi || ref) or L + KL(ref || pi): differences that
// would cancel if they were taken from saved floats.
enum Saved {
  kScale, kInverseS, kMeanLogit, kRefScale, kRefLogS, kL, kOffset, kDivergence, kCentre, kCentreLow,
  kLogRatio, kLogRatioLow, kLogprob, kLogprobLow, kSaved  // two floats each
};

struct TokenOutputs {
  float *kl, *logprobs, *ref_logprobs, *entropy;  // [N]; kl and ref_logprobs are null where there is no reference
  float* saved;                                   // [N, kSaved], or null
};

struct TokenGradients {
  const float *kl, *logprobs, *ref_logprobs, *entropy;  // [N], upstream, each null where it is 0
  const float* saved;
  void *policy, *ref;  // [N, V] contiguous, to be written, each null where it is not wanted
};

}  // namespace lsc
