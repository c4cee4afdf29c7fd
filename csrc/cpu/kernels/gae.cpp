// gae: one pass over rewards, values and mask from the last counted position backwards, one write of both results; the
// gradients run the same way forwards.
//
// Design constraint: a sequence may stand alone, so the lanes of a vector are kLanes positions of one sequence. What they pass
// on is composed by doubling (math/returns.h), which leaves one multiply-add per vector in the chain from vector to vector.
// Where nothing is left out all factors are one constant, and R itself is what is summed:
//
//     R_t = (r_t + k V_t+1) + c R_t+1
//
// The recursion is carried in fp64: a float chain of 32768 steps may be off by more than 1e-5 of its largest partial sum.
#include "cpu/kernels/gae.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "cpu/kernels/doubles.h"
#include "cpu/kernels/mask_reader.h"
#include "cpu/kernels/tiles.h"
#include "cpu/kernels/upstream.h"
#include "math/returns.h"

namespace lsc {
namespace LSC_ISA {

namespace {

constexpr int kTile = 512;
constexpr int kLanes = Doubles::kLanes;

struct Sequence {
  int64_t start, length;  // tokens
  int64_t mask_row;
};

Sequence sequence(const SequenceRows& rows, int64_t b) {
  if (!rows.bounds) return {b * rows.length, rows.length, b};
  return {rows.bounds[b], rows.bounds[b + 1] - rows.bounds[b], rows.bounds[b]};
}

// Vectors of a sequence taken from its end, or from its beginning: what comes before a lane stands in the lanes above it, or below.
template <bool kFromEnd>
struct Order {
  // Each lane from n positions before it; the first n from `start`.
  template <int n>
  static Doubles before(Doubles lanes, Doubles start) {
    if constexpr (kFromEnd) return window<n>(lanes, start);
    return window<kLanes - n>(start, lanes);
  }
  // The lane that comes last, in all lanes.
  static Doubles last(Doubles lanes) { return repeated_end<!kFromEnd>(lanes); }
  static int lane(int turn) { return kFromEnd ? kLanes - 1 - turn : turn; }
};

// x_i = term_i + factor x_i-1, vector by vector; factor > 0.
template <bool kFromEnd>
class Sum {
 public:
  explicit Sum(double factor) : powers_(0.0) {
    const Affine one{factor, 0.0};
    Affine power = one;
    for (int i = 0; i < kLanes; ++i, power = composed(power, one)) {
      powers_.v[order::lane(i)] = power.factor;
      if (i < 4) power_[i] = Doubles(power.factor);
    }
    all_ = order::last(powers_);
  }

  // The next kLanes of them, after x; x becomes the last.
  Doubles next(Doubles term, Doubles& x) const {
    const Doubles zero(0.0);
    term = fma(power_[0], order::template before<1>(term, zero), term);
    if constexpr (kLanes > 2) term = fma(power_[1], order::template before<2>(term, zero), term);
    if constexpr (kLanes > 4) term = fma(power_[3], order::template before<4>(term, zero), term);
    const Doubles sums = fma(powers_, x, term);
    x = fma(all_, x, order::last(term));  // the bits of the last of them, sooner
    return sums;
  }

 private:
  using order = Order<kFromEnd>;
  Doubles power_[4];      // of 1, 2, 3, 4 positions
  Doubles powers_, all_;  // of the positions up to each lane, and of all
};

// What positions are passed, and what they pass on.
struct Passed {
  Doubles to, on;
};

// The maps of positions of which some do not count, vector by vector.
template <bool kFromEnd>
class Chain {
 public:
  explicit Chain(const Recursion& rule)
      : of_return_(rule.of_return), of_hole_(rule.of_hole),
        factors_may_vanish_(rule.of_hole == 0 || std::pow(rule.of_return, kLanes) < 0x1p-1022) {}

  // `term` is what each position adds to what it passes on, `passed` what the vector is passed.
  template <bool kMayVanish>
  Passed next(Doubles term, Chosen counted, Doubles& passed) const {
    Map map{select(counted, of_return_, of_hole_), select(counted, term, Doubles(0.0))};
    map = after<kMayVanish>(before<1>(map), map);
    if constexpr (kLanes > 2) map = after<kMayVanish>(before<2>(map), map);
    if constexpr (kLanes > 4) map = after<kMayVanish>(before<4>(map), map);
    const Doubles on = kMayVanish ? applied(map, passed) : fma(map.factor, passed, map.term);
    const Passed result{order::template before<1>(on, passed), on};
    passed = order::last(on);
    return result;
  }

  bool factors_may_vanish() const { return factors_may_vanish_; }

 private:
  using order = Order<kFromEnd>;
  using Map = AffineOf<Doubles>;

  template <int n>
  static Map before(const Map& maps) {
    return {order::template before<n>(maps.factor, Doubles(1.0)), order::template before<n>(maps.term, Doubles(0.0))};
  }
  template <bool kMayVanish>
  static Map after(const Map& inner, const Map& outer) {
    if constexpr (kMayVanish) return composed(inner, outer);
    return {outer.factor * inner.factor, fma(outer.factor, inner.term, outer.term)};
  }

