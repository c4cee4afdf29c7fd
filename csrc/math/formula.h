// The log-probability that a formula over independent properties holds, and its gradient.
//
// Design constraint: the result is accurate to its own size, whether it is -1e-30 or -1e4, and a gradient neither becomes
// inf * 0 nor loses its digits where probabilities come to 0 or 1. Neither p nor log p can say both: 1 - p is lost in p
// near 1, log(1 - p) in log p near -0. So every value is a pair, p and 1 - p. Only positive terms are added. Complement is a
// swap, and any(a, b) is the complement of all(~a, ~b).
//
//     all        p = prod p_i                     1 - p = q_1 + p_1 (q_2 + p_2 (q_3 + ...))
//     at least m Poisson-binomial, counts[j] = P(j of those so far hold) for j < m, and one that keeps P(m or more)
//     weakest    the pair of the least probable
//
// The gradient goes from the root to the properties as |d u / d log p| or as |d u / d log(1 - p)|, whichever is at hand. Its
// sign depends on nothing but the number of complements on the way.
//
//     all        d log p / d log p_i = 1              |d log(1-p) / d log p_i| = p / (1-p)
//     at least m d log p / d log p_i = c_i p_i / p    d log(1-p) / d log(1-p_i) = c_i (1-p_i) / (1-p),
//                c_i = P(exactly m - 1 of the others hold)
//     weakest    1 for the least probable
//
// What a value is a pair of is a Number. A Log holds any probability by its logarithm; of a pair, the probability below 1/2
// comes from a sum, and the other from it by log1mexp. Where nothing of a row leaves a double's range a Number is a vector of
// doubles, the probabilities of many rows themselves: every value is a sum of positive products in which a property stands
// once at most, so none is smaller than the product over all properties of the smaller one of p and 1 - p, and no slope is
// larger than its inverse (cpu/kernels/formula_rows.h). It brings +, *, <, ==, select, either, is_nan and quotient, as Log does.
//
// A row's work is O(n m) for at_least, O(n) else.
#pragma once

#include <cmath>

#include "math/fn.h"
#include "math/one_lane.h"
#include "math/program.h"

