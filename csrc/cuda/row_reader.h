// Reads a row of one or two models' logits once, block by block, and makes its RowState.
//
// Design constraint: a pair of bf16 logits may take about 25 instructions of a thread if the memory of an H200 is to be kept
// busy. So there is one exponential per pair, no pass for the maximum, no barrier in the loop, one branch a tile that whole
// warps take for all that is seldom needed, and nothing in the loop that has to do with the end of a row.
//
// Who computes what. A row is cut into chunks of kChunk columns; the cut depends on V alone. A block reads a chunk in tiles:
//
//   start   All threads find the largest main logit of the first tile, about which the chunk's sums are taken: m, and as
//           the centre c the difference x - y there; or the tile's weighted mean of x - y, if that logit is unlike the rest.
//   loop    Each thread adds its columns to float sums of its own. Warps do not wait for one another. A warp votes once a tile
//           whether its columns are the usual ones; the sums that it has made by then tell. If not, it takes the tile again
//           with care, and the next ones too while they need it. A logit above m (which shows in the sum of the weights)
//           becomes its m; one far above brings its own centre too, unless the models are far apart, and then the sums so far
//           are parked as a RowState in double.
//   end     The sums of the threads are added up in double, and become the chunk's state with what was parked. A warp whose
//           columns turn out to be elsewhere than the centre takes them once more, from the second cache.
//
// The states of the chunks are merged in a fixed order, by the lanes of a warp: the same bits whether one block read them
// all or each another block.
//
// Two ways to take delta = (x - y)/T - c/T. Where the centre is no larger than a few spreads of the differences about it, and
// than T, the rounding of x - y is no larger than a few of delta's own, and two instructions do. Elsewhere (a reference
// shifted against the policy) the exact difference of math/log_ratio.h is taken. Which it is, is decided with the origin.
//
// w = 2^((x - m) k), k = log2(e)/T, is exactly 1 at the largest logit: what is left of 1 where a row is sure of one token
// stays accurate to its own size.
#pragma once

#include "cuda/tile_ring.h"
#include "math/log_ratio.h"
#include "math/row_state.h"