  Doubles of_return_, of_hole_;
  bool factors_may_vanish_;
};

// What the next tile reads, brought near while this one is computed: the hardware fetches ahead upwards, but tiles of a sequence
// that is read from its end come downwards.
class Ahead {
 public:
  static constexpr int kStep = 16;

  void reads(const TypedData& tensor, int64_t first) { add(tensor.data, first, tensor.dtype == DType::float32 ? 4 : 2); }
  void reads(const MaskRows& mask, int64_t row, int64_t first) {
    if (!mask.data || mask.column_stride != 1) return;
    with_mask_row(mask, row, [&](auto* elements, auto) { add(elements, first, sizeof *elements); });
  }
  // Those of kStep places, the tile's i-th the first.
  void fetch(int i) const {
    for (const Stream& stream : streams_) {
      for (int line = 0; line < kStep * stream.bytes; line += 64) __builtin_prefetch(stream.from + i * stream.bytes + line);
    }
  }

 private:
  struct Stream {
    const char* from = nullptr;
    int bytes = 0;
  };

  void add(const void* data, int64_t first, int bytes) {
    if (data) streams_[count_++] = {static_cast<const char*>(data) + first * bytes, bytes};
  }

  Stream streams_[3];
  int count_ = 0;
};

struct Results {
  float *one, *other;
  void write(int at, Doubles first, Doubles second) const { store_rounded(one + at, first), store_rounded(other + at, second); }
};

// A stretch of a sequence in whole vectors, from where the chain begins; what is left of the last vector is read by nothing.
template <bool kFromEnd>
struct Tile {
  alignas(64) float first[kTile + Vec::kLanes] = {}, second[kTile + Vec::kLanes] = {};
  alignas(64) float rounded[2][kTile];
  alignas(64) uint8_t counted[kTile] = {};
  int offset, n, size;
  bool dense;
  Ahead ahead;

  void place(const MaskRows& mask, int64_t mask_row, int64_t position, int count) {
    n = count, size = (n + kLanes - 1) / kLanes * kLanes;
    offset = kFromEnd ? size - n : 0;
    dense = read_counted(mask, mask_row, position, n, counted + offset) == n;
  }

  // run(results) writes two for each place; they belong to the n places from `at` on. `other` may be null.
  template <typename Run>
  void into(int64_t at, float* one, float* other, const Run& run) {
    const bool whole = n == size;
    run(Results{whole ? one + at : rounded[0], whole && other ? other + at : rounded[1]});
    if (whole) return;
    std::copy_n(rounded[0] + offset, n, one + at);
    if (other) std::copy_n(rounded[1] + offset, n, other + at);
  }

  // Calls each(place) for the vectors, in order.
  template <typename Each>
  void vectors(const Each& each) const {
    const int whole = size;  // stores of vectors may be to anything, for what the compiler knows
    for (int done = 0; done < whole; done += kLanes) {
      const int at = kFromEnd ? whole - kLanes - done : done;
      if (at % Ahead::kStep == 0) ahead.fetch(at);
      each(at);
    }
  }

