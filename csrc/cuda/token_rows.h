// A token's row, forward and backward: the kernels of token_logprobs, token_kl and the policy side of shaped_rewards.
//
// Forward, 2 N V logits read once (N V for one model), a few floats per row written. A row belongs to blocks_per_row blocks
// (one where rows are many), which share out its chunks. Where they are several, each leaves the states of its chunks in
// memory, and the one that comes last merges all of them, in the order in which one block would have: the result is the
// same bits. A row that is masked costs one block a look at its action.
//
// Backward, each wanted gradient written once, N V logits read (2 N V where a gradient needs both models).
#pragma once

#include "cuda/row_reader.h"
#include "math/token_row.h"

namespace lsc {
namespace LSC_ISA {

struct TokenForward {
  TokenRows rows;
  KLArguments kl;
  bool has_kl;
  TokenOutputs out;
  int blocks_per_row;
  RowState<double>* states;  // [N, chunks], where several blocks share a row
  unsigned* arrivals;        // [N], 0 before the launch and after it

  LSC_FN const KLArguments* options() const { return has_kl ? &kl : nullptr; }
};

struct TokenBackward {
  TokenRows rows;
  KLArguments kl;
  bool has_kl;
  TokenGradients grads;
  int blocks_per_row;

  LSC_FN const KLArguments* options() const { return has_kl ? &kl : nullptr; }
};

// Blocks are fewer than 2^31, and a division of as many bits as that is short.
LSC_DEVICE int64_t row_of_block(int blocks_per_row) { return unsigned(block_index()) / unsigned(blocks_per_row); }
LSC_DEVICE int part_of_block(int blocks_per_row) { return int(unsigned(block_index()) % unsigned(blocks_per_row)); }

// Warp 0 brings the states of a row's chunks together, 32 at a time.
template <bool kReverse>
class ChunkStates {
 public:
  LSC_DEVICE explicit ChunkStates(ReaderMemory& memory) : memory_(memory) {}

  // `state` is the first lane's.
  LSC_DEVICE void take(int64_t i, const RowState<double>& state) {
    if (lane_index() == 0) memory_.chunks[int(i % kWarp)] = state;
    if (i % kWarp == kWarp - 1) settle(i + 1);
  }

  LSC_DEVICE void take_all(const RowState<double>* states, int64_t count) {
    for (int64_t first = 0; first < count; first += kWarp) {
      if (first + lane_index() < count) copy_fresh(states + first + lane_index(), memory_.chunks[int(lane_index())]);
      if (first + kWarp <= count) settle(first + kWarp);
    }
  }

  // After the last of `count`: memory.row_state is the row's.
  LSC_DEVICE void done(int64_t count) {
    if (count % kWarp != 0) settle(count);
  }

 private:
  static LSC_DEVICE void copy_fresh(const RowState<double>* from, RowState<double>& to) {
    constexpr int kWords = sizeof to / sizeof(uint64_t);
    uint64_t words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_fresh(reinterpret_cast<const uint64_t*>(from) + i);
    memcpy(static_cast<void*>(&to), words, sizeof words);
  }

  LSC_DEVICE void settle(int64_t count) {
    const int n = int((count - 1) % kWarp) + 1;
    sync_warp();
    merge_all(memory_.chunks.data(), n, memory_.temperature, kReverse);
    if (lane_index() == 0) {
      if (count <= kWarp) {
        memory_.row_state[0] = memory_.chunks[0];
      } else {
        merge_apart(&memory_.row_state[0], &memory_.chunks[0], memory_.temperature, kReverse);
      }
    }
    sync_warp();
  }

