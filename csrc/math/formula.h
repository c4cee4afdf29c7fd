// The log-probability that a formula over independent properties holds, and its gradient.
//
// Design constraint: the result is accurate to its own size, whether it is -1e-30 or -1e4, and a gradient neither becomes
// inf * 0 nor loses its digits where probabilities come to 0 or 1. Neither p nor log p can say both: 1 - p is lost in p
// near 1, log(1 - p) in log p near -0. So every value is the pair (log p, log(1 - p)). Only positive terms are added; the
// probability below 1/2 comes from such a sum, and the other of the pair from it by log1mexp. Complement is a swap, and
// any(a, b) is the complement of all(~a, ~b).
//
//     all        log p = sum log p_i              1 - p = q_1 + p_1 (q_2 + p_2 (q_3 + ...)), in logarithms
//     at least m Poisson-binomial, counts[j] = log P(j of those so far hold) for j < m, and one that keeps P(m or more)
//     weakest    the pair of the least probable
//
// The gradient goes from the root to the properties as the logarithm of |d u / d log p| or of |d u / d log(1 - p)|,
// whichever is at hand. Its sign depends on nothing but the number of complements on the way.
//
//     all        d log p / d log p_i = 1              |d log(1-p) / d log p_i| = p / (1-p)
//     at least m d log p / d log p_i = c_i p_i / p    d log(1-p) / d log(1-p_i) = c_i (1-p_i) / (1-p),
//                c_i = P(exactly m - 1 of the others hold)
//     weakest    1 for the least probable
//
// Real is double; a row's work is O(n m) for at_least, O(n) else.
#pragma once

#include <cmath>

#include "math/fn.h"
#include "math/program.h"

namespace lsc {
namespace LSC_ISA {

constexpr double kLn2 = 0.693147180559945309;
// A logarithm nearer to 0 has begun to lose its digits; log(1 - p) still has them.
constexpr double kTiny = 1e-290;

template <typename Real>
struct Judgement {
  Real good, bad;  // log p, log(1 - p)
};

template <typename Real>
LSC_FN inline Judgement<Real> complement(Judgement<Real> p) {
  return {p.bad, p.good};
}

// log(1 - e^a), a <= 0
template <typename Real>
LSC_FN inline Real log1mexp(Real a) {
  return a > Real(-kLn2) ? std::log(-std::expm1(a)) : std::log1p(-std::exp(a));
}

// log(e^a + e^b); -inf counts for nothing, NaN travels.
template <typename Real>
LSC_FN inline Real log_add(Real a, Real b) {
  const Real larger = a > b ? a : b, smaller = a > b ? b : a;
  return smaller == Real(-INFINITY) ? larger : larger + std::log1p(std::exp(smaller - larger));
}

// log(a/b) of what a gradient is divided by: nothing where there is nothing to divide, or nothing to divide by.
template <typename Real>
LSC_FN inline Real log_quotient(Real log_a, Real log_b) {
  return log_a == Real(-INFINITY) || log_b == Real(-INFINITY) ? Real(-INFINITY) : log_a - log_b;
}

// Both of a pair, each from a sum of its own: that of the probability below 1/2 decides.
template <typename Real>
LSC_FN inline Judgement<Real> settled(Real good, Real bad) {
  if (good < bad) return {good, log1mexp(good)};
  return {log1mexp(bad), bad};
}

// log(-log p)
template <typename Real>
LSC_FN inline Real log_minus_log(Judgement<Real> p) {
  return p.good > Real(-kTiny) ? p.bad : std::log(-p.good);
}

// One property, judged with floor and weight.
template <typename Real>
struct Judged {
  Judgement<Real> weighted, unweighted;
  Real log_slope;  // log of d log p^w / dz
};

template <typename Real>
LSC_FN inline Judged<Real> certainly_good() {
  const Judgement<Real> certain{Real(0), Real(-INFINITY)};
  return {certain, certain, Real(-INFINITY)};
}

template <typename Real>
LSC_FN inline Judged<Real> judge(Real z, Real floor, Real weight) {
  const Real tail = std::log1p(std::exp(-std::fabs(z)));
  const Real sigmoid = (z < 0 ? z : Real(0)) - tail, opposite = (z > 0 ? -z : Real(0)) - tail;
  Judgement<Real> p{sigmoid, opposite};
  Real log_slope = opposite;
  if (floor != 0) {
    const Real right = std::log1p(-floor);
    p = settled(log_add(std::log(floor), right + sigmoid), right + opposite);
    log_slope = p.bad + (sigmoid - p.good);
  }
  if (weight == 1) return {p, p, log_slope};
  // nothing at all comes of a property with weight 0
  if (weight == 0) return {{Real(0), Real(-INFINITY)}, p, Real(-INFINITY)};
  const Real good = weight * p.good, log_weight = std::log(weight);
  return {{good, good > Real(-kTiny) ? log_weight + log_minus_log(p) : log1mexp(good)}, p, log_slope + log_weight};
}

// The values of a program's instructions so far, and the parts of one of them, last to first.
template <typename Real>
struct Parts {
  const Instruction* instructions;
  const Judgement<Real>* values;
  int connective;
  bool complemented;

