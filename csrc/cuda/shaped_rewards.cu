// shaped_rewards on CUDA: from hidden states and logits to per-token rewards in one launch.
//
// Design constraint: no block waits for another. The block that finishes a token's row (cuda/token_rows.h) finds from the end
// of the sequence's mask where the utility goes, and writes its own token's reward. If that place is its own, it also does
// the sequence's K dot products, centring, log-sigmoid and aggregation; where there is no place, the first token's block
// does. From log-probabilities a block takes kPositions tokens, and the same holds for their blocks.
//
// A formula is interpreted by one thread, with the values of its parts in the block's memory: in the thread's own, every
// thread of the device would have to have room for them.
//
// Reads each counted logit once, for each token a part of its sequence's mask and actions (from the second-level cache), and
// for each sequence K rows of weights and one of hidden. Writes 5 floats a token and what backward needs, [N, 14]; K + 1 a
// sequence. Backward is that of the parts: a launch each for placement, aggregation and token rows, up to three for the head.
#include "cuda/formula_rows.h"
#include "cuda/head_tensors.h"
#include "cuda/placement.h"
#include "cuda/token_tensors.h"
#include "cuda/transform_tensors.h"
#include "math/kl_arguments.h"
#include "tensors/kl.h"
#include "tensors/program.h"
#include "tensors/rewards.h"

namespace lsc {
namespace cuda {

constexpr int64_t kPositions = 4 * kThreads;

struct Sequences {
  HeadForward head;
  bool has_head;  // otherwise the scores are given
  DeviceScores scores;
  Program program;
  float* utility;
  RewardInputs placing;  // its mask is the caller's: a token also counts for nothing where its action is to be ignored
  const void* actions;   // [B, T], or null
  bool actions_are_int32;
  float* rewards;

