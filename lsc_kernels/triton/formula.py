"""A formula over properties in Triton: what csrc/math/formula.h is in C++, for one row of scores at a time.

Design constraint: one compilation for all formulas. So the program is data, and its interpreter a loop: instruction i
has slot i of a few vectors, held in registers across the threads of a block, where it finds its parts' values and
leaves its own. Values are pairs (log p, log(1 - p)) and slopes logarithms, in fp64; see csrc/math/formula.h for why.

What a block does: all properties at once, one per slot; then the connectives, in order, each a reduction over the slots
of its parts; backward, the connectives in reverse, each writing the slopes of its parts. at_least of n parts takes n
steps, and n^2 backward, as each part's count of the others is made anew.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.formula import MAX_PROPERTIES, Instruction
from lsc_kernels.triton._launch import kept

PROPERTY = tl.constexpr(int(Instruction.PROPERTY))
NOT = tl.constexpr(int(Instruction.NOT))
ALL = tl.constexpr(int(Instruction.ALL))
ANY = tl.constexpr(int(Instruction.ANY))
AT_LEAST = tl.constexpr(int(Instruction.AT_LEAST))

NUMBERS = tl.constexpr(4)
"""Per instruction: kind, operand, least, and the instruction whose part it is."""

_COUNTS = tl.constexpr((MAX_PROPERTIES + 1) // 2)
_LN2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1e-290)


@functools.cache  # for good: a graph may refer to it
def program_on(program: tuple[int, ...], device: torch.device) -> Tensor:
    """The program with each instruction's parent, [length, 4]; copied to the device once."""
    rows: list[list[int]] = []
    stack: list[int] = []
    for index in range(0, len(program), 3):
        kind, operand, least = program[index : index + 3]
        several = {Instruction.PROPERTY: 0, Instruction.NOT: 1}.get(Instruction(kind), operand)
        for part in stack[len(stack) - several :]:
            rows[part][3] = len(rows)
        del stack[len(stack) - several :]
        stack.append(len(rows))
        rows.append([kind, operand, least, -1])
    return kept(lambda: torch.tensor(rows, dtype=torch.int32, device=device))


class Pair(NamedTuple):
    """log p and log(1 - p)."""

    good: tl.tensor
    bad: tl.tensor


class Judged(NamedTuple):
    """A property with its weight, without it, and the log of d log p^w / dz."""

    weighted: Pair
    unweighted: Pair
    log_slope: tl.tensor


class Slopes(NamedTuple):
    """log |d u / d log p|, or where ``of_bad`` (1), log |d u / d log(1 - p)|; ``falls`` (1) where u falls with p."""

    log_size: tl.tensor
    of_bad: tl.tensor
    falls: tl.tensor