  LSC_FN int count() const { return instructions[connective].operand; }
  LSC_FN int last() const { return connective - 1; }
  LSC_FN int before(int part) const { return part - instructions[part].size; }
  LSC_FN Judgement<Real> at(int part) const { return complemented ? complement(values[part]) : values[part]; }
  LSC_FN Judgement<Real> of(Judgement<Real> result) const { return complemented ? complement(result) : result; }
};

template <typename Real>
LSC_FN inline Judgement<Real> all_of(const Parts<Real>& parts) {
  Judgement<Real> p{Real(0), Real(-INFINITY)};
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) p.good += parts.at(part).good;
  if (p.good < Real(-kLn2)) {
    p.bad = log1mexp(p.good);
    return parts.of(p);
  }
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
    const Judgement<Real> each = parts.at(part);
    p.bad = log_add(each.bad, each.good + p.bad);
  }
  return parts.of(p);
}

// The least probable; by log(1 - p) where both are too certain for log p to tell. Ties go to the first part.
template <typename Real>
LSC_FN inline int weakest_of(const Parts<Real>& parts) {
  int least = parts.last();
  for (int n = parts.count() - 1, part = parts.before(least); n > 0; --n, part = parts.before(part)) {
    const Judgement<Real> p = parts.values[least], q = parts.values[part];
    const bool stays = p.good != p.good || p.good < q.good || (p.good == q.good && p.bad > q.bad);
    if (!stays) least = part;
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

template <typename Real>
struct Counts {
  Real log_probability[kMaxLeast];  // that j hold, j < m

  LSC_FN void clear(int least) {
    for (int j = 1; j < least; ++j) log_probability[j] = Real(-INFINITY);
    log_probability[0] = 0;
  }

  LSC_FN void add(Judgement<Real> p, int least) {
    for (int j = least - 1; j > 0; --j) {
      log_probability[j] = log_add(log_probability[j] + p.bad, log_probability[j - 1] + p.good);
    }
    log_probability[0] += p.bad;
  }
};

template <typename Real>
LSC_FN inline Judgement<Real> at_least(const Instruction* instructions, const Judgement<Real>* values, int connective) {
  const Threshold wanted = threshold(instructions[connective]);
  const Parts<Real> parts{instructions, values, connective, wanted.complemented};
  Counts<Real> counts;
  counts.clear(wanted.least);
  Real reached = -INFINITY, missed = -INFINITY;
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
    const Judgement<Real> each = parts.at(part);
    reached = log_add(reached, counts.log_probability[wanted.least - 1] + each.good);
    counts.add(each, wanted.least);
  }
  for (int j = 0; j < wanted.least; ++j) missed = log_add(missed, counts.log_probability[j]);
  return parts.of(settled(reached, missed));
}

// The value of every instruction, the last one's being the formula's. `properties` are in the program's order.
template <typename Real>
LSC_FN inline Judgement<Real> evaluate(const Program& program, const Judged<Real>* properties, Judgement<Real>* values) {
  using Kind = Instruction::Kind;
  for (int i = 0; i < program.length; ++i) {
    const Instruction* all = program.instructions;
    const Kind kind = all[i].kind;
    switch (kind) {
      case Kind::property: values[i] = (properties++)->weighted; break;
      case Kind::complement: values[i] = complement(values[i - 1]); break;
      case Kind::all:
      case Kind::any: values[i] = all_of(Parts<Real>{all, values, i, kind == Kind::any}); break;
      case Kind::at_least: values[i] = at_least(all, values, i); break;
      case Kind::weakest: values[i] = values[weakest_of(Parts<Real>{all, values, i, false})]; break;
    }
  }
  return values[program.length - 1];
}

// log |d u / d log p| of a part, or where `of_bad`, log |d u / d log(1 - p)|.
template <typename Real>
struct Slope {
  Real log_size;
  bool of_bad;
  bool falls;  // u falls where p rises
};

// From an `all`, or from an `any` by its complements, to its parts.
template <typename Real>
LSC_FN inline void slopes_of_all(const Parts<Real>& parts, Slope<Real>* slopes) {
  Slope<Real> slope = slopes[parts.connective];
  if (slope.of_bad != parts.complemented) {
    const Judgement<Real> p = parts.at(parts.connective);
    slope.log_size = log_quotient(slope.log_size + p.good, p.bad);
  }
  slope.of_bad = parts.complemented;
  for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) slopes[part] = slope;
}

