// gae: one pass over rewards, values and mask from the last counted position backwards, one write of both results; the
// gradients run the same way forwards.
//
//     R_t = r_t + k V_n + c R_n,  A_t = R_t - V_t        c = gamma lam,  k = gamma (1 - lam),  n the next counted position
//
// The recursion is carried in fp64: a float chain of 32768 steps may be off by more than 1e-5 of its largest partial sum.
// Where a tile has no holes it is taken in vectors: each position first gathers the kLanes terms from itself on, by doubling,
// and then only the sum kLanes positions on is missing.
#include "cpu/kernels/gae.h"

#include <algorithm>

#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 512;
constexpr int kLanes = 8;  // sums that are carried side by side where no position is left out

struct Sequence {
  int64_t start, length;  // tokens
  int64_t mask_row;
};

Sequence sequence(const SequenceRows& rows, int64_t b) {
  if (!rows.bounds) return {b * rows.length, rows.length, b};
  return {rows.bounds[b], rows.bounds[b + 1] - rows.bounds[b], rows.bounds[b]};
}

// a b + c
inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// What a step takes from the one after it. A coefficient of 0 takes nothing, not even NaN.
struct Carry {
  double of_return, of_value;
  bool with_return, with_value;
  Holes holes;
  double next_return = 0, next_value = 0;

  explicit Carry(const GaeRules& rules)
      : of_return(rules.gamma * rules.lam), of_value(rules.gamma * (1.0 - rules.lam)),
        with_return(of_return != 0), with_value(of_value != 0), holes(rules.holes) {}

  void set(double total, double value) {
    next_return = with_return ? total : 0.0;
    next_value = with_value ? value : 0.0;
  }
  double step(double reward, double value) {
    const double total = multiply_add(of_return, next_return, multiply_add(of_value, next_value, reward));
    set(total, value);
    return total;
  }
  void hole() {
    if (holes == Holes::zero) step(0.0, 0.0);
    if (holes == Holes::cut) set(0.0, 0.0);
  }
};

struct Tile {
  alignas(64) float reward[kTile], value[kTile + kLanes] = {};  // one more value: the next one
  uint8_t counted[kTile];
  alignas(64) double total[kTile + kLanes];
};

// total[i] += factor total[i + 1], from the last to the first
void accumulate(double* total, int n, double factor) {
  std::fill_n(total + n, kLanes, 0.0);
  for (int reach = 1; reach < kLanes; reach *= 2, factor *= factor) {
    for (int i = 0; i < n; ++i) total[i] = multiply_add(factor, total[i + reach], total[i]);
  }
  for (int i = (n - 1) / kLanes * kLanes - kLanes; i >= 0; i -= kLanes) {
    for (int j = 0; j < kLanes; ++j) total[i + j] = multiply_add(factor, total[i + kLanes + j], total[i + j]);
  }
}

void dense_steps(Tile& tile, int n, Carry& carry) {
  double* total = tile.total;
  tile.value[n] = float(carry.next_value);  // it was a float
  if (carry.with_value) {
    for (int i = 0; i < n; ++i) total[i] = multiply_add(carry.of_value, tile.value[i + 1], tile.reward[i]);
  } else {
    for (int i = 0; i < n; ++i) total[i] = tile.reward[i];
  }
  if (carry.with_return) {
    total[n - 1] = multiply_add(carry.of_return, carry.next_return, total[n - 1]);
    accumulate(total, n, carry.of_return);
  }
  carry.set(total[0], tile.value[0]);
}

// Leaves 0 in the total and in the value of a position that does not count.
void steps_over_holes(Tile& tile, int n, Carry& carry) {
  for (int i = n - 1; i >= 0; --i) {
    if (tile.counted[i]) {
      tile.total[i] = carry.step(tile.reward[i], tile.value[i]);
    } else {
      carry.hole();
      tile.total[i] = 0, tile.value[i] = 0;
    }
  }
}

}  // namespace

void gae_forward(
    const SequenceRows& rows, const GaeRules& rules, const GaeInputs& in, float* advantages, float* returns, int64_t begin, int64_t end) {
  Tile tile;
  for (int64_t b = begin; b < end; ++b) {
    const Sequence s = sequence(rows, b);
    const int64_t last = last_counted(rows.mask, s.mask_row, s.length);
    Carry carry(rules);
    if (in.bootstrap.data) {
      const double beyond = load_one(in.bootstrap.dtype, in.bootstrap.data, b);
      carry.set(beyond, beyond);
    }
    std::fill(returns + s.start + last + 1, returns + s.start + s.length, 0.0f);
    if (in.values.data) std::fill(advantages + s.start + last + 1, advantages + s.start + s.length, 0.0f);
    for (int64_t stop = last + 1; stop > 0; stop -= kTile) {
      const int64_t first = std::max<int64_t>(0, stop - kTile);
      const int n = int(stop - first);
      load_tile(in.rewards.dtype, in.rewards.data, s.start + first, n, tile.reward);
      if (in.values.data) load_tile(in.values.dtype, in.values.data, s.start + first, n, tile.value);
      if (read_counted(rows.mask, s.mask_row, first, n, tile.counted) == n) {
        dense_steps(tile, n, carry);
      } else {
        steps_over_holes(tile, n, carry);
      }
      for (int i = 0; i < n; ++i) returns[s.start + first + i] = float(tile.total[i]);
      if (!in.values.data) continue;
      for (int i = 0; i < n; ++i) advantages[s.start + first + i] = float(tile.total[i] - tile.value[i]);
    }
  }
}

void gae_backward(
    const SequenceRows& rows, const GaeRules& rules, const GaeUpstream& grad, const GaeGradients& out, int64_t begin, int64_t end) {
  uint8_t counted[kTile];
  const double of_return = rules.gamma * rules.lam, of_value = rules.gamma * (1.0 - rules.lam);
  const double of_hole = rules.holes == Holes::skip ? 1.0 : rules.holes == Holes::zero ? of_return : 0.0;
  const auto times = [](double factor, double carried) { return factor != 0 ? factor * carried : 0.0; };
  for (int64_t b = begin; b < end; ++b) {
    const Sequence s = sequence(rows, b);
    const int64_t last = last_counted(rows.mask, s.mask_row, s.length);
    double carried = 0;
    for (int64_t first = 0; first <= last; first += kTile) {
      const int n = int(std::min<int64_t>(kTile, last + 1 - first));
      read_counted(rows.mask, s.mask_row, first, n, counted);
      for (int i = 0; i < n; ++i) {
        const int64_t at = s.start + first + i;
        double to_reward = 0, to_value = 0;
        if (counted[i]) {
          const double to_advantage = grad.advantages ? grad.advantages[at] : 0, to_return = grad.returns ? grad.returns[at] : 0;
          to_value = times(of_value, carried) - to_advantage;
          carried = to_reward = times(of_return, carried) + (to_advantage + to_return);
        } else {
          carried = times(of_hole, carried);
        }
        out.rewards[at] = float(to_reward);
        if (out.values) out.values[at] = float(to_value);
      }
    }
    std::fill(out.rewards + s.start + last + 1, out.rewards + s.start + s.length, 0.0f);
    if (out.values) std::fill(out.values + s.start + last + 1, out.values + s.start + s.length, 0.0f);
    if (out.bootstrap) out.bootstrap[b] = float(times(rules.gamma, carried));
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