namespace lsc {
namespace LSC_ISA {

constexpr int kTilesOfChunk = 32;
constexpr int64_t kChunk = kTilesOfChunk * kTile;

LSC_DEVICE int64_t chunks_of(int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

// What a block reads: one model's logits, or two; kReverse: the other model is the policy, so the entropy is its.
enum class Reading { alone, pair, pair_reversed };

// Where the weights of a thread's columns add up to more than this, one of them may be above the largest so far.
constexpr float kLevel = 1;
// A logit this many powers of two above the largest so far brings its own centre.
constexpr float kRise = 4;
// A sum may lose one part in this many of its digits' worth to a centre that turns out to be elsewhere.
constexpr double kLost = 16;
// A centre of so many spreads may cost a log ratio that many of its own roundings.
constexpr float kPlainCentre = 4;
// Where a chunk's first tile has a mean of delta^2/2 (or of |delta|, where that is larger than 1) above this, the models are taken to be
// far apart.
constexpr float kFar = 0.5f;
// The centre is 0 then: x - y is rounded in its own size, which may not be much more than the KL.
constexpr double kFarCentre = 16;
// So many nats may the other model's sum be above what the main one's says of it.
constexpr double kLevelDistance = 20;
// A sum of weights that is as small has some that a float does not hold.
constexpr double kFaint = 0x1p-20;
// A maximum below all logits that are not -inf.
constexpr float kUnseen = -0x1.fffffep127f;
// 2^u is 0 from here on.
constexpr float kWeightless = -200;
constexpr float kLog2e = 0x1.715476p+0f;

struct Temperature {
  float k, inverse;

  LSC_DEVICE explicit Temperature(double temperature)
      : k(float(1.4426950408889634074 / temperature)), inverse(float(1 / temperature)) {}
};

// About what sums are taken.
struct Origin {
  float main = kUnseen, other = kUnseen;  // the maxima
  float centre = 0, centre_low = 0;       // plain: c/T in one float; else c in two
  bool plain = false;

  LSC_DEVICE void set_centre(double c, bool is_plain, double temperature) {
    plain = is_plain;
    if (plain) {
      centre = float(c / temperature), centre_low = 0;
    } else {
      centre = float(c), centre_low = float(c - double(centre));
    }
  }
  LSC_DEVICE void set_centre_of(const Origin& from) {
    centre = from.centre, centre_low = from.centre_low, plain = from.plain;
  }
  LSC_DEVICE double exact_centre(const Temperature& t) const {
    return plain ? double(centre) / t.inverse : double(centre) + centre_low;
  }
};

// A float sum that keeps what its additions round away.
struct CarefulSum {
  float sum = 0, low = 0;

  LSC_DEVICE void scale(float factor) {
    const float product = sum * factor;
    low = fma(low, factor, fma(sum, factor, -product));
    sum = product;
  }

  LSC_DEVICE void add(float value) {
    const float total = sum + value, added = total - sum;
    low += (sum - (total - added)) + (value - added);
    sum = total;
  }
  LSC_DEVICE double value() const { return double(sum) + low; }
};

// A thread's sums over the columns with |delta| < 0.7: S, D, A, and H of all columns unless reversed.
struct Sums {
  CarefulSum S;
  float D = 0, A = 0, H = 0;
};

// Over the others: W, WD, and V of the other model. In shared memory, since a thread's registers are short.
struct LargeSums {
  CarefulSum W, V;
  float WD = 0, VH = 0;
};

// From weights about one maximum to a larger one, `shift` powers of two below.
template <Reading kReading>
LSC_DEVICE void lower_main(Sums& sums, LargeSums& large, float shift) {
  const float factor = exp2_fast(shift);
  if (factor == 0) shift = 0;  // nothing is left but NaN
  const float policy = kReading == Reading::pair_reversed ? sums.S.sum + sums.A - sums.D : sums.S.sum + large.W.sum;
  sums.H = fma(policy, shift, sums.H) * factor;
  sums.S.scale(factor), large.W.scale(factor);
  sums.D *= factor, sums.A *= factor, large.WD *= factor;
}
LSC_DEVICE void lower_other(LargeSums& large, float shift) {
  const float factor = exp2_fast(shift);
  if (factor == 0) shift = 0;
  large.VH = fma(large.V.sum, shift, large.VH) * factor;
  large.V.scale(factor);
}

// The sums of a warp or a block, in the order in which they lie in shared memory.
enum Total { kS, kD, kA, kH, kW, kWD, kV, kVH, kTotals };

// What is done once for many columns, in double, stands in functions of its own and works in shared memory: it would cost
// the loop its registers.
LSC_COLD void merge_apart(RowState<double>* into, const RowState<double>* from, double temperature, bool reverse) {
  merge(*into, *from, temperature, reverse);
}

template <Reading kReading>
LSC_COLD void make_state(RowState<double>* made, const double* total, const Origin& origin, double temperature, bool other_misses) {
  const Temperature t(temperature);
  RowState<double> out;
  const double T = temperature, to_nats = 1 / (double(t.k) * T);
  out.main_scale = origin.main;
  out.S = total[kS] + total[kW];
  if constexpr (kReading == Reading::alone) {
    out.H = total[kH] * to_nats;
    *made = out;
    return;
  }
  const double S = total[kS], D = total[kD], A = total[kA], W = total[kW], WD = total[kWD], V = total[kV];
  const double other = origin.other;
  out.centre = origin.exact_centre(t);
  if (out.S == 0) out.main_scale = other + out.centre;  // every main logit is -inf: any scale serves
  // the small lanes' share of the other model's sum is about `from_small`, the others' about `other`
  const double small = S + A - D, from_small = out.main_scale - out.centre;
  const double large = scaled(V, std::exp((other - from_small) / T)) - W;  // sum w expm1(-delta) of the large lanes
  out.D = D + WD, out.A = A + (large + WD), out.B = (A - D) + large;
  double H = total[kH] * to_nats;
  out.other_scale = common_scale(from_small, small, other, V);
  const double small_shift = (from_small - out.other_scale) / T, large_shift = (other - out.other_scale) / T;
  out.other_S = scaled(small, std::exp(small_shift)) + scaled(V, std::exp(large_shift));
  if (kReading == Reading::pair_reversed) {
    H = rescaled_entropy_sum(H, small, small_shift) + rescaled_entropy_sum(total[kVH] * to_nats, V, large_shift);
  }
  out.H = H;
  out.other_misses = other_misses;
  *made = out;
}

// The lanes of a warp merge n <= 32 states into the first: neighbours, then pairs of neighbours, and so on.
LSC_DEVICE void merge_all(RowState<double>* states, int n, double temperature, bool reverse) {
  for (int step = 1; step < n; step *= 2) {
    sync_warp();
    const int lane = int(lane_index());
    if (lane % (2 * step) == 0 && lane + step < n) merge_apart(states + lane, states + lane + step, temperature, reverse);
  }
  sync_warp();
}

// Memory of a type whose constructor is not to run.
template <typename T, int kCount>
struct Uninitialised {
  alignas(T) unsigned char bytes[kCount * sizeof(T)];

  LSC_DEVICE T* data() { return reinterpret_cast<T*>(bytes); }
  LSC_DEVICE T& operator[](int i) { return data()[i]; }
};

// Of a warp in a chunk: whether it has parked sums, and whether in those since then the other model misses a column.
struct Marks {
  bool has_parked, misses;
};

struct ReaderMemory {
  RingMemory ring;
  double totals[kWarps][kTotals], block_totals[kTotals];
  Uninitialised<RowState<double>, kWarps> parked, made;  // one of a warp each
  Uninitialised<Origin, kWarps + 1> origin;  // of the warps; and what those have in common that have parked nothing
  Uninitialised<RowState<double>, kWarp> chunks;
  Uninitialised<RowState<double>, 1> row_state;
  double summed_A[kWarps];  // of what is parked, each part about the centre it had
  float first[kWarps][4], check[kWarps][4];
  float main[kWarps], other[kWarps];  // the warps' maxima
  Marks marks[kWarps], ended[kWarps];  // while a chunk is read, and at its end
  bool last, undefined;
  // Of the row: what the loop seldom needs, and its threads have no registers for.
  int64_t row;
  RowState<double>* states;  // where those of its chunks go, if other blocks read chunks of it too
  double temperature;
  float spread[kWarps];  // mean |x - y - c| of the chunk's first tile, at most T
  Uninitialised<LargeSums, kThreads> large;
};

// An A100 has 164 KB a multiprocessor, of which each block takes 1 for itself.
static_assert(kBlocksAtOnce * (sizeof(ReaderMemory) + 1024) <= 164 * 1024);

// One of the sums, over the warps that have parked nothing, brought to common maxima.
LSC_COLD double block_total(const ReaderMemory& memory, unsigned which, float main, float other, float k, bool reverse) {
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (memory.ended[w].has_parked) continue;
    const double* total = memory.totals[w];
    const bool of_other = which == kV || which == kVH;
    const double shift = (of_other ? double(memory.other[w]) - other : double(memory.main[w]) - main) * k;
    double value = total[which];
    if (shift != 0) {
      const double policy = reverse ? total[kS] + total[kA] - total[kD] : total[kS] + total[kW];
      if (which == kH) value += scaled(policy, shift);
      if (which == kVH) value += scaled(total[kV], shift);
      value = scaled(value, std::exp2(shift));
    }
    sum += value;
  }
  return sum;
}

// The KL is what is left of sums about the centre. Where it is little beside what a warp has summed, or beside the square of a centre
// (over T) that was taken away in one float, it has lost its digits.
LSC_COLD bool has_lost_digits(double summed, double kl, double S, double centre) {
  return summed > kLost * kl * S || centre * centre > 2 * kPlainCentre * kPlainCentre * kl;
}

// What columns of large |delta| have added to A, about their centre.
LSC_DEVICE double large_summed(const double* total) { return total[kW] + std::fabs(total[kWD]); }

// Of sums in which no |delta| was large.
LSC_COLD double near_kl(const double* total) {
  const double a = total[kA] / total[kS], mean = total[kD] / total[kS];
  return a - b_minus_log1p(a - mean);
}
LSC_COLD double kl_of(const RowState<double>& row, double temperature) { return summarise(row, temperature).kl; }

template <typename T, Reading kReading>
class RowReader {
 public:
  static constexpr bool kPair = kReading != Reading::alone, kReverse = kReading == Reading::pair_reversed;

