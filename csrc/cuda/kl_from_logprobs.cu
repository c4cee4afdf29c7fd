// kl_from_logprobs on CUDA, from float32 log-probabilities: a thread a token, in double. Forward reads 2 floats and writes 1
// per token; backward reads 3 and writes 2.
#include "cuda/tensors.h"
#include "math/kl_arguments.h"

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
  const float* grad;
  float *to_logprobs, *to_ref;
};

LSC_KERNEL(kTokenThreads, 4) kl_forward(LSC_ARGUMENT LogprobForward a) {
  const int64_t i = block_index() * kTokenThreads + thread_index();
  if (i >= a.in.count) return;
  a.kl[i] = a.in.mask && !a.in.mask[i] ? 0.0f : float(value_at(a.in.logprobs[i], a.in.ref_logprobs[i], a.in.kl, i).kl);
}

LSC_KERNEL(kTokenThreads, 4) kl_backward(LSC_ARGUMENT LogprobBackward a) {
  const int64_t i = block_index() * kTokenThreads + thread_index();
  if (i >= a.in.count) return;
  a.to_logprobs[i] = a.to_ref[i] = 0;
  const double upstream = a.grad[i];
  if ((a.in.mask && !a.in.mask[i]) || upstream == 0) return;
  const KLValue<double> value = value_at(a.in.logprobs[i], a.in.ref_logprobs[i], a.in.kl, i);
  a.to_logprobs[i] = float(upstream * value.on_logprob);
  a.to_ref[i] = float(-upstream * value.on_ratio);
}

namespace {

// The tensors of the tokens, held alive while a launch is prepared.
struct LogprobTensors {
  Tensor policy, ref;
  std::optional<Tensor> mask, old;
  LogprobTokens kernel;

  LogprobTensors(const Tensor& logprobs, const Tensor& ref_logprobs, const std::optional<Tensor>& masks,
                 const std::optional<Tensor>& old_logprobs, const KLArguments& kl)
      : policy(dense(logprobs)), ref(dense(ref_logprobs)), mask(dense(masks)), old(dense(old_logprobs)) {
    kernel = {policy.numel(), floats(policy), floats(ref), data_or_null<bool>(mask), kl};
    kernel.kl.old_logprobs = data_or_null<float>(old);
  }

  int64_t blocks() const { return (kernel.count + kTokenThreads - 1) / kTokenThreads; }
};

}  // namespace

static Tensor forward(
    Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, int64_t kind,
    bool straight_through, double ratio_low, double ratio_high, double kl_low, double kl_high) {
  const LogprobTensors in(logprobs, ref_logprobs, mask, old_logprobs, {kind, straight_through, ratio_low, ratio_high, kl_low, kl_high, nullptr});
  const Tensor kl = floats_on(logprobs, logprobs.sizes());
  launch(&kl_forward, in.blocks(), kTokenThreads, logprobs, LogprobForward{in.kernel, floats(kl)});
  return kl;
}

static std::tuple<Tensor, Tensor> backward(
    Tensor grad, Tensor logprobs, Tensor ref_logprobs, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs,
    int64_t kind, bool straight_through, double ratio_low, double ratio_high, double kl_low, double kl_high) {
  const LogprobTensors in(logprobs, ref_logprobs, mask, old_logprobs, {kind, straight_through, ratio_low, ratio_high, kl_low, kl_high, nullptr});
  const Tensor upstream = dense(grad), to_logprobs = floats_on(logprobs, logprobs.sizes()), to_ref = floats_on(logprobs, logprobs.sizes());
  launch(&kl_backward, in.blocks(), kTokenThreads, logprobs,
         LogprobBackward{in.kernel, floats(upstream), floats(to_logprobs), floats(to_ref)});
  return {to_logprobs, to_ref};
}

LSC_CUDA_OPS(m) {
  m.impl("kl_from_logprobs_forward", TORCH_BOX(&forward));
  m.impl("kl_from_logprobs_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