namespace lsc {
namespace LSC_ISA {

constexpr double kLn2 = 0.693147180559945309;
// A logarithm nearer to 0 has begun to lose its digits; log(1 - p) still has them.
constexpr double kTiny = 1e-290;

// log(1 - e^a), a <= 0
LSC_FN inline double log1mexp(double a) {
  return a > -kLn2 ? std::log(-std::expm1(a)) : std::log1p(-std::exp(a));
}

// A number >= 0 by its logarithm.
struct Log {
  double log;
};

// 0 or 1, and the number of a part, one for each row that a Number is of.
template <typename Number>
struct Constants {
  using Index = Number;
  static constexpr bool kLogarithmic = false;
  LSC_FN static Number zero() { return Number(0.0); }
  LSC_FN static Number one() { return Number(1.0); }
};
template <>
struct Constants<Log> {
  using Index = int;
  static constexpr bool kLogarithmic = true;
  LSC_FN static Log zero() { return {-INFINITY}; }
  LSC_FN static Log one() { return {0.0}; }
};

LSC_FN inline Log operator*(Log a, Log b) { return {a.log + b.log}; }

// 0 counts for nothing, NaN travels.
LSC_FN inline Log operator+(Log a, Log b) {
  const double larger = a.log > b.log ? a.log : b.log, smaller = a.log > b.log ? b.log : a.log;
  return {smaller == -INFINITY ? larger : larger + std::log1p(std::exp(smaller - larger))};
}

LSC_FN inline bool operator<(Log a, Log b) { return a.log < b.log; }
LSC_FN inline bool operator==(Log a, Log b) { return a.log == b.log; }
LSC_FN inline bool is_nan(Log a) { return a.log != a.log; }
LSC_FN inline Log select(bool where, Log yes, Log no) { return where ? yes : no; }
LSC_FN inline int select(bool where, int yes, int no) { return where ? yes : no; }

// a/b of what a gradient is divided by: nothing where there is nothing to divide, or nothing to divide by.
LSC_FN inline Log quotient(Log a, Log b) {
  return a == Constants<Log>::zero() || b == Constants<Log>::zero() ? Constants<Log>::zero() : Log{a.log - b.log};
}

template <typename Number>
struct Judgement {
  Number good, bad;  // p, 1 - p
};

// Both of a pair, each from a sum of its own: that of the probability below 1/2 decides, where logarithms lose the other.
template <typename Number>
LSC_FN inline Judgement<Number> settled(Number good, Number bad) {
  if constexpr (Constants<Number>::kLogarithmic) {
    if (good < bad) return {good, {log1mexp(good.log)}};
    return {{log1mexp(bad.log)}, bad};
  } else {
    return {good, bad};
  }
}

// -log p
LSC_FN inline Log minus_log(Judgement<Log> p) { return p.good.log > -kTiny ? p.bad : Log{std::log(-p.good.log)}; }

// One property, judged with floor and weight.
template <typename Number>
struct Judged {
  Judgement<Number> weighted, unweighted;
  Number slope;  // d log p^w / dz
};

LSC_FN inline Judged<Log> certainly_good() {
  const Judgement<Log> certain{Constants<Log>::one(), Constants<Log>::zero()};
  return {certain, certain, Constants<Log>::zero()};
}

LSC_FN inline Judged<Log> judge(double z, double floor, double weight) {
  const double tail = std::log1p(std::exp(-std::fabs(z)));
  const Log sigmoid{(z < 0 ? z : 0) - tail}, opposite{(z > 0 ? -z : 0) - tail};
  Judgement<Log> p{sigmoid, opposite};
  Log slope = opposite;
  if (floor != 0) {
    const Log wrong{std::log(floor)}, right{std::log1p(-floor)};
    p = settled(wrong + right * sigmoid, right * opposite);
    slope = {p.bad.log + (sigmoid.log - p.good.log)};
  }
  if (weight == 1) return {p, p, slope};
  // nothing at all comes of a property with weight 0
  if (weight == 0) return {certainly_good().weighted, p, Constants<Log>::zero()};
  const Log good{weight * p.good.log}, factor{std::log(weight)};
  return {{good, good.log > -kTiny ? factor * minus_log(p) : Log{log1mexp(good.log)}}, p, slope * factor};
}

// The values of a program's instructions so far, and the parts of one of them, last to first; all complemented, or none. Numbers
// go one by one: of a pair of vectors a compiler may copy half vectors, for which the processor has to wait.
template <typename Number>
struct Parts {
  const Instruction* instructions;
  Judgement<Number>* values;
  int connective;
  bool complemented;

  LSC_FN int count() const { return instructions[connective].operand; }
  LSC_FN int last() const { return connective - 1; }
  LSC_FN int before(int part) const { return part - instructions[part].size; }
  LSC_FN const Number& good(int part) const { return complemented ? values[part].bad : values[part].good; }
  LSC_FN const Number& bad(int part) const { return complemented ? values[part].good : values[part].bad; }
  LSC_FN void conclude(const Number& good, const Number& bad) const {
    Judgement<Number>& value = values[connective];
    (complemented ? value.bad : value.good) = good;
    (complemented ? value.good : value.bad) = bad;
  }
};

template <typename Number>
LSC_FN inline void all_of(const Parts<Number>& parts) {
  Number good = Constants<Number>::one(), bad = Constants<Number>::zero();
  if constexpr (Constants<Number>::kLogarithmic) {
    for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) good = good * parts.good(part);
    if (good.log < -kLn2) return parts.conclude(good, {log1mexp(good.log)});
    good = Constants<Number>::one();
  }
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
    const Number each = parts.good(part);
    bad = parts.bad(part) + each * bad;
    good = each * good;
  }
  parts.conclude(good, bad);
}

template <typename Number>
struct Least {
  typename Constants<Number>::Index part;
  Number good, bad;
};