  // Of columns [begin, end): whole chunks but for the last of a row.
  LSC_DEVICE RowReader(
      ReaderMemory& memory, const RowSource<T>& main, const RowSource<T>& other, double temperature, int64_t begin, int64_t end)
      : memory_(memory), ring_(memory.ring, main, other, begin, end), t_(temperature) {
    if (thread_index() == 0) memory.temperature = temperature;  // read after the next barrier
  }

  // Warp 0 calls take(i, state) with the state of the i-th chunk of them, which is its first lane's.
  template <typename Take>
  LSC_DEVICE void read(const Take& take) {
    bool again = false;
    for (int tile = 0;; tile = chunk() * kTilesOfChunk) {
      ring_.begin_at(tile);
      while (ring_.tile() < ring_.tiles()) {
        if (!again) start();
        const int in_row = ring_.tiles() - ring_.tile(), in_chunk = kTilesOfChunk - ring_.tile() % kTilesOfChunk;
        const int end = ring_.copied() + (in_row < in_chunk ? in_row : in_chunk);
        do {
          add_tile();
        } while (ring_.copied() < end);
        again = takes_again(again);
        if (again) break;
        finish(take);
      }
      ring_.wait_for_all();
      if (!again) break;
    }
  }

 private:
  LSC_DEVICE void unpack(float (&x)[kColumns], float (&y)[kColumns]) const {
    ring_.unpack(0, x);
    if constexpr (kPair) {
      ring_.unpack(1, y);
    } else {
      for (float& each : y) each = 0;
    }
  }

  // Of the last tile that has been passed.
  LSC_DEVICE int chunk() const { return (ring_.tile() + kTilesOfChunk - 1) / kTilesOfChunk - 1; }

