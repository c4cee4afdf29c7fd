// A gradient tensor as the kernels read it: copied only where they lie neither side by side nor in one place along its rows.
#pragma once

#include "arguments/upstream.h"
#include "tensors/tensor.h"

namespace lsc {

// Holds the tensor that an Upstream points into.
struct UpstreamTensor {
  Tensor tensor;
  Upstream kernel;

  explicit UpstreamTensor(const Tensor& grad) : tensor(grad) {
    if (!in_rows()) {
      tensor = dense(grad);
      in_rows();
    }
  }

 private:
  bool in_rows() {
    int dimensions;
    int64_t sizes[2], strides[2];
    if (!join_dimensions(tensor, tensor.dim(), 2, dimensions, sizes, strides)) return false;
    const int64_t inner = sizes[dimensions - 1], stride = strides[dimensions - 1];
    kernel = {floats(tensor), inner, dimensions == 2 ? strides[0] : inner * stride, stride};
    return kernel.inner_stride == 0 || kernel.inner_stride == 1;
  }
};

inline std::optional<UpstreamTensor> upstream_of(const std::optional<Tensor>& grad) {
  return grad ? std::optional<UpstreamTensor>(*grad) : std::nullopt;
}

inline Upstream upstream_or_none(const std::optional<UpstreamTensor>& grad) { return grad ? grad->kernel : Upstream{}; }

}  // namespace lsc