// The least probable, by the odds: they have the digits that p lacks near 1. Ties go to the first part, NaN stays.
template <typename Number>
LSC_FN inline Least<Number> weakest_of(const Parts<Number>& parts) {
  using Index = typename Constants<Number>::Index;
  int part = parts.last();
  Least<Number> least{Index(part), parts.good(part), parts.bad(part)};
  part = parts.before(part);
  for (int n = parts.count() - 1; n > 0; --n, part = parts.before(part)) {
    const Number good = parts.good(part), bad = parts.bad(part);
    const auto stays = either(is_nan(least.good), least.good * bad < good * least.bad);
    least.part = select(stays, least.part, Index(part));
    least.good = select(stays, least.good, good);
    least.bad = select(stays, least.bad, bad);
  }
  return least;
}

// At least m of n, as not(at least n - m + 1 of the complements) where that is the smaller number.
struct Threshold {
  int least;
  bool complemented;
};

LSC_FN inline Threshold threshold(const Instruction& each) {
  const int other = each.operand - each.least + 1;
  return other < each.least ? Threshold{other, true} : Threshold{each.least, false};
}

constexpr int kMaxLeast = (kMaxProperties + 1) / 2;

template <typename Number>
struct Counts {
  Number probability[kMaxLeast];  // that j hold, j < m

  LSC_FN void clear(int least) {
    for (int j = 1; j < least; ++j) probability[j] = Constants<Number>::zero();
    probability[0] = Constants<Number>::one();
  }

  LSC_FN void copy(const Counts& other, int least) {
    for (int j = 0; j < least; ++j) probability[j] = other.probability[j];
  }

  LSC_FN void add(const Number& good, const Number& bad, int least) {
    for (int j = least - 1; j > 0; --j) probability[j] = probability[j] * bad + probability[j - 1] * good;
    probability[0] = probability[0] * bad;
  }
};

template <typename Number>
LSC_FN inline void at_least(const Instruction* instructions, Judgement<Number>* values, int connective) {
  const Threshold wanted = threshold(instructions[connective]);
  const Parts<Number> parts{instructions, values, connective, wanted.complemented};
  Counts<Number> counts;
  counts.clear(wanted.least);
  Number reached = Constants<Number>::zero(), missed = Constants<Number>::zero();
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
    reached = reached + counts.probability[wanted.least - 1] * parts.good(part);
    counts.add(parts.good(part), parts.bad(part), wanted.least);
  }
  for (int j = 0; j < wanted.least; ++j) missed = missed + counts.probability[j];
  const Judgement<Number> result = settled(reached, missed);
  parts.conclude(result.good, result.bad);
}

// The value of every instruction, the last one's being the formula's. `properties` are in the program's order.
template <typename Number>
LSC_FN inline const Judgement<Number>& evaluate(const Program& program, const Judged<Number>* properties, Judgement<Number>* values) {
  using Kind = Instruction::Kind;
  for (int i = 0; i < program.length; ++i) {
    const Instruction* all = program.instructions;
    const Kind kind = all[i].kind;
    Judgement<Number>& value = values[i];
    switch (kind) {
      case Kind::property: {
        const Judgement<Number>& judged = (properties++)->weighted;
        value.good = judged.good, value.bad = judged.bad;
        break;
      }
      case Kind::complement: value.good = values[i - 1].bad, value.bad = values[i - 1].good; break;
      case Kind::all:
      case Kind::any: all_of(Parts<Number>{all, values, i, kind == Kind::any}); break;
      case Kind::at_least: at_least(all, values, i); break;
      case Kind::weakest: {
        const Least<Number> least = weakest_of(Parts<Number>{all, values, i, false});
        value.good = least.good, value.bad = least.bad;
        break;
      }
    }
  }
  return values[program.length - 1];
}

// |d u / d log p| of a part, or where `of_bad`, |d u / d log(1 - p)|.
template <typename Number>
struct Slope {
  Number size;
  bool of_bad;
  bool falls;  // u falls where p rises

  LSC_FN void set(const Number& to, bool is_of_bad, bool does_fall) { size = to, of_bad = is_of_bad, falls = does_fall; }
};