  LSC_DEVICE void add_tile() {
    bool added = false;
    switch (way_) {
      case Way::plain: added = add_usual<true>(); break;
      case Way::exact: added = kPair && add_usual<false>(); break;
      case Way::far: added = kPair && add_far(); break;
      case Way::careful: break;
    }
    if (!added) add_unusual();
    ring_.pass();
  }

  static LSC_DEVICE float sum(const float (&v)[kColumns]) {
    return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
  }

  template <bool kPlain>
  LSC_DEVICE float delta_of(float x, float y) const {
    if constexpr (!kPair) return 0;
    if constexpr (kPlain) return fma(x - y, t_.inverse, -origin_.centre);
    return centred_difference(x, y, origin_.centre, origin_.centre_low) * t_.inverse;
  }

  // Adds a column whose |delta| is small. `h` is of the policy where that is the other model: w e^-delta and its logarithm.
  static LSC_DEVICE void add_small(float u, float w, float delta, float& d, float& a, float& h) {
    const float square = delta * delta, P = expm1_remainder(delta);
    d = fma(w, delta, d);
    a = fma(w * square, P, a);
    if constexpr (kReverse) h = fma(fma(w * square, P, fma(-w, delta, w)), fma(delta, -kLog2e, u), h);
  }

  // A tile in which no |delta| is large, no logit outweighs those so far, and nothing is infinite or NaN. False if it is another one, and has
  // not been added: an infinity makes NaN of 0 u or of delta, and no comparison with NaN holds.
  template <bool kPlain>
  LSC_DEVICE bool add_usual() {
    float x[kColumns], y[kColumns], u[kColumns], w[kColumns], delta[kColumns];
    unpack(x, y);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      u[i] = (x[i] - origin_.main) * t_.k;
      w[i] = exp2_fast(u[i]);
      delta[i] = delta_of<kPlain>(x[i], y[i]);
    }
    float d = 0, a = 0, h = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if constexpr (!kReverse) h = fma(w[i], u[i], h);
      if constexpr (kPair) add_small(u[i], w[i], delta[i], d, a, h);
    }
    const float total = sum(w);
    const bool usual = are_small(delta) & (h > -INFINITY);
    if (any_lane(!(usual & (total <= kLevel)))) {
      // it may be the weights of a flat row that add up to as much
      if (any_lane(!(usual & (largest(w) <= 1)))) return false;
    }
    sums_.S.add(total);
    sums_.D += d, sums_.A += a, sums_.H += h;
    return true;
  }

  // As bits, among which those of negative numbers follow the positive ones, and NaN the infinity of its sign.
  static LSC_DEVICE uint32_t largest_bits(const float (&value)[kColumns]) {
    uint32_t bits[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) bits[i] = float_to_bits(value[i]);
    return largest3(largest3(bits[0], bits[1], bits[2]), largest3(bits[3], bits[4], bits[5]), bits[6] < bits[7] ? bits[7] : bits[6]);
  }
  // By their squares, which are needed anyway.
  static LSC_DEVICE bool are_small(const float (&delta)[kColumns]) {
    float square[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) square[i] = delta[i] * delta[i];
    return largest_bits(square) < float_to_bits(kSmallLogRatio * kSmallLogRatio);
  }

  // How a warp takes its next tile: as a usual one, with one of two kinds of differences; as one of models that are far apart; with care.
  enum class Way { plain, exact, far, careful };

