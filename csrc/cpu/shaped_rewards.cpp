// shaped_rewards on the CPU: reward head, centring, log-sigmoid, aggregation, per-token KL and placement in one parallel
// region.
//
// Threads share the tokens. Each token's row gives its KL; the thread that finishes the last token of a sequence also
// scores that sequence, aggregates and places its rewards, whose KL is still in cache.
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "cpu/aggregate_tensors.h"
#include "cpu/head_tensors.h"
#include "cpu/kernels/counted_tokens.h"
#include "cpu/kernels/kl_from_logprobs.h"
#include "cpu/reward_tensors.h"
#include "cpu/token_tensors.h"
#include "tensors/kl.h"

namespace lsc {

namespace {

constexpr auto kFloat = torch::headeronly::ScalarType::Float;

// The reward side: what turns a finished row of KL into rewards.
struct Sequences {
  std::optional<HeadInputs> head;  // none: the scores are given
  const AggregateTensors& aggregation;
  const RewardTensors& placement;
  float *scores, *utility, *rewards;
  std::atomic<int64_t> outside{-1};  // a row whose index is: an exception does not travel out of a parallel region

  decltype(LSC_DISPATCH_ISA(head_scores)) score = LSC_DISPATCH_ISA(head_scores);
  decltype(LSC_DISPATCH_ISA(aggregate_forward)) aggregate = LSC_DISPATCH_ISA(aggregate_forward);
  decltype(LSC_DISPATCH_ISA(token_rewards_forward)) place = LSC_DISPATCH_ISA(token_rewards_forward);

  void finish(int64_t b) {
    if (head) score(*head, scores, b, b + 1);
    aggregate(aggregation.kernel, aggregation.how, utility, b, b + 1);
    if (const int64_t row = place(placement.kernel, rewards, b, b + 1); row >= 0) outside = row;
  }
};

// tokens(begin, end) for all of [0, batch * length), and sequences.finish(b) once the tokens of b are done.
template <typename Tokens>
void over_tokens(int64_t batch, int64_t length, int64_t per_task, Sequences& sequences, const Tokens& tokens) {
  if (length == 0) {
    for (int64_t b = 0; b < batch; ++b) sequences.finish(b);
    return;
  }
  std::vector<std::atomic<int64_t>> left(batch);
  for (auto& count : left) count.store(length, std::memory_order_relaxed);
  torch::stable::parallel_for(0, batch * length, per_task, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin / length; b * length < end; ++b) {
      const int64_t first = std::max(begin, b * length), last = std::min(end, (b + 1) * length);
      tokens(first, last);
      if (left[b].fetch_sub(last - first, std::memory_order_acq_rel) == last - first) sequences.finish(b);
    }
  });
}

constexpr int64_t kLogprobsPerTask = 2048;

