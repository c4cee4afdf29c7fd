"""The probability of a formula over independent properties, and its gradient: the definition.

Every part of a formula is the pair (log p, log(1 - p)): near 1, log p no longer tells 1 - p, and near 0 the other way
round. With q = 1 - p, of parts p_1, p_2, ...:

=============  ==============================================================================================
part           means
=============  ==============================================================================================
complement     (log q, log p)
all            p = prod p_i                         q = q_1 + p_1 (q_2 + p_2 (q_3 + ...))
any            q = prod q_i                         p = p_1 + q_1 (p_2 + q_2 (p_3 + ...))
at least m     p = P(S >= m), S = how many hold     q = P(S < m), both from one Poisson-binomial recursion
weakest        the pair of the smallest p_i
=============  ==============================================================================================

Of each pair the one below 1/2 comes from such a sum of positive terms, the other from it, so that each is accurate to
its own size.

A gradient runs from u = log p of the whole to its parts as the logarithm of a size, since p/q may be any number, and
what it is multiplied with at the end its reciprocal. It is with respect to log p or to log q:

=============  =======================================  ======================================================
part           of log p                                 of log q
=============  =======================================  ======================================================
complement     d log q_1: 1                             d log p_1: 1
all            d log p_i: 1                             d log p_i: p / q
any            d log q_i: q / p                         d log q_i: 1
at least m     d log p_i: c_i p_i / p                   d log q_i: c_i q_i / q, c_i = P(m - 1 of the others hold)
weakest        d log p_i: 1 for the smallest, else 0    the same
=============  =======================================  ======================================================

u falls with a property under an odd number of complements, and rises with every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.formula import Instruction

_TINY = 1e-290


class Pair(NamedTuple):
    """log p and log(1 - p)."""

    good: Tensor
    bad: Tensor

    def complement(self) -> Pair:
        return Pair(self.bad, self.good)

    def side(self, bad: bool) -> Tensor:
        return self.bad if bad else self.good


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a), a <= 0."""
    return torch.where(a > -math.log(2), torch.log(-torch.expm1(a)), torch.log1p(-torch.exp(a)))


def log_minus_log(p: Pair) -> Tensor:
    """log(-log p)"""
    return torch.where(p.good > -_TINY, p.bad, torch.log(-p.good))


def power(p: Pair, weight: Tensor) -> Pair:
    """p to the power of a weight."""
    good = weight * p.good
    bad = torch.where(good > -_TINY, weight.log() + log_minus_log(p), log1mexp(good))
    return Pair(
        torch.where(weight == 0, 0.0, good),
        torch.where(weight == 0, -math.inf, torch.where(weight == 1, p.bad, bad)),
    )


def settled(good: Tensor, bad: Tensor) -> Pair:
    """Both of a pair, each summed by itself: the one below 1/2 decides."""
    return Pair(torch.where(good < bad, good, log1mexp(bad)), torch.where(good < bad, log1mexp(good), bad))


def _all(parts: Sequence[Pair]) -> Pair:
    good = torch.stack([part.good for part in parts]).sum(0)
    bad = torch.full_like(good, -math.inf)
    for part in reversed(parts):
        bad = torch.logaddexp(part.bad, part.good + bad)
    return Pair(good, torch.where(good < -math.log(2), log1mexp(good), bad))


def _counts(parts: Sequence[Pair], least: int, like: Tensor) -> Iterator[list[Tensor]]:
    """log P(exactly j hold), j < least: of none of the parts, of the first, of the first two ..."""
    never = torch.full_like(like, -math.inf)
    counts = [torch.zeros_like(like), *[never] * (least - 1)]
    yield counts
    for part in parts:
        counts = [
            torch.logaddexp(count + part.bad, fewer + part.good)
            for count, fewer in zip(counts, [never, *counts[:-1]], strict=True)
        ]
        yield counts


def _at_least(least: int, parts: Sequence[Pair]) -> Pair:
    counts = list(_counts(parts, least, parts[0].good))
    reached = torch.stack(
        [before[-1] + part.good for before, part in zip(counts[:-1], parts, strict=True)]
    ).logsumexp(0)
    return settled(reached, torch.stack(counts[-1]).logsumexp(0))


