// lsc_transform: reads a score and what is not broadcast against it, writes u; backward reads the upstream gradient too
// and writes the gradients that are wanted.
#include "cpu/kernels/lsc_transform.h"

#include "cpu/kernels/transform_tile.h"
#include "cpu/kernels/upstream.h"

namespace lsc {
namespace LSC_ISA {

void lsc_transform_forward(const TransformInputs& inputs, float* utility, int64_t begin, int64_t end) {
  for_dtype(inputs.dtype, [&](auto type) {
    TransformTile<decltype(type)> tile(inputs);
    alignas(64) float u[kTile];
    tile.for_each(begin, end, [&](int64_t first, int n) {
      tile.values(u);
      std::copy_n(u, n, utility + first);
    });
  });
}

void lsc_transform_backward(const TransformInputs& inputs, const Upstream& grad, const TransformGradients& out, int64_t begin, int64_t end) {
  for_dtype(inputs.dtype, [&](auto type) {
    using T = decltype(type);
    TransformTile<T> tile(inputs);
    UpstreamTile<kTile> given(grad);
    alignas(64) float slope[kTile], to_scores[kTile];
    tile.for_each(begin, end, [&](int64_t first, int n) {
      const float* upstream = given.along(first, n);
      tile.slopes(slope);
      // a slope that nobody asked for counts for nothing, even if it is NaN
      for (int i = 0; i < n; ++i) to_scores[i] = upstream[i] == 0 ? 0 : upstream[i] * slope[i];
      write_gradients(tile, to_scores, n, first, out);
    });
  });
}

}  // namespace LSC_ISA
}  // namespace lsc