  ReaderMemory& memory_;
};

// What backward reads of a scale and of log S' are floats. The other model's scale may be m - c, and far from its logits: then the log-sum
// is the better scale.
LSC_COLD void round_scale(RowState<double>& row, double temperature, bool reverse) {
  if (!(row.other_S > 0)) return;
  const double log_S = std::log(row.other_S), moved = std::fabs(log_S) > 16 ? temperature * log_S : 0;
  rescale_other<double>(row, float(row.other_scale + moved), temperature, reverse);
}

// One model's row read by itself, whatever its dtype; by the whole block.
LSC_COLD void read_alone(ReaderMemory& memory, const Rows& rows, int64_t row, int64_t vocabulary, double temperature) {
  const RowSource<Mixed> source(rows, row_offset(rows, row));
  RowReader<Mixed, Reading::alone> reader(memory, source, source, temperature, 0, vocabulary);
  ChunkStates<false> chunks(memory);
  reader.read([&](int64_t i, const RowState<double>& state) { chunks.take(i, state); });
  if (warp_index() == 0) chunks.done(chunks_of(vocabulary));
  sync_block();
}

LSC_COLD PairRow pair_of_row(const RowState<double>& row, double temperature, bool reverse) {
  return pair_row(row, temperature, reverse);
}

LSC_DEVICE void write_undefined(int64_t row, const TokenOutputs& out) {
  if (out.kl) out.kl[row] = NAN;
  if (out.ref_logprobs) out.ref_logprobs[row] = NAN;
  out.logprobs[row] = out.entropy[row] = NAN;
  if (out.saved)
    for (int i = 0; i < kSaved; ++i) out.saved[row * kSaved + i] = NAN;
}

// One thread: the end of a row that the block has read.
LSC_COLD void finish_row(const TokenForward& a, int64_t row, const PairRow& pair, float x, float y) {
  write_row(a.rows, row, pair, x, y, a.options(), a.out);
}

// Block, after its last chunk: the row's outputs, where this is the block that writes them.
template <Reading kReading>
LSC_COLD bool end_row(ReaderMemory& memory, const TokenForward& a) {
  constexpr bool kPair = kReading != Reading::alone, kReverse = kReading == Reading::pair_reversed;
  const TokenRows& rows = a.rows;
  const int64_t row = memory.row, V = rows.vocabulary, chunks = chunks_of(V);
  const double temperature = memory.temperature;
  ChunkStates<kReverse> states(memory);
  if (memory.states) {
    if (thread_index() == 0) {
      publish();
      const unsigned last = unsigned(a.blocks_per_row) - 1;
      memory.last = atomic_count(a.arrivals + row, last) == last;
      publish();
    }
    sync_block();
    if (!memory.last) return false;
    if (warp_index() == 0) states.take_all(a.states + row * chunks, chunks);
  }
  if (warp_index() == 0) states.done(chunks);

  PairRow pair{};
  if (thread_index() == 0) {
    round_scale(memory.row_state[0], temperature, kReverse);
    pair = pair_of_row(memory.row_state[0], temperature, kReverse);
    memory.undefined = kPair && std::isnan(pair.L);
  }
  if constexpr (kPair) {
    sync_block();
    if (memory.undefined) {
      // one model's row is undefined; the other's own outputs are not, but came from sums that the two share
      read_alone(memory, rows.policy, row, V, temperature);
      if (thread_index() == 0) pair.policy = model_row(memory.row_state[0]);
      read_alone(memory, rows.ref, row, V, temperature);
      if (thread_index() == 0) pair.ref = model_row(memory.row_state[0]);
    }
  }
  if (thread_index() == 0) {
    const int64_t action = action_at(rows, row);
    finish_row(a, row, pair, logit_at(rows.policy, row, action), kPair ? logit_at(rows.ref, row, action) : 0.0f);
  }
  return true;
}

// One block of a row's: its outputs, where this is the block that writes them, which is then true. Nothing of a row that is
// not counted is read.
template <typename T, Reading kReading>
LSC_DEVICE bool token_row(ReaderMemory& memory, const TokenForward& a, int64_t row, bool counts) {
  constexpr bool kPair = kReading != Reading::alone, kReverse = kReading == Reading::pair_reversed;
  const TokenRows& rows = a.rows;
  const int64_t V = rows.vocabulary, action = action_at(rows, row);
  const bool outside = action < 0 || action >= V;
  const int part = part_of_block(a.blocks_per_row);
  if (!counts || outside) {
    if (part == 0 && thread_index() == 0) {
      if (counts) {
        write_undefined(row, a.out);
      } else {
        write_nothing(row, a.out);
      }
    }
    return part == 0;
  }
  const Rows &main_rows = kReverse ? rows.ref : rows.policy, &other_rows = kReverse ? rows.policy : kPair ? rows.ref : rows.policy;
  const RowSource<T> main(main_rows, row_offset(main_rows, row)), other(other_rows, row_offset(other_rows, row));
  const int64_t chunks = chunks_of(V), first = chunks * part / a.blocks_per_row, last = chunks * (part + 1) / a.blocks_per_row;
  if (thread_index() == 0) {
    memory.row = row;
    memory.states = a.blocks_per_row > 1 ? a.states + row * chunks + first : nullptr;
  }
  RowReader<T, kReading> reader(memory, main, other, temperature_at(rows, row), first * kChunk, last * kChunk < V ? last * kChunk : V);
  reader.read([&](int64_t i, const RowState<double>& state) {
    if (!memory.states) {
      ChunkStates<kReverse>(memory).take(i, state);
    } else if (lane_index() == 0) {
      memory.states[i] = state;
    }
  });
  return end_row<kReading>(memory, a);
}

template <typename T, Reading kReading>
LSC_KERNEL(kThreads, kBlocksAtOnce) token_forward(LSC_ARGUMENT TokenForward a) {
  const int64_t row = row_of_block(a.blocks_per_row);
  token_row<T, kReading>(block_memory<ReaderMemory>(), a, row, counted(a.rows, row));
}

// The coefficients of a row's columns, in the units that the loop works in.
struct ColumnCoefficients {
  float k, inverse, main, other;  // log2(e)/T, 1/T, both scales
  float inverse_S, inverse_ref_S;
  float centre, centre_low, L, small_limit;
  float p0, p_logit, p_delta, p_minus_q, q0, q_delta, q_minus_p;
  float policy_action, ref_action;  // the gradients at the action
  bool plain, reads_ref;
};

// One thread: from what forward saved.
LSC_COLD void column_coefficients(const TokenBackward& a, int64_t row, float x, float y, ColumnCoefficients& out) {
  const double T = temperature_at(a.rows, row);
  const float* saved = a.grads.saved + row * kSaved;
  const Coefficients c = coefficients(a.rows, row, a.options(), a.grads);
  out.k = float(1.4426950408889634074 / T), out.inverse = float(1 / T);
  out.main = saved[kScale], out.other = saved[kRefScale];
  out.inverse_S = saved[kInverseS];
  out.inverse_ref_S = std::exp(-saved[kRefLogS]);
  const double centre = saved_double(saved + kCentre);
  out.plain = std::fabs(centre) <= T;
  out.centre = out.plain ? float(centre / T) : saved[kCentre], out.centre_low = out.plain ? 0.0f : saved[kCentreLow];
  out.L = saved[kL];
  // a large L has rounded away what small log ratios differ by
  out.small_limit = std::fabs(saved[kL]) < kSmallLogRatio ? kSmallLogRatio : 0.0f;
  out.p0 = float(c.p0), out.p_logit = float(c.p_logit / (double(out.k) * T));
  out.p_delta = float(c.p_delta), out.p_minus_q = float(c.p_minus_q);
  out.q0 = float(c.q0), out.q_delta = float(c.q_delta), out.q_minus_p = float(c.q_minus_p);
  out.reads_ref = a.grads.ref || c.p_delta != 0 || c.p_minus_q != 0;
  const ColumnGradient action = action_gradient(x, y, out.reads_ref, saved, c, T);
  out.policy_action = float(action.policy), out.ref_action = float(action.ref);
}

// One column's gradients; the reference's logit is used only where kReference.
template <bool kReference>
LSC_DEVICE void column_gradient(float x, float y, const ColumnCoefficients& c, float& to_policy, float& to_ref) {
  const float u = max_nan((x - c.main) * c.k, -200.0f), p = exp2_fast(u) * c.inverse_S;
  const float per_weight = fma(c.p_logit, u, c.p0);
  if constexpr (!kReference) {
    to_policy = p * per_weight;
  } else {
    const float unlimited = c.plain ? fma(x - y, c.inverse, -c.centre) : centred_difference(x, y, c.centre, c.centre_low) * c.inverse;
    // a column that either model excludes has no finite log ratio, and no weight
    const float delta = fabsf(unlimited) < INFINITY ? unlimited : 0.0f;
    to_policy = p * fma(c.p_delta, delta, per_weight);
    // p - q = -p expm1(-d) = p (d - d^2 P(d)), without the cancellation of nearly equal columns
    const float d = unlimited + c.L;
    float difference, q;
    if (fabsf(d) < c.small_limit) {
      difference = p * (d - d * d * expm1_remainder(d));
      q = p - difference;
    } else {
      q = exp2_fast(max_nan((y - c.other) * c.k, -200.0f)) * c.inverse_ref_S;
      difference = p - q;
    }
    to_policy = fma(c.p_minus_q, difference, to_policy);
    to_ref = q * fma(c.q_delta, delta, c.q0) - c.q_minus_p * difference;
  }
}

// Whole tiles of a row that is not aligned: each lane but the first stores the aligned words in which its columns begin, with the last
// columns of the lane before it. What is left at both ends of a warp's columns makes one group, an element a lane.
template <typename T>
LSC_DEVICE void write_shifted(T* row, int64_t tile, const float (&values)[kColumns], unsigned char* exchange) {
  const int bytes = int(reinterpret_cast<uintptr_t>(row) % 16), before = bytes / int(sizeof(T)), lane = int(lane_index());
#pragma unroll
  for (int first = 0; first < kColumns; first += kGroup<T>) {
    T group[kGroup<T>];
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) from_float(values[first + i], &group[i]);
    memcpy(__builtin_assume_aligned(staged_group(exchange, first / kGroup<T>), 16), group, 16);
  }
  sync_warp();
#pragma unroll
  for (int first = 0; first < kColumns; first += kGroup<T>) {
    const unsigned char* own = staged_group(exchange, first / kGroup<T>);
    T* const group = row + column_of<T>(tile, first);
    if (lane > 0) store_once(group - before, words_within<sizeof(T)>(own - 16, own, unsigned(16 - bytes)));
    if (lane < kGroup<T>) {
      const int away = (lane < kGroup<T> - before ? 0 : kWarp - 1) - lane;  // the lane that has it
      group[away * kGroup<T> + lane] = reinterpret_cast<const T*>(own + away * 16)[lane];
    }
  }
  sync_warp();
}

// The thread's columns of one tile, stored as they were read.
template <typename T, typename Out>
LSC_DEVICE void write_columns(Out* row, int64_t tile, int64_t end, bool wide, const float (&values)[kColumns], unsigned char* exchange) {
  if constexpr (std::is_same_v<T, Out>) {
    if (!wide && tile + kTile <= end) return write_shifted(row, tile, values, exchange);
  }
#pragma unroll
  for (int first = 0; first < kColumns; first += kGroup<T>) {
    Out group[kGroup<T>];
#pragma unroll
    for (int i = 0; i < kGroup<T>; ++i) from_float(values[first + i], &group[i]);
    const int64_t column = column_of<T>(tile, first);
    using Words = std::conditional_t<sizeof group == 16, Words4, Words2>;
    if (wide && column + kGroup<T> <= end) {
      Words words;
      memcpy(&words, group, sizeof words);
      store_once(row + column, words);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; ++i)
        if (column + i < end) row[column + i] = group[i];
    }
  }
}

