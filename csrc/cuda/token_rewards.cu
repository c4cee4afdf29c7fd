// token_rewards on CUDA: a block a sequence. It looks for the last counted positions in the mask, then passes once over kl,
// mask and dense rewards and writes the rewards. Sums are formed in fp64 and rounded once: the op waits for memory.
//
// On a GPU an index outside [0, T) makes its sequence's rewards NaN, and gives utility no gradient but NaN.
#include "cuda/placement.h"
#include "cuda/tensors.h"
#include "cuda/upstream.h"
#include "tensors/rewards.h"
#include "tensors/upstream.h"

namespace lsc {
namespace cuda {

constexpr int kSequenceThreads = 256;

// Block: where the utility goes.
LSC_DEVICE int64_t place_in(LastCountedMemory& memory, const RewardInputs& in, int64_t row) {
  return place_of<kSequenceThreads>(memory, in, row, [&](int64_t t) { return is_counted(in.mask, row, t); });
}

struct RewardsForward {
  RewardInputs in;
  float* rewards;
};

struct RewardsBackward {
  RewardInputs in;
  Upstream grad;
  RewardGradients out;
};

LSC_KERNEL(kSequenceThreads, 4) token_rewards_forward(LSC_ARGUMENT RewardsForward a) {
  LastCountedMemory& memory = block_memory<LastCountedMemory>();
  const RewardInputs& in = a.in;
  const int64_t row = block_index(), place = place_in(memory, in, row);
  for (int64_t t = thread_index(); t < in.length; t += kSequenceThreads) {
    a.rewards[row * in.length + t] = reward_at(in, row, t, is_counted(in.mask, row, t), place);
  }
}

LSC_KERNEL(kSequenceThreads, 4) token_rewards_backward(LSC_ARGUMENT RewardsBackward a) {
  LastCountedMemory& memory = block_memory<LastCountedMemory>();
  const RewardInputs& in = a.in;
  const int64_t row = block_index();
  if (a.out.utility) {
    const int64_t place = place_in(memory, in, row);
    if (thread_index() == 0) {
      const float utility = load_one(in.utility.dtype, in.utility.data, row);
      const bool clipped = utility < in.clip_low || utility > in.clip_high;
      const float gradient = place == kOutside ? NAN : place < 0 || clipped ? 0.0f : upstream_at(a.grad, row * in.length + place);
      store_one(in.utility.dtype, a.out.utility, row, gradient);
    }
  }
  if (!a.out.kl && !a.out.dense) return;
  for (int64_t t = thread_index(); t < in.length; t += kSequenceThreads) {
    const int64_t at = row * in.length + t;
    const float to_dense = is_counted(in.mask, row, t) ? upstream_at(a.grad, at) : 0.0f;
    if (a.out.dense) store_one(in.dense.dtype, a.out.dense, at, to_dense);
    if (a.out.kl) store_one(in.kl.dtype, a.out.kl, at, to_dense == 0 || in.beta == 0 ? 0.0f : float(-in.beta * double(to_dense)));
  }
}

static Tensor forward(
    Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index, std::optional<Tensor> dense_rewards,
    double beta, int64_t placement, double clip_low, double clip_high) {
  const RewardTensors inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const Tensor rewards = floats_on(kl, kl.sizes());
  launch(&token_rewards_forward, kl.size(0), kSequenceThreads, kl, RewardsForward{inputs.kernel, floats(rewards)});
  return rewards;
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    Tensor grad, Tensor utility, Tensor kl, std::optional<Tensor> mask, std::optional<Tensor> index,
    std::optional<Tensor> dense_rewards, double beta, int64_t placement, double clip_low, double clip_high, bool want_utility,
    bool want_kl, bool want_dense) {
  const RewardTensors inputs(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const UpstreamTensor upstream(grad);
  const Tensor to_utility = want_utility ? empty_on(kl, utility.sizes(), utility.scalar_type()) : nothing_on(kl);
  const Tensor to_kl = want_kl ? empty_on(kl, kl.sizes(), kl.scalar_type()) : nothing_on(kl);
  const Tensor to_dense = want_dense ? empty_on(kl, kl.sizes(), dense_rewards->scalar_type()) : nothing_on(kl);
  const RewardGradients out{want_utility ? to_utility.data_ptr() : nullptr, want_kl ? to_kl.data_ptr() : nullptr,
                            want_dense ? to_dense.data_ptr() : nullptr};
  launch(&token_rewards_backward, kl.size(0), kSequenceThreads, kl, RewardsBackward{inputs.kernel, upstream.kernel, out});
  return {to_utility, to_kl, to_dense};
}

LSC_CUDA_OPS(m) {
  m.impl("token_rewards_forward", TORCH_BOX(&forward));
  m.impl("token_rewards_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