@triton.jit
def _log1p(x):
    """For x in [-1/2, 1]: what 1 + x rounds away is made good by the quotient."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * x / (above - 1.0))


@triton.jit
def _log1mexp(a):
    """log(1 - e^a), a <= 0"""
    power = tl.exp(a)
    small = tl.where(power == 1.0, -a, (1.0 - power) * a / tl.log(power))  # -expm1(a)
    near = a > -_LN2
    return tl.log(tl.where(near, small, 1.0)) + tl.where(near, 0.0, _log1p(tl.where(near, 0.0, -power)))


@triton.jit
def _log_add(a, b):
    larger, smaller = tl.where(a > b, a, b), tl.where(a > b, b, a)
    nothing = smaller == -float("inf")
    return tl.where(nothing, larger, larger + _log1p(tl.exp(tl.where(nothing, 0.0, smaller - larger))))


@triton.jit
def _log_quotient(log_a, log_b):
    """log(a / b): of nothing where there is nothing to divide, or nothing to divide by."""
    quotient = tl.where(log_b == -float("inf"), -float("inf"), log_a - log_b)
    return tl.where(log_a == -float("inf"), -float("inf"), quotient)


@triton.jit
def _log_minus_log(p):
    """log(-log p)"""
    return tl.where(p.good > -_TINY, p.bad, tl.log(-p.good))


@triton.jit
def _settled(good, bad):
    """Both of a pair, each from a sum of its own: that of the probability below 1/2 decides."""
    return Pair(
        good=tl.where(good < bad, good, _log1mexp(bad)), bad=tl.where(good < bad, _log1mexp(good), bad)
    )


@triton.jit
def judge(z, floor, weight):
    """Properties from z, all in fp64."""
    tail = _log1p(tl.exp(-tl.abs(z)))
    sigmoid, opposite = tl.where(z > 0, 0.0, z) - tail, tl.where(z < 0, 0.0, -z) - tail
    right = _log1p(-floor)
    floored = _settled(_log_add(tl.log(floor), right + sigmoid), right + opposite)
    p = Pair(good=tl.where(floor > 0, floored.good, sigmoid), bad=tl.where(floor > 0, floored.bad, opposite))
    log_slope = tl.where(floor > 0, p.bad + (sigmoid - p.good), opposite)
    good, log_weight = weight * p.good, tl.log(weight)
    bad = tl.where(good > -_TINY, log_weight + _log_minus_log(p), _log1mexp(good))
    # nothing at all comes of a property with weight 0
    good, bad = tl.where(weight == 0, 0.0, good), tl.where(weight == 1, p.bad, bad)
    return Judged(
        weighted=Pair(good=good, bad=tl.where(weight == 0, -float("inf"), bad)),
        unweighted=p,
        log_slope=tl.where(weight == 0, -float("inf"), log_slope + log_weight),
    )


@triton.jit
def ignored(missing, judged):
    """A missing property is certainly good."""
    never = -float("inf")
    return Judged(
        weighted=Pair(
            good=tl.where(missing, 0.0, judged.weighted.good),
            bad=tl.where(missing, never, judged.weighted.bad),
        ),
        unweighted=Pair(
            good=tl.where(missing, 0.0, judged.unweighted.good),
            bad=tl.where(missing, never, judged.unweighted.bad),
        ),
        log_slope=tl.where(missing, never, judged.log_slope),
    )


@triton.jit
def _at(values, slot, index):
    """What one slot holds."""
    return tl.sum(tl.where(slot == index, values, tl.zeros_like(values)), 0)


@triton.jit
def _log_sum(values):
    largest = tl.max(values, 0)
    largest = tl.where(largest == -float("inf"), 0.0, largest)
    return tl.log(tl.sum(tl.exp(values - largest), 0)) + largest


@triton.jit
def _all(good, bad, part):
    """The product of the parts: 1 - p is a sum over the first part that does not hold."""
    whole = tl.sum(tl.where(part, good, 0.0), 0)
    unlikely = whole < -_LN2
    finite = tl.where(part, tl.where(unlikely, 0.0, good), 0.0)
    first = tl.where(part, bad + (tl.cumsum(finite, 0) - finite), -float("inf"))
    return Pair(
        good=whole, bad=tl.where(unlikely, _log1mexp(tl.where(unlikely, whole, -1.0)), _log_sum(first))
    )


@triton.jit
def _weakest(good, bad, part, slot):
    """The slot of the least probable part; the first of equals, or of those that are NaN."""
    wrong = good != good
    least = tl.where(wrong, -float("inf"), good)
    equal = part & (least == tl.min(tl.where(part, least, float("inf")), 0))
    certain = tl.where(wrong, 1.0, bad)
    equal = equal & (certain == tl.max(tl.where(equal, certain, -float("inf")), 0))
    return tl.min(tl.where(equal, slot, 1 << 20), 0)


@triton.jit
def _counted(counts, good, bad):
    """log P(j hold) with one property more."""
    j = tl.arange(0, _COUNTS)
    fewer = tl.sum(tl.where(j[:, None] - 1 == j[None, :], counts[None, :], 0.0), 1)
    return _log_add(counts + bad, tl.where(j == 0, -float("inf"), fewer + good))


@triton.jit
def _count_others(program, connective, without, good, bad, slot):
    """log P(j of the parts hold, ``without`` one of them left out), for all j < _COUNTS."""
    counts = tl.where(tl.arange(0, _COUNTS) == 0, 0.0, -float("inf")).to(tl.float64)
    for index in range(0, connective):
        if (tl.load(program + index * NUMBERS + 3) == connective) & (index != without):
            counts = _counted(counts, _at(good, slot, index), _at(bad, slot, index))
    return counts


@triton.jit
def _at_least(program, connective, least, good, bad, slot):
    j = tl.arange(0, _COUNTS)
    counts = tl.where(j == 0, 0.0, -float("inf")).to(tl.float64)
    reached = tl.sum(tl.where(j < 0, counts, 0.0), 0) - float("inf")
    for index in range(0, connective):
        if tl.load(program + index * NUMBERS + 3) == connective:
            one, other = _at(good, slot, index), _at(bad, slot, index)
            reached = _log_add(reached, _at(counts, j, least - 1) + one)
            counts = _counted(counts, one, other)
    return _settled(reached, _log_sum(tl.where(j < least, counts, -float("inf"))))


@triton.jit
def evaluate(program, length, good, bad, slot, parent):
    """The pairs of all slots, from those of the properties. The last instruction's is the formula's."""
    for i in range(0, length):
        which = tl.load(program + i * NUMBERS)
        if which != PROPERTY:
            operand, least = tl.load(program + i * NUMBERS + 1), tl.load(program + i * NUMBERS + 2)
            part = parent == i
            value = Pair(good=_at(bad, slot, i - 1), bad=_at(good, slot, i - 1))
            if which == ALL:
                value = _all(good, bad, part)
            elif which == ANY:
                nothing = _all(bad, good, part)
                value = Pair(good=nothing.bad, bad=nothing.good)
            elif which == AT_LEAST:
                # at least m of n as not(at least n - m + 1 of the complements) where that is the smaller number
                if operand - least + 1 < least:
                    missed = _at_least(program, i, operand - least + 1, bad, good, slot)
                    value = Pair(good=missed.bad, bad=missed.good)
                else:
                    value = _at_least(program, i, least, good, bad, slot)
            elif which != NOT:
                chosen = _weakest(good, bad, part, slot)
                value = Pair(good=_at(good, slot, chosen), bad=_at(bad, slot, chosen))
            good, bad = tl.where(slot == i, value.good, good), tl.where(slot == i, value.bad, bad)
    return Pair(good=good, bad=bad)


@triton.jit
def _exactly_fewer(program, connective, operand, least, good, bad, slot, parent):
    """For each part, log P(least - 1 of the others hold)."""
    j = tl.arange(0, _COUNTS)
    complemented = operand - least + 1 < least
    wanted = tl.where(complemented, operand - least + 1, least)
    one, other = tl.where(complemented, bad, good), tl.where(complemented, good, bad)
    exactly = tl.where(slot < 0, good, -float("inf"))
    for index in range(0, connective):
        if tl.load(program + index * NUMBERS + 3) == connective:
            counts = _count_others(program, connective, index, one, other, slot)
            exactly = tl.where(slot == index, _at(counts, j, wanted - 1), exactly)
    return exactly


@triton.jit
def differentiate(program, length, good, bad, slot, parent):
    """The slopes at all slots, from the values of all."""
    log_size, of_bad, falls = tl.zeros_like(good), tl.zeros_like(slot), tl.zeros_like(slot)
    for back in range(0, length):
        i = length - 1 - back
        which = tl.load(program + i * NUMBERS)
        if which != PROPERTY:
            operand, least = tl.load(program + i * NUMBERS + 1), tl.load(program + i * NUMBERS + 2)
            part = parent == i
            p, q = _at(good, slot, i), _at(bad, slot, i)
            size, side, falling = _at(log_size, slot, i), _at(of_bad, slot, i), _at(falls, slot, i)
            to_parts = tl.where(part, size, log_size)
            to_side = side
            if which == ALL:
                to_parts = tl.where(part, tl.where(side == 1, _log_quotient(size + p, q), size), log_size)
                to_side = side * 0
            elif which == ANY:
                to_parts = tl.where(part, tl.where(side == 1, size, _log_quotient(size + q, p)), log_size)
                to_side = side * 0 + 1
            elif which == AT_LEAST:
                exactly = _exactly_fewer(program, i, operand, least, good, bad, slot, parent)
                share = _log_quotient(
                    size + exactly + tl.where(side == 1, bad, good), tl.where(side == 1, q, p)
                )
                to_parts = tl.where(part, share, log_size)
            elif which == NOT:
                to_side = 1 - side
                falling = 1 - falling
            else:
                chosen = _weakest(good, bad, part, slot)
                to_parts = tl.where(part & (slot != chosen), -float("inf"), to_parts)
            log_size = to_parts
            of_bad, falls = tl.where(part, to_side, of_bad), tl.where(part, falling, falls)
    return Slopes(log_size=log_size, of_bad=of_bad, falls=falls)


@triton.jit
def gradients(judged, slopes):
    """d u / dz and d u / dw of the properties."""
    p = judged.weighted
    log_size = tl.where(slopes.of_bad == 1, _log_quotient(slopes.log_size + p.good, p.bad), slopes.log_size)
    nothing = log_size == -float("inf")
    sign = tl.where(slopes.falls == 1, -1.0, 1.0).to(tl.float64)
    to_z = sign * tl.exp(log_size + judged.log_slope)
    to_weight = -sign * tl.exp(log_size + _log_minus_log(judged.unweighted))
    return tl.where(nothing, 0.0, to_z), tl.where(nothing, 0.0, to_weight)