// A row of a contiguous gradient.
template <typename T>
class RowSink {
 public:
  LSC_DEVICE RowSink(void* gradient, DType dtype, int64_t row, int64_t vocabulary)
      : dtype_(dtype), row_(gradient ? static_cast<char*>(gradient) + row * vocabulary * size() : nullptr),
        wide_(reinterpret_cast<uintptr_t>(row_) % (kGroup<T> * size()) == 0) {}

  // Warps exchange their columns in a tile's place of the ring, which is free.
  LSC_DEVICE void write(int64_t tile, int64_t end, const float (&values)[kColumns], unsigned char* exchange) const {
    if (!row_) return;
    if constexpr (!std::is_same_v<T, Mixed>) {
      write_columns<T>(reinterpret_cast<T*>(row_), tile, end, wide_, values, exchange);
    } else {
      switch (dtype_) {
        case DType::float32: return write_columns<T>(reinterpret_cast<float*>(row_), tile, end, wide_, values, exchange);
        case DType::bfloat16: return write_columns<T>(reinterpret_cast<BFloat16*>(row_), tile, end, wide_, values, exchange);
        case DType::float16: return write_columns<T>(reinterpret_cast<Half*>(row_), tile, end, wide_, values, exchange);
      }
    }
  }

 private:
  LSC_DEVICE int size() const { return dtype_ == DType::float32 ? 4 : 2; }

