"""Which position of a sequence counts, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

IGNORE_INDEX = tl.constexpr(-100)
NOWHERE = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)

SCAN = tl.constexpr(1024)
"""Mask entries looked at together."""

PLACEMENTS = ("last", "eos_plus_one", "before_last", "index")
LAST, EOS_PLUS_ONE, BEFORE_LAST, INDEX = (tl.constexpr(placement) for placement in range(4))


@triton.jit
def counted_at(mask, step, actions, position, inside):
    """Whether a sequence's positions count: by its mask, and by an action that is not left out. None counts all."""
    counted = inside
    if mask is not None:
        value = tl.load(mask + position * step, mask=inside, other=0)
        if mask.dtype.element_ty == tl.bfloat16:  # the interpreter takes the bits of -0 for a number
            value = value.to(tl.float32)
        counted = counted & (value != 0)
    if actions is not None:
        counted = counted & (tl.load(actions + position, mask=inside, other=0) != IGNORE_INDEX)
    return counted


@triton.jit
def last_counted(mask, step, actions, length):
    """The last position before ``length`` that counts, NOWHERE if there is none: looked for from the end."""
    last = tl.full((), 0, tl.int64) + length - 1
    if mask is not None or actions is not None:
        block = last // SCAN
        last = tl.full((), NOWHERE, tl.int64)
        while (block >= 0) & (last < 0) & (length > 0):
            position = block * SCAN + tl.arange(0, SCAN)
            counted = counted_at(mask, step, actions, position, position < length)
            last = tl.max(tl.where(counted, position, NOWHERE), 0)
            block -= 1
    return last


@triton.jit
def placed(mask, step, actions, index, length, PLACEMENT: tl.constexpr):
    """Where a sequence's utility goes: NOWHERE if nothing of it counts, OUTSIDE if ``index`` is not in [0, length)."""
    last = last_counted(mask, step, actions, length)
    place = last
    if PLACEMENT == EOS_PLUS_ONE:
        place = tl.minimum(last + 1, length - 1)
    elif PLACEMENT == BEFORE_LAST:
        before = last_counted(mask, step, actions, last)
        place = tl.where(before < 0, last, before)
    elif PLACEMENT == INDEX:
        index = index.to(tl.int64)
        place = tl.where((index < 0) | (index >= length), OUTSIDE, index)
    return tl.where(last < 0, NOWHERE, place)