def _exactly_fewer(least: int, parts: Sequence[Pair]) -> list[Tensor]:
    """For each part, log P(exactly least - 1 of the others hold)."""
    like = parts[0].good
    before = list(_counts(parts, least, like))[:-1]
    after = list(_counts(parts[::-1], least, like))[-2::-1]
    return [
        torch.stack([b + a for b, a in zip(first, reversed(second), strict=True)]).logsumexp(0)
        for first, second in zip(before, after, strict=True)
    ]


def _weakest(parts: Sequence[Pair]) -> Tensor:
    """Which part is the least probable; the first of equals, or of those that are NaN."""
    least, which = parts[0], torch.zeros_like(parts[0].good, dtype=torch.int64)
    for index, part in enumerate(parts[1:], 1):
        less = (part.good < least.good) | ((part.good == least.good) & (part.bad > least.bad))
        less = (less | part.good.isnan()) & ~least.good.isnan()
        least = Pair(*(torch.where(less, new, old) for new, old in zip(part, least, strict=True)))
        which = torch.where(less, index, which)
    return which


class Node(NamedTuple):
    """A part of a formula with its value."""

    instruction: tuple[int, int, int]
    parts: tuple[Node, ...]
    value: Pair


def evaluate(program: Sequence[int], property_of: Callable[[int], Pair]) -> Node:
    """The formula's value, with those of its parts. ``property_of(column)`` is what its properties are."""
    stack: list[Node] = []
    for kind, operand, least in zip(program[::3], program[1::3], program[2::3], strict=True):
        several = {Instruction.PROPERTY: 0, Instruction.NOT: 1}.get(kind, operand)  # type: ignore[call-overload]
        parts = tuple(stack[len(stack) - several :])
        del stack[len(stack) - several :]
        values = [part.value for part in parts]
        if kind == Instruction.PROPERTY:
            value = property_of(operand)
        elif kind == Instruction.NOT:
            value = values[0].complement()
        elif kind == Instruction.ALL:
            value = _all(values)
        elif kind == Instruction.ANY:
            value = _all([part.complement() for part in values]).complement()
        elif kind == Instruction.AT_LEAST:
            value = _at_least(least, values)
        else:
            which = _weakest(values).unsqueeze(0)
            value = Pair(
                *(torch.stack(side).gather(0, which).squeeze(0) for side in zip(*values, strict=True))
            )
        stack.append(Node((kind, operand, least), parts, value))
    (whole,) = stack
    return whole


class Slope(NamedTuple):
    """log of |du / d log p| of a part, or where ``of_bad`` of |du / d log(1 - p)|."""

    log_size: Tensor
    of_bad: bool = False
    falls: bool = False


def log_quotient(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(a / b): of nothing where there is nothing to divide, or nothing to divide by."""
    nothing = (log_a == -math.inf) | (log_b == -math.inf)
    return torch.where(nothing, -math.inf, log_a - log_b)


def differentiate(node: Node, slope: Slope) -> Iterator[tuple[int, Slope]]:
    """The slope at every property, with its column."""
    (kind, operand, least), parts, p = node
    size, of_bad, falls = slope
    if kind == Instruction.PROPERTY:
        yield operand, slope
    elif kind == Instruction.NOT:
        yield from differentiate(parts[0], Slope(size, not of_bad, not falls))
    elif kind == Instruction.ALL:
        each = Slope(log_quotient(size + p.good, p.bad) if of_bad else size, False, falls)
        for part in parts:
            yield from differentiate(part, each)
    elif kind == Instruction.ANY:
        each = Slope(size if of_bad else log_quotient(size + p.bad, p.good), True, falls)
        for part in parts:
            yield from differentiate(part, each)
    elif kind == Instruction.AT_LEAST:
        fewer = _exactly_fewer(least, [part.value for part in parts])
        for part, exactly in zip(parts, fewer, strict=True):
            share = log_quotient(size + exactly + part.value.side(of_bad), p.side(of_bad))
            yield from differentiate(part, Slope(share, of_bad, falls))
    else:
        which = _weakest([part.value for part in parts])
        for index, part in enumerate(parts):
            chosen = torch.where(which == index, size, -math.inf)
            yield from differentiate(part, Slope(chosen, of_bad, falls))