  DType dtype_;
  char* row_;
  bool wide_;
};

struct BackwardMemory {
  RingMemory ring;
  ColumnCoefficients coefficients;
};

template <typename T, bool kReference>
LSC_DEVICE void write_gradients(
    BackwardMemory& memory, const RowSource<T>& policy, const RowSource<T>& ref, const RowSink<T>& to_policy, const RowSink<T>& to_ref,
    int64_t action, int64_t begin, int64_t end) {
  const ColumnCoefficients c = memory.coefficients;
  TileRing<T, kReference ? 2 : 1> ring(memory.ring, policy, ref, begin, end);
  ring.begin_at(0);
  for (int64_t tile = begin; tile < end; tile += kTile) {
    float x[kColumns], y[kColumns] = {}, policy_gradient[kColumns], ref_gradient[kColumns];
    ring.unpack(0, x);
    if constexpr (kReference) ring.unpack(1, y);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) column_gradient<kReference>(x[i], y[i], c, policy_gradient[i], ref_gradient[i]);
    if (action >= tile && action < tile + kTile) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (column_of<T>(tile, i) != action) continue;
        policy_gradient[i] = c.policy_action, ref_gradient[i] = c.ref_action;
      }
    }
    to_policy.write(tile, end, policy_gradient, ring.exchange());
    if constexpr (kReference) to_ref.write(tile, end, ref_gradient, ring.exchange());
    ring.pass();
  }
  ring.wait_for_all();
}