  // Where some do not count: term(place) of each vector, and of(place, what it is passed and passes on), its results.
  template <typename Term, typename Of>
  void over_holes(const Chain<kFromEnd>& chain, double& passed, Results results, const Term& term, const Of& of) const {
    Doubles now(passed);
    const auto run = [&](auto may_vanish) {
      vectors([&](int at) {
        const Chosen kept = load_chosen(counted + at);
        const auto [one, other] = of(at, chain.template next<decltype(may_vanish)::value>(term(at), kept, now));
        results.write(at, select(kept, one, Doubles(0.0)), select(kept, other, Doubles(0.0)));
      });
    };
    chain.factors_may_vanish() ? run(std::true_type()) : run(std::false_type());
    passed = now.v[0];
  }
};

// `out` has room for whole vectors; 0 where there is nothing to bring.
void bring(bool given, UpstreamTile<kTile>& from, int64_t at, int n, float* out) {
  if (given) {
    load_tile(from.along(at, n), n, out);
  } else {
    std::fill_n(out, n, 0.0f);
  }
}

}  // namespace

void gae_forward(
    const SequenceRows& rows, const GaeRules& rules, const GaeInputs& in, float* advantages, float* returns, int64_t begin, int64_t end) {
  const Recursion rule(rules.gamma, rules.lam, rules.holes);
  const Sum<true> sum(rule.of_return);
  const Chain<true> chain(rule);
  const Doubles zero(0.0), of_return(rule.of_return), of_value(rule.of_value);
  Tile<true> tile;
  const auto reward = [&](int at) { return load_doubles(tile.first + at); };
  const auto value = [&](int at) { return load_doubles(tile.second + at); };
  const auto over_all = [&](double& passed, Results results, auto values_count) {
    tile.second[tile.size] = 0;  // the value after the tile is in what is passed
    Doubles total = zero, into_first = Order<true>::before<1>(zero, Doubles(passed));
    tile.vectors([&, results](int at) {
      Doubles term = reward(at) + into_first;
      if constexpr (decltype(values_count)::value) term = fma(of_value, value(at + 1), term);
      const Doubles totals = sum.next(term, total);
      results.write(at, totals, totals - value(at));
      into_first = zero;
    });
    passed = rule.term(total.v[0], double(tile.second[0]));
  };
  const auto over_holes = [&](double& passed, Results results) {
    const auto term = [&](int at) {
      const Doubles from_reward = rule.of_return != 0 ? of_return * reward(at) : zero;
      return rule.of_value != 0 ? fma(of_value, value(at), from_reward) : from_reward;
    };
    tile.over_holes(chain, passed, results, term, [&](int at, const Passed& by) {
      const Doubles total = reward(at) + by.to;
      return std::pair(total, total - value(at));
    });
  };
  for (int64_t b = begin; b < end; ++b) {
    const Sequence s = sequence(rows, b);
    const int64_t last = last_counted(rows.mask, s.mask_row, s.length);
    double passed = in.bootstrap.data ? times(rules.gamma, double(load_one(in.bootstrap.dtype, in.bootstrap.data, b))) : 0;
    std::fill(returns + s.start + last + 1, returns + s.start + s.length, 0.0f);
    if (in.values.data) std::fill(advantages + s.start + last + 1, advantages + s.start + s.length, 0.0f);
    for (int64_t stop = last + 1; stop > 0; stop -= kTile) {
      const int64_t first = std::max<int64_t>(0, stop - kTile), at = s.start + first;
      tile.place(rows.mask, s.mask_row, first, int(stop - first));
      load_tile(in.rewards.dtype, in.rewards.data, at, tile.n, tile.first + tile.offset);
      if (in.values.data) load_tile(in.values.dtype, in.values.data, at, tile.n, tile.second + tile.offset);
      tile.ahead = {};
      if (first > 0) {
        const int64_t next = std::max<int64_t>(0, first - kTile);
        tile.ahead.reads(in.rewards, s.start + next), tile.ahead.reads(in.values, s.start + next);
        tile.ahead.reads(rows.mask, s.mask_row, next);
      }
      tile.into(at, returns, in.values.data ? advantages : nullptr, [&](Results results) {
        if (!tile.dense || rule.of_return == 0) return over_holes(passed, results);
        rule.of_value == 0 ? over_all(passed, results, std::false_type()) : over_all(passed, results, std::true_type());
      });
    }
  }
}

void gae_backward(
    const SequenceRows& rows, const GaeRules& rules, const GaeUpstream& grad, const GaeGradients& out, int64_t begin, int64_t end) {
  const Recursion rule(rules.gamma, rules.lam, rules.holes);
  const Sum<false> sum(rule.of_return);
  const Chain<false> chain(rule);
  const Doubles zero(0.0), of_value(rule.of_value);
  UpstreamTile<kTile> to_advantages(grad.advantages), to_returns(grad.returns);
  Tile<false> tile;
  const auto to_advantage = [&](int at) { return load_doubles(tile.first + at); };
  const auto term = [&](int at) { return to_advantage(at) + load_doubles(tile.second + at); };
  const auto to_value = [&](int at, Doubles before) {
    return (rule.of_value != 0 ? of_value * before : zero) - to_advantage(at);
  };
  const auto over_all = [&](double& passed, Results results) {
    Doubles total(passed);
    tile.vectors([&, results](int at) {
      const Doubles before = total, totals = sum.next(term(at), total);
      results.write(at, totals, to_value(at, Order<false>::before<1>(totals, before)));
    });
    passed = total.v[0];
  };
  const auto over_holes = [&](double& passed, Results results) {
    tile.over_holes(chain, passed, results, term, [&](int at, const Passed& by) { return std::pair(by.on, to_value(at, by.to)); });
  };
  for (int64_t b = begin; b < end; ++b) {
    const Sequence s = sequence(rows, b);
    const int64_t last = last_counted(rows.mask, s.mask_row, s.length);
    double passed = 0;
    for (int64_t first = 0; first <= last; first += kTile) {
      const int64_t at = s.start + first;
      tile.place(rows.mask, s.mask_row, first, int(std::min<int64_t>(kTile, last + 1 - first)));
      bring(grad.advantages.data, to_advantages, at, tile.n, tile.first);
      bring(grad.returns.data, to_returns, at, tile.n, tile.second);
      tile.into(at, out.rewards, out.values, [&](Results results) {
        tile.dense && rule.of_return != 0 ? over_all(passed, results) : over_holes(passed, results);
      });
    }
    std::fill(out.rewards + s.start + last + 1, out.rewards + s.start + s.length, 0.0f);
    if (out.values) std::fill(out.values + s.start + last + 1, out.values + s.start + s.length, 0.0f);
    // the last counted position passes on what it got
    if (out.bootstrap) out.bootstrap[b] = last < 0 ? 0.0f : float(times(rules.gamma, double(out.rewards[s.start + last])));
  }
}

}  // namespace LSC_ISA
}  // namespace lsc