  LSC_DEVICE bool counts(int64_t sequence, int64_t t) const {
    return is_counted(placing.mask, sequence, t) &&
           (!actions || integer_at(actions, actions_are_int32, sequence * placing.length + t) != kIgnoreIndex);
  }
};

struct FromLogits {
  Sequences sequences;
  TokenForward tokens;
};

struct FromLogprobs {
  Sequences sequences;
  TypedData given, ref_given;  // log-probabilities
  KLArguments options;
  float *kl, *logprobs, *ref_logprobs;
  int64_t blocks_per_sequence;
};

struct SequenceMemory {
  HeadMemory<kThreads> head;
  Uninitialised<Judged<Log>, kMaxProperties> judged;
  Uninitialised<Judgement<Log>, kMaxInstructions> values;
};

union RowMemory {
  ReaderMemory reader;
  SequenceMemory sequence;
};

// Block: a sequence's scores and its utility, which the first thread writes.
LSC_COLD void judge_sequence(SequenceMemory& memory, const Sequences& a, int64_t sequence) {
  if (a.has_head) {
    score_output<kThreads>(memory.head, a.head, sequence);
    sync_block();
  }
  if (a.program.length) {
    if (warp_index() == 0) judge_row(a.scores, a.program, sequence, memory.judged.data(), int(lane_index()), kWarp);
    sync_block();
  }
  if (thread_index() == 0) {
    a.utility[sequence] =
        a.program.length ? float(evaluate(a.program, memory.judged.data(), memory.values.data()).good.log)
                         : aggregate_row(a.scores, sequence, [&](int64_t k) { return score_at(a.scores, sequence, k); });
  }
}

// Block of the tokens [begin, end) of a sequence: the place of the utility, which is known there if it is one of them.
LSC_COLD int64_t settle_place(SequenceMemory& memory, const Sequences& a, int64_t sequence, int64_t begin, int64_t end) {
  const int64_t place = place_of<kThreads>(memory.head.last, a.placing, sequence, [&](int64_t t) { return a.counts(sequence, t); });
  if ((place >= begin && place < end) || (place < 0 && begin == 0)) judge_sequence(memory, a, sequence);
  return place;
}

// Block: what follows the outputs of a token's row.
LSC_COLD void end_token(SequenceMemory& memory, const FromLogits& a) {
  const Sequences& in = a.sequences;
  const int64_t length = in.placing.length, row = row_of_block(a.tokens.blocks_per_row), sequence = row / length, t = row % length;
  const int64_t place = settle_place(memory, in, sequence, t, t + 1);
  if (thread_index() == 0) in.rewards[row] = reward_at(in.placing, sequence, t, in.counts(sequence, t), place);
}

template <typename T, Reading kReading>
LSC_KERNEL(kThreads, kBlocksAtOnce) shaped_from_logits(LSC_ARGUMENT FromLogits a) {
  RowMemory& memory = block_memory<RowMemory>();
  const Sequences& in = a.sequences;
  const int64_t length = in.placing.length;
  if (length == 0) return judge_sequence(memory.sequence, in, block_index());
  const int64_t row = row_of_block(a.tokens.blocks_per_row);
  if (!token_row<T, kReading>(memory.reader, a.tokens, row, in.counts(row / length, row % length))) return;
  sync_block();  // the reader's memory becomes the sequence's
  end_token(memory.sequence, a);
}

LSC_DEVICE void write_token(const FromLogprobs& a, int64_t i, bool counts) {
  const float logprob = counts ? load_one(a.given.dtype, a.given.data, i) : 0.0f;
  const float ref_logprob = counts ? load_one(a.ref_given.dtype, a.ref_given.data, i) : 0.0f;
  a.kl[i] = counts ? float(value_at(logprob, ref_logprob, a.options, i).kl) : 0.0f;
  a.logprobs[i] = logprob, a.ref_logprobs[i] = ref_logprob;
}

LSC_KERNEL(kThreads, 4) shaped_from_logprobs(LSC_ARGUMENT FromLogprobs a) {
  SequenceMemory& memory = block_memory<SequenceMemory>();
  const Sequences& in = a.sequences;
  const int64_t length = in.placing.length, sequence = block_index() / a.blocks_per_sequence;
  const int64_t begin = block_index() % a.blocks_per_sequence * kPositions, end = begin + kPositions < length ? begin + kPositions : length;
  const int64_t place = settle_place(memory, in, sequence, begin, end);
  sync_block();  // the utility is there
  for (int64_t t = begin + thread_index(); t < end; t += kThreads) {
    const int64_t at = sequence * length + t;
    const bool counts = in.counts(sequence, t);
    write_token(a, at, counts);
    in.rewards[at] = reward_at(in.placing, sequence, t, counts, place);
  }
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    std::optional<Tensor> hidden, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> attention_mask, std::optional<Tensor> head_index, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> given_scores, std::optional<Tensor> reference_reward, double reference_number,
    std::optional<Tensor> scale, double scale_number, std::optional<Tensor> floor, double floor_number,
    std::optional<Tensor> weights, bool ignore_missing, ProgramNumbers program, Tensor policy, Tensor ref,
    std::optional<Tensor> actions, std::optional<Tensor> mask, std::optional<Tensor> old_logprobs,
    std::optional<Tensor> temperatures, double temperature, int64_t kind, bool straight_through, Clamp log_ratio_clamp,
    Clamp kl_clamp, std::optional<Tensor> index, std::optional<Tensor> dense_rewards, double beta, int64_t placement,
    double clip_low, double clip_high) {
  const int64_t batch = policy.size(0), length = policy.size(1), sizes[2] = {batch, length};
  const auto per_token = [&] { return floats_on(policy, Sizes(sizes, 2)); };
  const Tensor utility = floats_on(policy, Sizes(sizes, 1)), kl = per_token(), rewards = per_token();

  Sequences sequences{};
  std::optional<PositionTensors> positions;
  std::optional<Tensor> rows, head_weight;
  const auto head_bias = dense(bias);
  Tensor scores = nothing_on(policy);
  if (hidden) {
    positions.emplace(*hidden, attention_mask, head_index, cu_seqlens, false);
    rows = few_dimensions(*hidden), head_weight = dense(*weight);
    const int64_t score_sizes[2] = {batch, weight->size(0)};
    scores = floats_on(policy, Sizes(score_sizes, 2));
    sequences.has_head = true;
    sequences.head = {hidden_rows(*rows), positions->kernel, weight->size(0), typed(*head_weight), typed(head_bias), floats(scores)};
  }
  const ScoreTensors judged(given_scores ? *given_scores : scores, reference_reward, reference_number, scale, scale_number, floor,
                            floor_number, weights, ignore_missing);
  const RewardTensors placing(utility, kl, mask, index, dense_rewards, beta, placement, clip_low, clip_high);
  const auto ids = dense(actions);
  sequences.scores = judged.kernel;
  sequences.program = program_of(program, judged.kernel.columns);
  sequences.utility = floats(utility);
  sequences.placing = placing.kernel;
  sequences.actions = data_or_null<void>(ids);
  sequences.actions_are_int32 = ids && ids->scalar_type() == torch::headeronly::ScalarType::Int;
  sequences.rewards = floats(rewards);
  const auto old = dense_floats(old_logprobs);
  const KLArguments options = kl_arguments(kind, straight_through, log_ratio_clamp, kl_clamp, old);

  const Tensor logprobs = per_token(), ref_logprobs = per_token();
  if (!ids) {
    const Tensor given = dense(policy), ref_given = dense(ref);
    const int64_t blocks = std::max<int64_t>(1, (length + kPositions - 1) / kPositions);
    launch(&shaped_from_logprobs, batch * blocks, kThreads, policy,
           FromLogprobs{sequences, typed(given), typed(ref_given), options, floats(kl), floats(logprobs), floats(ref_logprobs), blocks});
    return {rewards, utility, scores, kl, logprobs, ref_logprobs, nothing_on(policy), nothing_on(policy)};
  }
  const TokenTensors tensors(policy, ref, *ids, std::nullopt, temperatures, temperature);
  const Tensor entropy = per_token(), saved = saved_on(policy, tensors.count);
  FromLogits a{sequences, forward_arguments(tensors, &options, {floats(kl), floats(logprobs), floats(ref_logprobs), floats(entropy), floats(saved)}, policy)};
  const Workspace workspace(a.tokens, tensors, policy);
  with_logits(a.tokens.rows, [&](auto type) {
    using T = decltype(type);
    launch(is_reverse(&options) ? &shaped_from_logits<T, Reading::pair_reversed> : &shaped_from_logits<T, Reading::pair>,
           length ? tensors.count * a.tokens.blocks_per_row : batch, kThreads, policy, a);
  });
  return {rewards, utility, scores, kl, logprobs, ref_logprobs, entropy, saved};
}

LSC_CUDA_OPS(m) { m.impl("shaped_rewards_forward", TORCH_BOX(&forward)); }

}  // namespace cuda
}  // namespace lsc