// A part on the way through those of an at_least, and the counts of all that came before it.
template <typename Real>
struct Visited {
  int part;
  Counts<Real> before;
};

// The counts of all parts before each of them are kept, in `visited`; those of all after it grow on the way back.
template <typename Real>
LSC_FN inline void slopes_of_at_least(
    const Instruction* instructions, const Judgement<Real>* values, int connective, Slope<Real>* slopes, Visited<Real>* visited) {
  const Threshold wanted = threshold(instructions[connective]);
  const Parts<Real> parts{instructions, values, connective, wanted.complemented};
  const int n = parts.count(), least = wanted.least;
  Counts<Real> after;
  after.clear(least);
  for (int i = 0, part = parts.last(); i < n; ++i, part = parts.before(part)) {
    visited[i] = {part, after};
    after.add(parts.at(part), least);
  }
  const Slope<Real> slope = slopes[connective];
  const Judgement<Real> whole = values[connective];
  const Real denominator = slope.of_bad ? whole.bad : whole.good;
  after.clear(least);
  for (int i = n - 1; i >= 0; --i) {
    Real exactly = -INFINITY;
    for (int j = 0; j < least; ++j) {
      exactly = log_add(exactly, visited[i].before.log_probability[j] + after.log_probability[least - 1 - j]);
    }
    const int part = visited[i].part;
    const Judgement<Real> each = values[part];
    const Real numerator = slope.log_size + exactly + (slope.of_bad ? each.bad : each.good);
    slopes[part] = {log_quotient(numerator, denominator), slope.of_bad, slope.falls};
    after.add(parts.at(part), least);
  }
}

// The slope of every instruction, from the values of all of them; `visited` is room for as many parts as there are properties.
template <typename Real>
LSC_FN inline void differentiate(
    const Program& program, const Judgement<Real>* values, Slope<Real>* slopes, Visited<Real>* visited) {
  using Kind = Instruction::Kind;
  const Instruction* all = program.instructions;
  slopes[program.length - 1] = {Real(0), false, false};
  for (int i = program.length - 1; i >= 0; --i) {
    const Kind kind = all[i].kind;
    switch (kind) {
      case Kind::property: break;
      case Kind::complement: slopes[i - 1] = {slopes[i].log_size, !slopes[i].of_bad, !slopes[i].falls}; break;
      case Kind::all:
      case Kind::any: slopes_of_all(Parts<Real>{all, values, i, kind == Kind::any}, slopes); break;
      case Kind::at_least: slopes_of_at_least(all, values, i, slopes, visited); break;
      case Kind::weakest: {
        const Parts<Real> parts{all, values, i, false};
        const int least = weakest_of(parts);
        for (int n = parts.count(), part = parts.last(); n > 0; --n, part = parts.before(part)) {
          slopes[part] = slopes[i];
          if (part != least) slopes[part].log_size = -INFINITY;
        }
        break;
      }
    }
  }
}

template <typename Real>
struct PropertyGradient {
  Real z, weight;  // d u / dz, d u / dw
};

template <typename Real>
LSC_FN inline PropertyGradient<Real> gradient(const Judged<Real>& property, const Slope<Real>& slope) {
  Real log_size = slope.log_size;
  if (slope.of_bad) log_size = log_quotient(log_size + property.weighted.good, property.weighted.bad);
  if (log_size == Real(-INFINITY)) return {Real(0), Real(0)};
  const Real sign = slope.falls ? Real(-1) : Real(1);
  return {sign * std::exp(log_size + property.log_slope), -sign * std::exp(log_size + log_minus_log(property.unweighted))};
}

}  // namespace LSC_ISA
}  // namespace lsc
