// gae and, without values, discounted_returns on CUDA: a scan of the maps of math/returns.h, in double.
//
// A tile is 2048 positions, 8 in a row for each of 256 threads. A thread composes the maps of its own, warps and the block scan
// those, and each thread goes over its positions once more with what it is passed. A sequence is cut into tiles from its first
// token on, whatever lies beside it. A block takes the tiles of a sequence in turn; where sequences are few and long, a block
// takes one tile, in two launches: the first writes each tile's map, the second applies those beyond its own, in order. The
// operations are the same ones, and so are the bits. 9 bytes a position are read, in fp32, and 8 written; in two launches the reads
// are done twice.
//
// On a GPU the bounds of packed sequences are taken as they are, but never outside the tokens; the first is 0 and the last N.
#include "cuda/mask.h"
#include "cuda/tensors.h"
#include "cuda/transform.h"
#include "math/returns.h"
#include "tensors/mask.h"

namespace lsc {
namespace cuda {

constexpr int kScanThreads = 256, kScanWarps = kScanThreads / kWarp, kOwn = 8;
constexpr int64_t kTile = kScanThreads * kOwn;
// With fewer sequences than this for each multiprocessor, a sequence is shared by blocks.
constexpr int64_t kSequencesEach = 4;

enum class Phase : int32_t { whole, part, apply };

struct SequencePlaces {
  const void* bounds;  // [sequences + 1], or null: all of `tokens`
  bool bounds_are_int32;
  int64_t bounds_stride, sequences, tokens;
};

// From the last position to the first, or for gradients from the first to the last. Both ways two floats a position are read
// and two written; a pointer is null where there is none.
struct ScanArguments {
  SequencePlaces places;
  MaskRows mask;
  Recursion recursion;
  Holes holes;
  Phase phase;
  TypedData first, second, bootstrap;  // rewards and values, or the gradients to advantages and returns
  float *first_out, *second_out;       // returns and advantages, or the gradients to rewards and values
  float* to_bootstrap;
  Affine* parts;
};

struct Share {
  int64_t sequence, start, length, part, tiles, first, last;
};

struct ScanMemory {
  float first[kTile + kTile / kWarp], second[kTile + kTile / kWarp];
  bool counted[kTile];
  Affine warps[kScanWarps], parts[kScanThreads];
  LastCountedMemory last;
};

// Threads read 8 floats in a row: without the gaps all of a warp would meet in four banks.
LSC_DEVICE int spread(int place) { return place + place / kWarp; }

LSC_DEVICE int64_t bound_at(const SequencePlaces& p, int64_t b) {
  if (b == 0) return 0;
  if (b >= p.sequences) return p.tokens;
  const int64_t bound = integer_at(p.bounds, p.bounds_are_int32, b * p.bounds_stride);
  return bound < 0 ? 0 : bound > p.tokens ? p.tokens : bound;
}

LSC_DEVICE Share share_of(const SequencePlaces& p, Phase phase) {
  const int64_t block = block_index();
  Share own{block, 0, p.tokens, 0, 0, 0, 0};
  if (p.bounds) {
    // the maps of sequence b begin at start / kTile + b, which leaves each room enough
    if (phase != Phase::whole) {
      int64_t low = 0, high = p.sequences;
      while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (bound_at(p, middle) / kTile + middle <= block ? low : high) = middle;
      }
      own.sequence = low;
    }
    own.start = bound_at(p, own.sequence);
    own.length = bound_at(p, own.sequence + 1) - own.start;
    if (own.length < 0) own.length = 0;
    own.part = own.start / kTile + own.sequence;
  }
  own.tiles = own.length == 0 ? 1 : (own.length + kTile - 1) / kTile;
  if (!p.bounds) {
    if (phase != Phase::whole) own.sequence = block / own.tiles;
    own.start = own.sequence * own.length;
    own.part = own.sequence * own.tiles;
  }
  own.first = phase == Phase::whole ? 0 : block - own.part;
  own.last = phase == Phase::whole ? own.tiles - 1 : own.first < own.tiles ? own.first : own.first - 1;
  return own;
}

// What comes of x through the maps [begin, end) of parts, from the first or from the last on.
template <bool kForward>
LSC_DEVICE double through_parts(ScanMemory& memory, const Affine* parts, int64_t begin, int64_t end, double x) {
  for (int64_t done = 0; done < end - begin; done += kScanThreads) {
    const int64_t left = end - begin - done, i = done + thread_index();
    sync_block();
    if (thread_index() < left) memory.parts[thread_index()] = kForward ? parts[end - 1 - i] : parts[begin + i];
    sync_block();
    for (int64_t j = 0; j < (left < kScanThreads ? left : kScanThreads); ++j) x = applied(memory.parts[j], x);
  }
  return x;
}

// The map of what lies before each thread's own in the order of the scan, and that of the whole block.
struct Before {
  Affine own, all;
};
LSC_DEVICE Before scan(ScanMemory& memory, Affine map) {
  const int lane = int(lane_index()), warp = int(warp_index());
  const Affine nothing{1, 0};
  for (int step = 1; step < kWarp; step *= 2) {
    const Affine other{shuffle(map.factor, (lane - step) & (kWarp - 1)), shuffle(map.term, (lane - step) & (kWarp - 1))};
    if (lane >= step) map = composed(other, map);
  }
  Affine own{shuffle(map.factor, (lane - 1) & (kWarp - 1)), shuffle(map.term, (lane - 1) & (kWarp - 1))};
  if (lane == 0) own = nothing;
  if (lane == kWarp - 1) memory.warps[warp] = map;
  sync_block();
  Affine all = nothing, before = nothing;
  for (int w = 0; w < kScanWarps; ++w) {
    if (w == warp) before = all;
    all = composed(all, memory.warps[w]);
  }
  return {composed(before, own), all};
}

template <bool kForward>
LSC_DEVICE Affine map_at(const ScanArguments& a, const ScanMemory& memory, int place, bool inner) {
  if (!inner) return {1, 0};
  if (!memory.counted[place]) return a.recursion.hole();
  const double first = memory.first[spread(place)], second = memory.second[spread(place)];
  return kForward ? a.recursion.counted(first, second) : a.recursion.counted_backward(first + second);
}

// Tile: from global memory to the block's. What does not count is 0.
LSC_DEVICE void read_tile(const ScanArguments& a, ScanMemory& memory, const Share& own, int64_t begin) {
#pragma unroll 4
  for (int i = 0; i < kOwn; ++i) {
    const int place = i * kScanThreads + int(thread_index());
    const int64_t position = begin + place, at = own.start + position;
    const bool counted = position < own.length && is_counted(a.mask, a.places.bounds ? own.start : own.sequence, position);
    memory.counted[place] = counted;
    memory.first[spread(place)] = counted && a.first.data ? load_one(a.first.dtype, a.first.data, at) : 0.0f;
    memory.second[spread(place)] = counted && a.second.data ? load_one(a.second.dtype, a.second.data, at) : 0.0f;
  }
}

LSC_DEVICE void write_tile(const ScanArguments& a, const ScanMemory& memory, const Share& own, int64_t begin) {
  for (int i = 0; i < kOwn; ++i) {
    const int place = i * kScanThreads + int(thread_index());
    if (begin + place >= own.length) break;
    a.first_out[own.start + begin + place] = memory.first[spread(place)];
    if (a.second_out) a.second_out[own.start + begin + place] = memory.second[spread(place)];
  }
}

// A thread's own positions, x being what the first of them in the order of the scan is passed.
template <bool kForward>
LSC_DEVICE void results(const ScanArguments& a, ScanMemory& memory, const Share& own, int64_t begin, int64_t end, double x) {
#pragma unroll 2
  for (int i = 0; i < kOwn; ++i) {
    const int turn = int(thread_index()) * kOwn + i, place = kForward ? int(kTile) - 1 - turn : turn;
    const bool counted = memory.counted[place];
    float &first = memory.first[spread(place)], &second = memory.second[spread(place)];
    const double passed = x, given = first, value = second;
    x = applied(map_at<kForward>(a, memory, place, begin + place <= end), x);
    if (kForward) {
      first = counted ? float(given + passed) : 0.0f;
      second = counted ? float(given + passed - value) : 0.0f;
    } else {
      first = counted ? float(x) : 0.0f;
      second = counted ? float(times(a.recursion.of_value, passed) - given) : 0.0f;
      if (a.to_bootstrap && begin + place == own.length - 1) a.to_bootstrap[own.sequence] = float(times(a.recursion.gamma, x));
    }
  }
}

template <bool kForward>
LSC_DEVICE void scan_sequence(const ScanArguments& a) {
  ScanMemory& memory = block_memory<ScanMemory>();
  const Share own = share_of(a.places, a.phase);
  // the position after which nothing is a step; it matters only where something enters or leaves the sequence at its end
  int64_t end = own.length - 1;
  if ((a.bootstrap.data || a.to_bootstrap) && a.holes != Holes::skip) {
    end = last_counted<kScanThreads>(memory.last, a.mask, a.places.bounds ? own.start : own.sequence, own.length);
  }
  double x = 0;
  if (a.bootstrap.data) x = times(a.recursion.gamma, double(load_one(a.bootstrap.dtype, a.bootstrap.data, own.sequence)));
  if (a.phase == Phase::apply) {
    const Affine* parts = a.parts + own.part;
    x = kForward ? through_parts<true>(memory, parts, own.last + 1, own.tiles, x) : through_parts<false>(memory, parts, 0, own.first, x);
  }
  for (int64_t turn = own.first; turn <= own.last; ++turn) {
    const int64_t tile = kForward ? own.first + own.last - turn : turn, begin = tile * kTile;
    read_tile(a, memory, own, begin);
    sync_block();
    Affine map{1, 0};
#pragma unroll 2
    for (int i = 0; i < kOwn; ++i) {
      const int at = int(thread_index()) * kOwn + i, place = kForward ? int(kTile) - 1 - at : at;
      map = composed(map, map_at<kForward>(a, memory, place, begin + place <= end));
    }
    const Before before = scan(memory, map);
    if (a.phase == Phase::part) {
      if (thread_index() == 0) a.parts[own.part + tile] = before.all;
    } else {
      results<kForward>(a, memory, own, begin, end, applied(before.own, x));
      sync_block();
      write_tile(a, memory, own, begin);
      x = applied(before.all, x);
    }
  }
  if (!kForward && a.to_bootstrap && own.length == 0 && thread_index() == 0) a.to_bootstrap[own.sequence] = 0;
}

LSC_KERNEL(kScanThreads, 3) gae_returns(LSC_ARGUMENT ScanArguments a) { scan_sequence<true>(a); }
LSC_KERNEL(kScanThreads, 3) gae_gradients(LSC_ARGUMENT ScanArguments a) { scan_sequence<false>(a); }

namespace {

void run(void (*kernel)(ScanArguments), ScanArguments a, const Tensor& given, const std::optional<Tensor>& mask,
         const std::optional<Tensor>& cu_seqlens) {
  const bool packed = cu_seqlens.has_value();
  a.places = {nullptr, false, 0, given.size(0), packed ? given.size(0) : given.size(1)};
  if (packed) {
    a.places.bounds = cu_seqlens->data_ptr(), a.places.bounds_stride = cu_seqlens->stride(0);
    a.places.bounds_are_int32 = cu_seqlens->scalar_type() == torch::headeronly::ScalarType::Int;
    a.places.sequences = cu_seqlens->size(0) - 1;
  }
  a.mask = packed ? packed_mask(mask) : mask_rows(mask);
  const int64_t sequences = a.places.sequences, tokens = a.places.tokens;
  const int64_t tiles = packed ? tokens / kTile + sequences : sequences * ((tokens + kTile - 1) / kTile);
  if (tokens <= kTile || sequences >= kSequencesEach * multiprocessors(given)) {
    a.phase = Phase::whole;
    return launch(kernel, sequences, kScanThreads, given, a);
  }
  const int64_t bytes = tiles * int64_t(sizeof(Affine));
  const Tensor parts = empty_on(given, Sizes(&bytes, 1), torch::headeronly::ScalarType::Byte);
  a.parts = static_cast<Affine*>(parts.data_ptr());
  for (const Phase phase : {Phase::part, Phase::apply}) {
    a.phase = phase;
    launch(kernel, tiles, kScanThreads, given, a);
  }
}

}  // namespace

static std::tuple<Tensor, Tensor> forward(
    Tensor rewards, std::optional<Tensor> values, std::optional<Tensor> mask, std::optional<Tensor> bootstrap,
    std::optional<Tensor> cu_seqlens, double gamma, double lam, int64_t holes) {
  const Tensor reward = dense(rewards);
  const std::optional<Tensor> value = dense(values), beyond = dense(bootstrap);
  const Tensor returns = floats_on(reward, reward.sizes());
  const Tensor advantages = value ? floats_on(reward, reward.sizes()) : nothing_on(reward);
  ScanArguments a{{}, {}, Recursion(gamma, lam, Holes(holes)), Holes(holes), {}, typed(reward), typed(value), typed(beyond),
                  floats(returns), value ? floats(advantages) : nullptr, nullptr, nullptr};
  run(&gae_returns, a, reward, mask, cu_seqlens);
  return {advantages, returns};
}

static std::tuple<Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> to_advantages, std::optional<Tensor> to_returns, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
    std::optional<Tensor> bootstrap, double gamma, double lam, int64_t holes, bool want_values) {
  const std::optional<Tensor> advantages = dense(to_advantages), returns = dense(to_returns);
  const Tensor& given = advantages ? *advantages : *returns;
  const Tensor to_rewards = floats_on(given, given.sizes());
  const Tensor to_values = want_values ? floats_on(given, given.sizes()) : nothing_on(given);
  const Tensor to_bootstrap = bootstrap ? floats_on(given, bootstrap->sizes()) : nothing_on(given);
  ScanArguments a{{}, {}, Recursion(gamma, lam, Holes(holes)), Holes(holes), {}, typed(advantages), typed(returns), typed(std::optional<Tensor>()),
                  floats(to_rewards), want_values ? floats(to_values) : nullptr, bootstrap ? floats(to_bootstrap) : nullptr, nullptr};
  run(&gae_gradients, a, given, mask, cu_seqlens);
  return {to_rewards, to_values, to_bootstrap};
}

LSC_CUDA_OPS(m) {
  m.impl("gae_forward", TORCH_BOX(&forward));
  m.impl("gae_backward", TORCH_BOX(&backward));
}

}  // namespace cuda
}  // namespace lsc