  // A tile of a chunk in which the models are far apart: every column counts as one of large |delta|, with two exponentials and no
  // series. What KL there is must then be large enough to be a difference of sums.
  LSC_DEVICE bool add_far() {
    float x[kColumns], y[kColumns], w[kColumns], v[kColumns], h = 0, wd = 0, vh = 0;
    unpack(x, y);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float u = (x[i] - origin_.main) * t_.k, of_other = (y[i] - origin_.other) * t_.k;
      w[i] = exp2_fast(u), v[i] = exp2_fast(of_other);
      wd = fma(w[i], delta_of<true>(x[i], y[i]), wd);
      if constexpr (kReverse) vh = fma(v[i], of_other, vh);
      if constexpr (!kReverse) h = fma(w[i], u, h);
    }
    const float total = sum(w), total_v = sum(v);
    const bool usual = (fabsf(wd) < INFINITY) & (h + vh > -INFINITY);
    if (any_lane(!(usual & (total <= kLevel) & (total_v <= kLevel)))) {
      if (any_lane(!(usual & (largest(w) <= 1) & (largest(v) <= 1)))) return false;
    }
    sums_.H += h;
    add_large(total, total_v, wd, vh);
    return true;
  }
  LSC_DEVICE void add_large(float w, float v, float wd, float vh) {
    LargeSums& sums = large_sums();
    sums.W.add(w), sums.V.add(v);
    sums.WD += wd;
    if constexpr (kReverse) sums.VH += vh;
  }

  // A thread's columns about an origin, whatever they are. u is limited to where its weight is 0, so that 0 u is 0.
  struct Step {
    float u[kColumns], w[kColumns];
    float delta[kColumns], large[kColumns];  // 0 where |delta| is large; the weights there
    float total, v, vh, wd;                  // all weights; of the columns of large |delta|: the other model's, w delta
  };

  LSC_DEVICE void find_deltas(const float (&x)[kColumns], const float (&y)[kColumns], float (&delta)[kColumns]) const {
    if (origin_.plain) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) delta[i] = delta_of<true>(x[i], y[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) delta[i] = delta_of<false>(x[i], y[i]);
    }
  }
  LSC_DEVICE void weigh_main(const float (&x)[kColumns], float (&u)[kColumns], float (&w)[kColumns]) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      u[i] = max_nan((x[i] - origin_.main) * t_.k, kWeightless);
      w[i] = exp2_fast(u[i]);
    }
  }

  LSC_DEVICE Step weigh(const float (&x)[kColumns], const float (&y)[kColumns]) const {
    Step s;
    weigh_main(x, s.u, s.w);
    s.total = sum(s.w), s.v = s.vh = s.wd = 0;
    if constexpr (kPair) {
      float v[kColumns];
      find_deltas(x, y, s.delta);
      // what the other model's sum owes to a small one would go with the main model's when a far logit lowers that
      const float limit = way_ == Way::far ? 0.0f : kSmallLogRatio;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const bool is_small = fabsf(s.delta[i]) < limit;
        float u = (y[i] - origin_.other) * t_.k;
        if constexpr (kReverse) u = max_nan(u, kWeightless);
        v[i] = is_small ? 0.0f : exp2_fast(u);
        if constexpr (kReverse) s.vh = fma(v[i], u, s.vh);
        s.large[i] = is_small ? 0.0f : s.w[i];
        s.wd = fma(s.large[i], s.delta[i], s.wd);
        s.delta[i] = is_small ? s.delta[i] : 0.0f;
      }
      s.v = sum(v);
    }
    return s;
  }

  LSC_DEVICE void add_unusual() {
    float x[kColumns], y[kColumns];
    unpack(x, y);
    const Step s = weigh(x, y);
    if (!any_lane(!(s.total <= kLevel && s.v <= kLevel))) {
      add(s);
    } else if (!raise()) {
      add_anew();
    }
  }

  LSC_DEVICE void add_anew() {
    float x[kColumns], y[kColumns];
    unpack(x, y);
    add(weigh(x, y));
  }

  LSC_DEVICE void add(const Step& s) {
    float d = 0, a = 0, h = 0;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if constexpr (!kReverse) h = fma(s.w[i], s.u[i], h);
      if constexpr (kPair) add_small(s.u[i], s.w[i] - s.large[i], s.delta[i], d, a, h);
    }
    sums_.D += d, sums_.A += a, sums_.H += h;
    bool usual = largest_bits(s.u) < float_to_bits(kWeightless);
    if constexpr (!kPair) {
      sums_.S.add(s.total);
    } else {
      const float large = sum(s.large);
      float small[kColumns];
#pragma unroll
      for (int i = 0; i < kColumns; ++i) small[i] = s.w[i] - s.large[i];
      sums_.S.add(sum(small));
      add_large(large, s.v, any_lane(!(fabsf(s.wd) < INFINITY)) ? finite_wd(s.large) : s.wd, s.vh);
      usual &= (large == 0) & (s.v == 0);
    }
    // as is one tile, so is the next
    if (way_ != Way::far) way_ = any_lane(!usual) ? Way::careful : usual_way();
  }

  // Warp: the sum of w delta without the columns where delta is infinite, of which it is noted that the other model misses them.
  LSC_DEVICE float finite_wd(const float (&large)[kColumns]) {
    float x[kColumns], y[kColumns], delta[kColumns], wd = 0;
    unpack(x, y);
    find_deltas(x, y, delta);
    bool misses = false;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      wd = fma(large[i], fabsf(delta[i]) < INFINITY ? delta[i] : 0.0f, wd);
      misses |= ((y[i] == -INFINITY) & (x[i] > -INFINITY)) | ((delta[i] == INFINITY) & (large[i] > 0));
    }
    if (any_lane(misses) && lane_index() == 0) marks().misses = true;
    return wd;
  }

  LSC_DEVICE Way usual_way() const { return !kPair || origin_.plain ? Way::plain : Way::exact; }

  LSC_DEVICE Marks& marks() { return memory_.marks[warp_index()]; }
  LSC_DEVICE LargeSums& large_sums() { return memory_.large[int(thread_index())]; }
  LSC_DEVICE void clear_sums() {
    sums_ = Sums(), large_sums() = LargeSums();
    if (lane_index() == 0) marks().misses = false;
  }

  static LSC_DEVICE float largest(const float (&x)[kColumns]) {
    float value = -INFINITY;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) value = value < x[i] ? x[i] : value;
    return value;
  }

  // y at the first largest x of this thread
  static LSC_DEVICE float beside(const float (&x)[kColumns], const float (&y)[kColumns], float value) {
    float result = y[0];
#pragma unroll
    for (int i = kColumns - 1; i >= 0; --i) result = x[i] == value ? y[i] : result;
    return result;
  }

  LSC_DEVICE void store_totals() {
    const LargeSums& large = large_sums();
    double values[kTotals] = {sums_.S.value(), sums_.D, sums_.A, sums_.H, large.W.value(), large.WD, large.V.value(), large.VH};
    const double total = warp_sums8(values);
    if (lane_index() % 4 == 0) memory_.totals[warp_index()][lane_index() / 4] = total;
    sync_warp();
  }

  // The state of the stored totals, made by one lane, for all of them.
  LSC_DEVICE void make_stored() {
    const unsigned warp = warp_index();
    if (lane_index() == 0) {
      memory_.origin[warp] = origin_;
      make_state<kReading>(&memory_.made[warp], memory_.totals[warp], memory_.origin[warp], memory_.temperature, marks().misses);
    }
    sync_warp();
  }
  LSC_DEVICE void park_made() {
    const unsigned warp = warp_index();
    RowState<double>& parked = memory_.parked[warp];
    double summed_A = memory_.totals[warp][kA] + large_summed(memory_.totals[warp]);
    if (marks().has_parked) {
      const double before = memory_.summed_A[warp], main_before = parked.main_scale;
      merge_apart(&parked, &memory_.made[warp], memory_.temperature, kReverse);
      summed_A = scaled(summed_A, std::exp((memory_.made[warp].main_scale - parked.main_scale) / memory_.temperature)) +
                 scaled(before, std::exp((main_before - parked.main_scale) / memory_.temperature));
    } else {
      parked = memory_.made[warp];
    }
    memory_.summed_A[warp] = summed_A;
    marks().has_parked = true;
  }

  // The warp's sums since its last change of origin, into what it has parked.
  LSC_DEVICE void absorb() {
    store_totals();
    make_stored();
    if (lane_index() == 0) park_made();
    sync_warp();
    clear_sums();
  }

  // Takes new maxima from the warp's vector. True if that moved the centre, and the vector has been added on the way. NaN
  // and +inf change nothing: they spread through the sums.
  LSC_DEVICE bool raise() {
    float x[kColumns], y[kColumns];
    unpack(x, y);
    const float own = largest(x), main_max = warp_max(own), other_max = kPair ? warp_max(largest(y)) : kUnseen;
    const bool other_rises = kPair && other_max > origin_.other && other_max < INFINITY;
    if (main_max > origin_.main && main_max < INFINITY) {
      const float rise = (main_max - origin_.main) * t_.k;
      if (kPair && rise > kRise && way_ != Way::far) {
        const uint32_t holders = ballot(own == main_max);
        int holder = 0;
        while (!(holders >> holder & 1)) ++holder;
        const float difference = main_max - shuffle(beside(x, y, own), holder);
        const float other = other_rises ? other_max : origin_.other;
        move_origin(main_max, other, centre_between(difference, main_max, other));
        return true;
      }
      lower_main<kReading>(sums_, large_sums(), -rise);
      origin_.main = main_max;
    }
    if (other_rises) {
      lower_other(large_sums(), (origin_.other - other_max) * t_.k);
      origin_.other = other_max;
    }
    return false;
  }

  // The difference at the largest logit; the maxima's where the other model excludes that one or masks it. Where nothing is known of
  // the other model, a centre about which no column is small: one with weight in it may have none in the main one, from which it
  // would follow.
  static LSC_DEVICE float centre_between(float difference, float main_max, float other_max) {
    constexpr float largest = float(kLargestCentre);
    if (fabsf(difference) < largest) return difference;
    if (!(main_max > -INFINITY && main_max < INFINITY)) return 0;
    return other_max > kUnseen ? main_max - other_max : -largest;
  }

  // Parks the sums so far, and the vector's own state about its largest logit, or about its mean if that suits it better.
  // The vector is taken again from the block's memory, which leaves the loop its registers.
  LSC_DEVICE void move_origin(float main_max, float other_max, float centre) {
    absorb();
    origin_.main = main_max, origin_.other = other_max;
    origin_.set_centre(centre, false, memory_.temperature);
    for (int attempt = 0;; ++attempt) {
      add_anew();
      store_totals();
      make_stored();
      clear_sums();
      const RowState<double>& made = memory_.made[warp_index()];
      if (attempt > 0 || !centre_is_outlier(made.S, made.D, made.A)) break;
      origin_.set_centre(made.centre + memory_.temperature * made.D / made.S, false, memory_.temperature);
      sync_warp();
    }
    if (lane_index() == 0) park_made();
    sync_warp();
    origin_from_parked();
    if (way_ != Way::careful) way_ = usual_way();
  }

  // Whether the mean would be a better centre: E[delta]^2 > 3/4 E[delta^2], or far from 0.
  template <typename Real>
  static LSC_DEVICE bool centre_is_outlier(Real S, Real D, Real A) {
    const Real far = std::fabs(D);
    return (far * far > Real(1.5) * A * S || far > Real(kSmallLogRatio) * S) && far < Real(kLargestCentre) * S;
  }

  LSC_DEVICE void origin_from_parked() {
    const RowState<double>& parked = memory_.parked[warp_index()];
    origin_.main = float(parked.main_scale);
    origin_.other = parked.other_S > 0 ? float(parked.other_scale) : kUnseen;
    const double spread = memory_.temperature * std::sqrt(2 * (parked.A > 0 ? parked.A : 0) / parked.S);
    const double plain = kPlainCentre * fmin(spread, double(memory_.spread[warp_index()])), centre = level(parked.centre);
    origin_.set_centre(centre, std::fabs(centre) <= plain, memory_.temperature);
  }

  // A centre of the origin's maxima: this one, unless columns that are small about it may have weight in the other model, and in the
  // main one less than a float holds.
  LSC_DEVICE double level(double centre) const {
    const double distance = scale_distance<double>(origin_.main, origin_.other, centre, memory_.temperature);
    return distance < kLevelDistance ? centre : centre_between(INFINITY, origin_.main, origin_.other);
  }

  // Block: the origin of a chunk, from its first tile.
  LSC_DEVICE void start() {
    float x[kColumns], y[kColumns];
    unpack(x, y);
    clear_sums();
    if (lane_index() == 0) marks().has_parked = false;
    float main_max = largest(x), other = kPair ? beside(x, y, main_max) : 0.0f, other_max = kPair ? largest(y) : 0.0f;
#pragma unroll
    for (int mask = kWarp / 2; mask; mask /= 2) {
      const float main_max_there = shuffle_xor(main_max, mask), other_there = shuffle_xor(other, mask);
      // of equals, the lower lane's
      const bool there = main_max < main_max_there || (main_max == main_max_there && (lane_index() & unsigned(mask)));
      main_max = there ? main_max_there : main_max, other = there ? other_there : other;
      if constexpr (kPair) {
        const float other_max_there = shuffle_xor(other_max, mask);
        other_max = other_max < other_max_there ? other_max_there : other_max;
      }
    }
    float(&first)[kWarps][4] = memory_.first;
    if (lane_index() == 0) first[warp_index()][0] = main_max, first[warp_index()][1] = other, first[warp_index()][2] = other_max;
    sync_block();
    main_max = first[0][0], other = first[0][1], other_max = first[0][2];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      if (main_max < first[w][0]) main_max = first[w][0], other = first[w][1];
      if (other_max < first[w][2]) other_max = first[w][2];
    }
    origin_ = Origin();
    if (main_max > -INFINITY && main_max < INFINITY) origin_.main = main_max;
    way_ = Way::plain;
    if constexpr (kPair) {
      if (other_max > -INFINITY && other_max < INFINITY) origin_.other = other_max;
      choose_centre(x, y, centre_between(main_max - other, main_max, origin_.other));
    }
  }

  struct Check {
    float S, D, A, far;  // of the tile: A as the sum of w delta^2/2 where |delta| < 1, w |delta| beyond; `far` of |delta|
  };

  LSC_DEVICE Check check(const float (&x)[kColumns], const float (&y)[kColumns]) {
    float u[kColumns], w[kColumns], deltas[kColumns];
    weigh_main(x, u, w), find_deltas(x, y, deltas);
    float sums[4] = {sum(w), 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float far = fabsf(deltas[i]), delta = far < INFINITY ? deltas[i] : 0.0f, size = fabsf(delta);
      sums[1] = fma(w[i], delta, sums[1]);
      sums[2] = fma(w[i] * size, size < 1 ? 0.5f * size : 1.0f, sums[2]);
      sums[3] += size;
    }
    const float total = warp_sums4(sums);
    if (lane_index() % 8 == 0) memory_.check[warp_index()][lane_index() / 8] = total;
    sync_block();
    Check all{0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      all.S += memory_.check[w][0], all.D += memory_.check[w][1];
      all.A += memory_.check[w][2], all.far += memory_.check[w][3];
    }
    return all;
  }

  LSC_DEVICE void choose_centre(const float (&x)[kColumns], const float (&y)[kColumns], double centre) {
    origin_.set_centre(centre, false, memory_.temperature);
    Check tile = check(x, y);
    if (centre_is_outlier(tile.S, tile.D, tile.A)) {
      const double mean = centre + memory_.temperature * double(tile.D / tile.S);
      origin_.set_centre(mean, false, memory_.temperature);
      sync_block();
      const Check again = check(x, y);
      // else the mean is an outlier too, dragged away by a column that the other model nearly excludes
      if (again.A < 0.5f * again.S) {
        centre = mean, tile = again;
      } else {
        origin_.set_centre(centre, false, memory_.temperature);
      }
    }
    const float temperature = float(memory_.temperature), spread = temperature * fminf(1.0f, tile.far / float(ring_.columns_of_tile()));
    const float weighted = temperature * sqrtf(2 * tile.A / tile.S);
    const bool plain = std::fabs(centre) <= double(kPlainCentre * (weighted < spread ? weighted : spread));
    if (lane_index() == 0) memory_.spread[warp_index()] = spread;
    sync_warp();
    if (plain) origin_.set_centre(centre, true, memory_.temperature);
    way_ = usual_way();
    if (tile.A > kFar * tile.S && std::fabs(centre) <= kFarCentre * memory_.temperature) {
      origin_.set_centre(0, true, memory_.temperature);
      way_ = Way::far;
    }
  }

  // Warp, at the end of a chunk: whether it takes its columns once more, about a better centre. Else its totals are stored, or all
  // is parked: what it has taken again has a centre of its own.
  LSC_DEVICE bool takes_again(bool again) {
    if (marks().has_parked || again) {
      absorb();
    } else {
      store_totals();
    }
    if (!kPair || again) return false;
    const double* total = memory_.totals[warp_index()];
    double centre, S = 1;
    bool lost;
    if (marks().has_parked) {
      const RowState<double>& parked = memory_.parked[warp_index()];
      centre = parked.centre, lost = memory_.summed_A[warp_index()] > kLost * parked.A;
    } else {
      const double subtracted = origin_.plain ? double(origin_.centre) : 0.0;
      if (total[kW] == 0 && total[kV] == 0) {
        S = total[kS];
        centre = origin_.exact_centre(t_) + memory_.temperature * total[kD] / total[kS];
        lost = has_lost_digits(total[kA], near_kl(total), total[kS], subtracted);
      } else {
        make_stored();
        const RowState<double>& made = memory_.made[warp_index()];
        S = made.S;
        centre = made.centre + memory_.temperature * made.D / S;
        lost = has_lost_digits(total[kA] + large_summed(total), kl_of(made, memory_.temperature), S, subtracted);
      }
    }
    if (!lost) return false;
    // the other model's sum will follow from weights that must not be too small for a float
    if (S < kFaint) origin_.main = float(origin_.main + memory_.temperature * std::log(S));
    origin_.set_centre(level(centre), false, memory_.temperature);
    sync_warp();
    if (lane_index() == 0) marks().has_parked = false;
    sync_warp();
    way_ = usual_way();
    clear_sums();
    return true;
  }

  // Block: the chunk's state from what its threads have summed.
  template <typename Take>
  LSC_DEVICE void finish(const Take& take) {
    if (lane_index() == 0) {
      memory_.ended[warp_index()] = marks();
      memory_.main[warp_index()] = origin_.main, memory_.other[warp_index()] = origin_.other;
      memory_.origin[warp_index()] = origin_;
    }
    sync_block();
    if (warp_index() != 0) return;
    const Origin origin = common_origin();
    if (lane_index() < kTotals) memory_.block_totals[lane_index()] = block_total(memory_, lane_index(), origin.main, origin.other, t_.k, kReverse);
    sync_warp();
    RowState<double>& state = memory_.made[0];
    if (lane_index() == 0) {
      bool any_misses = false;
      for (int w = 0; w < kWarps; ++w) any_misses = any_misses || (!memory_.ended[w].has_parked && memory_.ended[w].misses);
      memory_.origin[kWarps] = origin;
      make_state<kReading>(&state, memory_.block_totals, memory_.origin[kWarps], memory_.temperature, any_misses);
      for (int w = 0; w < kWarps; ++w)
        if (memory_.ended[w].has_parked) merge_apart(&state, &memory_.parked[w], memory_.temperature, kReverse);
    }
    take(chunk(), state);
  }

  // Of the warps that have parked nothing: they share the centre.
  LSC_DEVICE Origin common_origin() const {
    Origin origin;
    bool any = false;
    for (int w = 0; w < kWarps; ++w) {
      if (memory_.ended[w].has_parked) continue;
      if (!any) origin.set_centre_of(memory_.origin[w]);
      any = true;
      if (origin.main < memory_.main[w]) origin.main = memory_.main[w];
      if (origin.other < memory_.other[w]) origin.other = memory_.other[w];
    }
    return origin;
  }

  ReaderMemory& memory_;
  TileRing<T, kPair ? 2 : 1> ring_;
  const Temperature t_;
  Origin origin_;
  Sums sums_;
  Way way_;
};

}  // namespace LSC_ISA
}  // namespace lsc