// [B, T] bool, or nothing where all tokens count.
std::optional<Tensor> counted_of(const std::optional<Tensor>& mask, const std::optional<Tensor>& actions, Sizes sizes) {
  if (!mask && !actions) return std::nullopt;
  if (!actions && mask->scalar_type() == torch::headeronly::ScalarType::Bool) return dense(mask);
  const Tensor counted = empty(sizes, torch::headeronly::ScalarType::Bool);
  const MaskRows rows = mask_rows(mask);
  const int64_t length = sizes[1], per_task = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, length));
  const bool are_int32 = actions && actions->scalar_type() == torch::headeronly::ScalarType::Int;
  auto* read = LSC_DISPATCH_ISA(counted_tokens);
  torch::stable::parallel_for(0, sizes[0], per_task, [&](int64_t begin, int64_t end) {
    read(rows, data_or_null<void>(actions), are_int32, length, static_cast<bool*>(counted.data_ptr()), begin, end);
  });
  return counted;
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    std::optional<Tensor> hidden, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> attention_mask, std::optional<Tensor> head_index, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> given_scores, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    std::optional<Tensor> weights, bool ignore_missing, ProgramNumbers program, Tensor policy, Tensor ref,
    std::optional<Tensor> given_actions, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs, std::optional<Tensor> temperatures,
    double temperature, int64_t kind, bool straight_through, Clamp log_ratio_clamp, Clamp kl_clamp,
    std::optional<Tensor> index, std::optional<Tensor> dense_rewards, double beta, int64_t placement, double clip_low,
    double clip_high) {
  const int64_t sizes[2] = {policy.size(0), policy.size(1)};
  const Sizes per_token(sizes, 2), per_sequence(sizes, 1);
  const auto actions = dense(given_actions), counted = counted_of(mask, actions, per_token);

  Tensor positions = nothing(), rows = nothing(), head_weight = nothing(), scores = nothing();
  std::optional<Tensor> head_bias;
  std::optional<HeadInputs> head;
  if (hidden) {
    positions = find_positions(*hidden, attention_mask, head_index, cu_seqlens, false);
    rows = few_dimensions(*hidden), head_weight = *dense_floats(weight), head_bias = dense_floats(bias);
    head = inputs_of(rows, head_weight, head_bias, positions, false);
    const int64_t score_sizes[2] = {positions.numel(), head->properties};
    scores = empty(Sizes(score_sizes, 2), kFloat);
  }
  const AggregateTensors aggregation(given_scores ? *given_scores : scores, reference_reward, reference_number, scale,
                                     scale_number, floor, floor_number, weights, ignore_missing, program);
  const Tensor utility = empty(per_sequence, kFloat), kl = empty_large(per_token, kFloat), rewards = empty_large(per_token, kFloat);
  const RewardTensors placing(utility, kl, counted, index, dense_rewards, beta, placement, clip_low, clip_high);
  Sequences sequences{head, aggregation, placing, floats(scores), floats(utility), floats(rewards)};
  const auto old = dense_floats(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);

  const Tensor logprobs = empty_large(per_token, kFloat), ref_logprobs = empty_large(per_token, kFloat);
  Tensor entropy = nothing(), saved = nothing();
  if (actions) {
    const TokenTensors tensors(policy, ref, *actions, counted, temperatures, temperature);
    check_actions(tensors);
    entropy = empty(per_token, kFloat), saved = empty_saved(tensors.count);
    const TokenOutputs out{floats(kl), floats(logprobs), floats(ref_logprobs), floats(entropy), floats(saved)};
    if (few_rows(tensors)) {
      forward_few_rows(tensors, &options, out);
      for (int64_t b = 0; b < sizes[0]; ++b) sequences.finish(b);
    } else {
      auto* token_rows = LSC_DISPATCH_ISA(token_rows_forward);
      over_tokens(sizes[0], sizes[1], rows_per_task(tensors.rows), sequences, [&](int64_t begin, int64_t end) {
        token_rows(tensors.rows, &options, out, begin, end);
      });
    }
  } else {
    const Tensor policy_logprobs = *dense_floats(policy), reference = *dense_floats(ref);
    auto* estimate = LSC_DISPATCH_ISA(kl_forward);
    const LogprobInputs in{floats(policy_logprobs), floats(reference), data_or_null<bool>(counted), options};
    const LogprobOutputs out{floats(kl), floats(logprobs), floats(ref_logprobs)};
    over_tokens(sizes[0], sizes[1], kLogprobsPerTask, sequences, [&](int64_t begin, int64_t end) {
      estimate(in, out, begin, end);
    });
  }
  if (sequences.outside >= 0) index_is_outside(placing.kernel, "placement_index", sequences.outside);
  return {rewards, utility, scores, kl, logprobs, ref_logprobs, entropy, saved};
}

STABLE_TORCH_LIBRARY_FRAGMENT(lsc_kernels, m) {
  m.def("shaped_rewards_forward(Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? attention_mask, Tensor? head_index,"
        " Tensor? cu_seqlens, Tensor? scores, Tensor? reference_reward, float reference_number, Tensor? scale,"
        " float scale_number, Tensor? floor, float floor_number, Tensor? weights, bool ignore_missing, int[]? program,"
        " Tensor policy, Tensor ref, Tensor? actions, Tensor? mask, Tensor? old_logprobs, Tensor? temperatures,"
        " float temperature, int kind, bool straight_through, float[]? log_ratio_clamp, float[]? kl_clamp,"
        " Tensor? index, Tensor? dense, float beta, int placement, float clip_low, float clip_high)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(lsc_kernels, CPU, m) { m.impl("shaped_rewards_forward", TORCH_BOX(&forward)); }

}  // namespace lsc
