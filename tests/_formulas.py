"""Random formulas, and what they mean: the probability by counting all 2^K outcomes.

The truth knows nothing of logarithms, programs or conjunctions of many: it asks of each outcome, a list of which
properties hold, whether the formula holds, and adds up the outcomes' probabilities. It has digits enough for scores up
to 100 and weights up to 4 of 7 properties, where the least probable outcome has a probability of 1e-1216.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import mpmath
from hypothesis import strategies as st

import lsc_kernels as lk
from lsc_kernels.formula import AllOf, AnyOf, AtLeast, Formula, Not, Property, Weakest

DIGITS = 1500


@st.composite
def formulas(draw: st.DrawFn, leaves: Sequence[Formula], with_weakest: bool = True) -> Formula:
    """Any formula of all the leaves, in any order."""
    parts = list(draw(st.permutations(leaves)))
    while len(parts) > 1:
        parts = draw(st.permutations(parts))
        several = draw(st.integers(2, len(parts)))
        kinds = ["all", "any", "at_least", *(["weakest"] if with_weakest else [])]
        made = combined(draw(st.sampled_from(kinds)), parts[:several], draw(st.integers(1, several)))
        parts = [~made if draw(st.booleans()) else made, *parts[several:]]
    return ~parts[0] if draw(st.booleans()) else parts[0]


def combined(kind: str, parts: Sequence[Formula], least: int) -> Formula:
    if kind == "at_least":
        return lk.at_least(least, *parts)
    if kind == "weakest":
        return lk.weakest(*parts)
    made = parts[0]
    for part in parts[1:]:
        made = made & part if kind == "all" else made | part
    return made


def holds(formula: Formula, outcome: Mapping[str | int, bool]) -> bool:
    """Whether the formula holds where exactly these properties do."""
    if isinstance(formula, Property):
        return outcome[formula.name]
    parts = [holds(part, outcome) for part in formula.parts]
    if isinstance(formula, Not):
        return not parts[0]
    if isinstance(formula, AllOf):
        return all(parts)
    if isinstance(formula, AnyOf):
        return any(parts)
    assert isinstance(formula, AtLeast)
    return sum(parts) >= formula.least


def probability(formula: Formula, of: Mapping[str | int, mpmath.mpf]) -> mpmath.mpf:
    """P(formula). The parts of a ``weakest`` are no events: there, by its definition, it is the smallest of theirs."""
    names = formula.properties
    if isinstance(formula, Property):
        return of[formula.name] ** formula.exponent
    if isinstance(formula, Weakest):
        return min(probability(part, of) for part in formula.parts)
    if has_weakest(formula):
        parts = {str(index): probability(part, of) for index, part in enumerate(formula.parts)}
        return probability(_over_leaves(formula, [lk.prop(name) for name in parts]), parts)
    total, good = mpmath.mpf(0), weighted(formula, of)
    for bits in itertools.product((False, True), repeat=len(names)):
        outcome = dict(zip(names, bits, strict=True))
        if holds(formula, outcome):
            total += mpmath.fprod(p if outcome[name] else 1 - p for name, p in good.items())
    return total


def weighted(formula: Formula, of: Mapping[str | int, mpmath.mpf]) -> dict[str | int, mpmath.mpf]:
    if isinstance(formula, Property):
        return {formula.name: of[formula.name] ** formula.exponent}
    return {name: p for part in formula.parts for name, p in weighted(part, of).items()}


def utility(
    formula: Formula, z: Mapping[str | int, mpmath.mpf], weights: Mapping[str | int, mpmath.mpf]
) -> mpmath.mpf:
    """log P(formula), where property k has the probability sigmoid(z_k)^w_k."""
    return mpmath.log(
        probability(formula, {name: judged(z[name], weights[name], mpmath.mp.prec) for name in z})
    )


@functools.lru_cache(maxsize=64)  # a gradient moves one property at a time
def judged(z: mpmath.mpf, weight: mpmath.mpf, precision: int) -> mpmath.mpf:
    return (1 + mpmath.exp(-z)) ** -weight


def gradient(
    formula: Formula, z: Mapping[str | int, mpmath.mpf], weights: Mapping[str | int, mpmath.mpf]
) -> tuple[dict[str | int, mpmath.mpf], dict[str | int, mpmath.mpf]]:
    """To z and to the weights, by central differences."""
    step = mpmath.mpf(10) ** (-DIGITS // 4)
    found: tuple[dict[str | int, mpmath.mpf], ...] = ({}, {})
    for out, moved in zip(found, (z, weights), strict=True):
        for name in z:
            up, down = ({**moved, name: moved[name] + sign * step} for sign in (1, -1))
            pairs = [(up, weights), (down, weights)] if moved is z else [(z, up), (z, down)]
            above, below = (utility(formula, *pair) for pair in pairs)
            out[name] = (above - below) / (2 * step)
    return found[0], found[1]


def has_weakest(formula: Formula) -> bool:
    return isinstance(formula, Weakest) or any(map(has_weakest, formula.parts))


def _over_leaves(formula: Formula, leaves: list[Property]) -> Formula:
    """The same connective over other parts."""
    if isinstance(formula, Not):
        return ~leaves[0]
    if isinstance(formula, AtLeast):
        return lk.at_least(formula.least, *leaves)
    return combined("all" if isinstance(formula, AllOf) else "any", leaves, 0)