template <typename T, bool kPair>
LSC_KERNEL(kThreads, kBlocksAtOnce) token_backward(LSC_ARGUMENT TokenBackward a) {
  BackwardMemory& memory = block_memory<BackwardMemory>();
  const int64_t row = row_of_block(a.blocks_per_row), part = part_of_block(a.blocks_per_row);
  const TokenRows& rows = a.rows;
  const int64_t V = rows.vocabulary, action = action_at(rows, row), chunks = chunks_of(V);
  const int64_t begin = chunks * part / a.blocks_per_row * kChunk, last = chunks * (part + 1) / a.blocks_per_row * kChunk;
  const int64_t end = last < V ? last : V;
  const RowSink<T> to_policy(a.grads.policy, rows.policy.dtype, row, V), to_ref(a.grads.ref, rows.ref.dtype, row, V);
  const bool outside = action < 0 || action >= V;
  if (!counted(rows, row) || outside) {
    float values[kColumns];
    for (float& each : values) each = counted(rows, row) ? NAN : 0.0f;
    for (int64_t tile = begin; tile < end; tile += kTile) {
      to_policy.write(tile, end, values, memory.ring.models[0].stages);
      to_ref.write(tile, end, values, memory.ring.models[0].stages);
    }
    return;
  }
  const RowSource<T> policy(rows.policy, row_offset(rows.policy, row));
  const RowSource<T> ref = kPair ? RowSource<T>(rows.ref, row_offset(rows.ref, row)) : policy;
  if (thread_index() == 0) column_coefficients(a, row, policy.at(action), kPair ? ref.at(action) : 0.0f, memory.coefficients);
  sync_block();
  if constexpr (kPair) {
    if (memory.coefficients.reads_ref) return write_gradients<T, true>(memory, policy, ref, to_policy, to_ref, action, begin, end);
  }
  write_gradients<T, false>(memory, policy, ref, to_policy, to_ref, action, begin, end);
}

}  // namespace LSC_ISA
}  // namespace lsc