// From an `all`, or from an `any` by its complements, to its parts.
template <typename Number>
LSC_FN inline void slopes_of_all(const Parts<Number>& parts, Slope<Number>* slopes) {
  const Slope<Number>& whole = slopes[parts.connective];
  Number size = whole.size;
  if (whole.of_bad != parts.complemented) size = size * quotient(parts.good(parts.connective), parts.bad(parts.connective));
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
    slopes[part].set(size, parts.complemented, whole.falls);
  }
}

// A part on the way through those of an at_least, and the counts of all that came before it.
template <typename Number>
struct Visited {
  int part;
  Counts<Number> before;
};

// The counts of all parts before each of them are kept, in `visited`; those of all after it grow on the way back.
template <typename Number>
LSC_FN inline void slopes_of_at_least(
    const Instruction* instructions, Judgement<Number>* values, int connective, Slope<Number>* slopes, Visited<Number>* visited) {
  const Threshold wanted = threshold(instructions[connective]);
  const Parts<Number> parts{instructions, values, connective, wanted.complemented};
  const int n = parts.count(), least = wanted.least;
  Counts<Number> after;
  after.clear(least);
  for (int i = 0, part = parts.last(); i < n; ++i, part = parts.before(part)) {
    visited[i].part = part;
    visited[i].before.copy(after, least);
    after.add(parts.good(part), parts.bad(part), least);
  }
  const Slope<Number>& slope = slopes[connective];
  const Judgement<Number>& whole = values[connective];
  const Number denominator = slope.of_bad ? whole.bad : whole.good;
  after.clear(least);
  for (int i = n - 1; i >= 0; --i) {
    Number exactly = Constants<Number>::zero();
    for (int j = 0; j < least; ++j) exactly = exactly + visited[i].before.probability[j] * after.probability[least - 1 - j];
    const int part = visited[i].part;
    const Judgement<Number>& each = values[part];
    const Number share = quotient(exactly * (slope.of_bad ? each.bad : each.good), denominator);
    slopes[part].set(slope.size * share, slope.of_bad, slope.falls);
    after.add(parts.good(part), parts.bad(part), least);
  }
}

// The slope of every instruction, from the values of all of them; `visited` is room for as many parts as there are properties.
template <typename Number>
LSC_FN inline void differentiate(
    const Program& program, Judgement<Number>* values, Slope<Number>* slopes, Visited<Number>* visited) {
  using Kind = Instruction::Kind;
  const Instruction* all = program.instructions;
  slopes[program.length - 1].set(Constants<Number>::one(), false, false);
  for (int i = program.length - 1; i >= 0; --i) {
    const Kind kind = all[i].kind;
    switch (kind) {
      case Kind::property: break;
      case Kind::complement: slopes[i - 1].set(slopes[i].size, !slopes[i].of_bad, !slopes[i].falls); break;
      case Kind::all:
      case Kind::any: slopes_of_all(Parts<Number>{all, values, i, kind == Kind::any}, slopes); break;
      case Kind::at_least: slopes_of_at_least(all, values, i, slopes, visited); break;
      case Kind::weakest: {
        const Parts<Number> parts{all, values, i, false};
        const auto least = weakest_of(parts).part;
        for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
          const auto chosen = least == typename Constants<Number>::Index(part);
          slopes[part].set(select(chosen, slopes[i].size, Constants<Number>::zero()), slopes[i].of_bad, slopes[i].falls);
        }
        break;
      }
    }
  }
}

// |d u / d log p^w| of a property.
template <typename Number>
LSC_FN inline Number slope_at(const Judged<Number>& property, const Slope<Number>& slope) {
  return slope.of_bad ? slope.size * quotient(property.weighted.good, property.weighted.bad) : slope.size;
}

struct PropertyGradient {
  double z, weight;  // d u / dz, d u / dw
};

LSC_FN inline PropertyGradient gradient(const Judged<Log>& property, const Slope<Log>& slope) {
  const Log size = slope_at(property, slope);
  if (size == Constants<Log>::zero()) return {0.0, 0.0};
  const double sign = slope.falls ? -1.0 : 1.0;
  return {sign * std::exp((size * property.slope).log), -sign * std::exp((size * minus_log(property.unweighted)).log)};
}

}  // namespace LSC_ISA
}  // namespace lsc
