// kl_from_logprobs on CUDA, from float32 log-probabilities: a thread a token, in double. Forward reads 2 floats and writes 1
// per token; backward reads 3 and writes each wanted gradient.
#include "cuda/tensors.h"
#include "cuda/upstream.h"
#include "math/kl_arguments.h"
#include "tensors/kl.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

constexpr int kTokenThreads = 256;

struct LogprobTokens {
  int64_t count;
  const float *logprobs, *ref_logprobs;
  const bool* mask;  // or null
  KLArguments kl;
};

struct LogprobForward {
  LogprobTokens in;
  float* kl;
};

struct LogprobBackward {
  LogprobTokens in;
  Upstream grad;
  float *to_logprobs, *to_ref;  // null where not wanted
};

LSC_KERNEL(kTokenThreads, 4) kl_forward(LSC_ARGUMENT LogprobForward a) {
  const int64_t i = block_index() * kTokenThreads + thread_index();
  if (i >= a.in.count) return;
  a.kl[i] = a.in.mask && !a.in.mask[i] ? 0.0f : float(value_at(a.in.logprobs[i], a.in.ref_logprobs[i], a.in.kl, i).kl);
}

LSC_KERNEL(kTokenThreads, 4) kl_backward(LSC_ARGUMENT LogprobBackward a) {
  const int64_t i = block_index() * kTokenThreads + thread_index();
  if (i >= a.in.count) return;
  const double upstream = upstream_at(a.grad, i);
  double to_logprob = 0, to_ref = 0;
  if (!(a.in.mask && !a.in.mask[i]) && upstream != 0) {
    const KLValue<double> value = value_at(a.in.logprobs[i], a.in.ref_logprobs[i], a.in.kl, i);
    to_logprob = upstream * value.on_logprob, to_ref = -upstream * value.on_ratio;
  }
  if (a.to_logprobs) a.to_logprobs[i] = float(to_logprob);
  if (a.to_ref) a.to_ref[i] = float(to_ref);
}

namespace {

// The tensors of the tokens, held alive while a launch is prepared.
struct LogprobTensors {
  Tensor policy, ref;
  std::optional<Tensor> mask, old;
  LogprobTokens kernel;

  LogprobTensors(const Tensor& logprobs, const Tensor& ref_logprobs, const std::optional<Tensor>& masks,
                 const std::optional<Tensor>& old_logprobs, int64_t kind, bool straight_through, const Clamp& log_ratio_clamp,
                 const Clamp& kl_clamp)
      : policy(dense(logprobs)), ref(dense(ref_logprobs)), mask(dense(masks)), old(dense(old_logprobs)) {
    kernel = {policy.numel(), floats(policy), floats(ref), data_or_null<bool>(mask),
              kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old)};
  }

  int64_t blocks() const { return (kernel.count + kTokenThreads - 1) / kTokenThreads; }
};

}  // namespace

static Tensor forward(
    Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, int64_t kind,
    bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp) {
  const LogprobTensors in(logprobs, ref_logprobs, mask, old_logprobs, kind, straight_through, log_ratio_clamp, kl_clamp);
  const Tensor kl = floats_on(logprobs, logprobs.sizes());
  launch(&kl_forward, in.blocks(), kTokenThreads, logprobs, LogprobForward{in.kernel, floats(kl)});
  return kl;
}

static std::tuple<Tensor, Tensor> backward(
    Tensor grad, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs,
    int64_t kind, bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp, bool want_logprobs, bool want_ref) {
  const LogprobTensors in(logprobs, ref_logprobs, mask, old_logprobs, kind, straight_through, log_ratio_clamp, kl_clamp);
  const auto gradient = [&](bool wanted) { return wanted ? floats_on(logprobs, logprobs.sizes()) : nothing_on(logprobs); };
  const UpstreamTensor upstream(grad);
  const Tensor to_logprobs = gradient(want_logprobs), to_ref = gradient(want_ref);
  launch(&kl_backward, in.blocks(), kTokenThreads, logprobs,
         LogprobBackward{in.kernel, upstream.kernel, want_logprobs ? floats(to_logprobs) : nullptr,
                         want_ref ? floats(to_ref) : nullptr});
  return {to_logprobs, to_ref};
}

LSC_CUDA_OPS(m) {
  m.impl("kl_from_logprobs_forward", TORCH_BOX(&forward));
  m.impl("kl_from_logprobs_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
