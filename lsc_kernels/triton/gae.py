"""gae in Triton: a scan of affine maps, so that no sequence is serial. In fp64: the op waits for memory.

What a position passes to the one before it is U_t = c R_t + k V_t with R_t = r_t + U_{t+1}, in the letters of the
eager definition. So a counted position is the map U -> c U + (c r + k V), a hole is U -> 1, c or 0 times U, and maps
compose. The gradients run the same way forwards, over G -> c G + g.

A tile is scanned by all threads of a program, and the tiles of a chunk follow one another. A sequence is cut from its
first token on, whatever lies beside it. One program takes the chunks of a sequence in turn. Where sequences are few and
long, a program takes one chunk, in two launches: the first writes each chunk's map, the second applies those beyond its
own chunk, in order. Both ways run the same code of the same compilation, and give the same bits. 9 bytes a position are
read, in fp32, and 8 written; in two launches the reads are done twice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.gae import HOLES, GaeOptions
from lsc_kernels.eager.reward_head import check_segments
from lsc_kernels.triton._launch import dense, launch, operator
from lsc_kernels.triton.positions import counted_at, last_counted
from lsc_kernels.triton.token_rewards import one_stride, two_strides

BLOCK = 512
"""Positions of a tile, 2 for each of WARPS * 32 threads: the scan of 4 already takes twice the registers."""

WARPS = 8

TILES = 8
"""Tiles of a chunk. Like BLOCK it decides what is summed first: not to be tuned by shape."""

SPLIT_BELOW = 512
"""With fewer sequences than this, each of a sequence's chunks has a program of its own."""

SKIP, ZERO, CUT = (tl.constexpr(way) for way in range(3))
WHOLE, PART, APPLY = (tl.constexpr(phase) for phase in range(3))
"""A program takes all chunks of a sequence; writes the map of one; applies the maps beyond and then its own."""

SMALLEST = tl.constexpr(2.0**-1022)
STARTS = tl.constexpr(SPLIT_BELOW)


class Own(NamedTuple):
    """A program's sequence, and the chunks [first, last] of it that are the program's."""

    sequence: tl.tensor
    start: tl.tensor  # of the sequence, in tokens
    length: tl.tensor
    part: tl.tensor  # where the maps of its chunks are
    chunks: tl.tensor
    first: tl.tensor
    last: tl.tensor


@triton.jit
def applied(factor, total, x):
    """factor x + total; a factor of 0 takes nothing, not even NaN."""
    return total + tl.where(factor == 0, 0.0, factor * x)


@triton.jit
def composed(inner_factor, inner_total, factor, total):
    """First the inner map, then the other. A product that underflows still takes NaN."""
    both = tl.maximum(factor * inner_factor, SMALLEST)
    both = tl.where((factor == 0) | (inner_factor == 0), 0.0, both)
    return both, applied(factor, total, inner_total)


@triton.jit
def _bound(bounds, step, place, sequences, tokens):
    """Where sequence ``place`` begins: never outside the tokens, and all of them are some sequence's."""
    bound = tl.load(bounds + place * step, mask=place < sequences, other=0).to(tl.int64)
    bound = tl.minimum(tl.maximum(bound, 0), tokens)
    return tl.where(place == 0, 0, tl.where(place >= sequences, tokens, bound))


@triton.jit
def _own(bounds, bounds_step, sequences, tokens, phase, CHUNK: tl.constexpr):
    """``tokens`` is N of packed sequences, T of padded ones."""
    program = tl.program_id(0).to(tl.int64)
    if bounds is None:
        length = tokens
        chunks = tl.maximum((length + CHUNK - 1) // CHUNK, 1)
        sequence = tl.where(phase == WHOLE, program, program // chunks)
        start = sequence * length
        part = sequence * chunks
    else:
        # the maps of sequence b begin at start // CHUNK + b, which leaves each room enough
        sequence = program
        if phase != WHOLE:
            places = tl.arange(0, STARTS).to(tl.int64)
            starts = _bound(bounds, bounds_step, places, sequences, tokens)
            begun = (places < sequences) & (starts // CHUNK + places <= program)
            sequence = tl.maximum(tl.sum(begun.to(tl.int64), 0) - 1, 0)
        start = _bound(bounds, bounds_step, sequence, sequences, tokens)
        length = tl.maximum(_bound(bounds, bounds_step, sequence + 1, sequences, tokens) - start, 0)
        chunks = tl.maximum((length + CHUNK - 1) // CHUNK, 1)
        part = start // CHUNK + sequence
    first = tl.where(phase == WHOLE, 0, program - part)
    # a place for a map that no chunk has: nothing to do
    last = tl.where(phase == WHOLE, chunks - 1, tl.where(first < chunks, first, first - 1))
    return Own(
        sequence=sequence, start=start, length=length, part=part, chunks=chunks, first=first, last=last
    )


@triton.jit
def _tiles(own, chunk, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The tiles of a chunk: the first, and the one after the last. A sequence has one at least."""
    all_tiles = tl.maximum((own.length + BLOCK - 1) // BLOCK, 1)
    return chunk * TILES, tl.minimum((chunk + 1) * TILES, all_tiles)


@triton.jit
def _exact(number):
    return tl.full((), number, tl.float64)  # the interpreter has it as a float, which it takes for fp32


@triton.jit
def _own_mask(mask, mask_row, mask_step, bounds, own):
    if mask is None:
        return mask
    elif bounds is None:
        return mask + own.sequence * mask_row
    else:
        return mask + own.start * mask_step


@triton.jit
def _end(mask, mask_step, own, HOLES: tl.constexpr, LEAVES: tl.constexpr):
    """The position after which nothing is a step: what lies beyond the last counted one is no hole.

    It matters only where something enters or LEAVES the sequence at its end.
    """
    end = own.length - 1
    if LEAVES and HOLES != SKIP:
        end = last_counted(mask, mask_step, None, own.length)
    return end


@triton.jit
def _factors(counted, inner, of_return, HOLES: tl.constexpr):
    """What each position takes of what it is passed; all of it where the sequence has ended."""
    if HOLES == ZERO:
        factor = tl.where(inner, of_return, 1.0)
    elif HOLES == CUT:
        factor = tl.where(counted, of_return, tl.where(inner, 0.0, 1.0))
    else:
        factor = tl.where(counted, of_return, 1.0)
    return factor.to(tl.float64)


@triton.jit
def _moved(data, by):
    if data is None:
        return data
    else:
        return data + by


@triton.jit
def _within(number, BLOCK: tl.constexpr):
    """A number of positions, as far as a tile goes: vectors of places are 32 bits wide, and spare registers."""
    return tl.minimum(tl.maximum(number, 0), BLOCK).to(tl.int32)


@triton.jit
def _at(data, begin, index, counted):
    """In fp64; 0 where there is nothing, or it is not counted."""
    value = tl.zeros(index.shape, tl.float64)
    if data is not None:
        value = tl.load(data + begin + index, mask=counted, other=0.0).to(tl.float64)
    return value


@triton.jit
def _pick(values, index, place):
    """values[place], as a scalar; 0 if it is not there."""
    return tl.sum(tl.where(index == place, values, 0.0), 0)


_NUMBERS = ("mask_row", "mask_step", "bootstrap_step", "bounds_step", "sequences", "tokens", "phase")
_DATA = (
    "rewards", "values", "mask", "bootstrap", "bounds", "advantages", "returns", "parts", "to_advantages",
    "to_returns", "to_rewards", "to_values", "to_bootstrap",
)  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_DATA)
def _forward_kernel(
    rewards, values, mask, mask_row: tl.int64, mask_step: tl.int64, bootstrap, bootstrap_step: tl.int64,
    bounds, bounds_step: tl.int64, sequences: tl.int64, tokens: tl.int64, advantages, returns, parts,
    phase: tl.int32, gamma: tl.float64, of_return: tl.float64, of_value: tl.float64,
    HOLES: tl.constexpr, TAKES_RETURN: tl.constexpr, TAKES_VALUE: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    gamma, of_return, of_value = _exact(gamma), _exact(of_return), _exact(of_value)
    own = _own(bounds, bounds_step, sequences, tokens, phase, BLOCK * TILES)
    mask = _own_mask(mask, mask_row, mask_step, bounds, own)
    end = _end(mask, mask_step, own, HOLES, bootstrap is not None)
    entered = _exact(0.0)
    if bootstrap is not None:
        entered = applied(gamma, entered, tl.load(bootstrap + own.sequence * bootstrap_step).to(tl.float64))
    if phase == APPLY:
        chunk = own.chunks - 1
        while chunk > own.last:
            at = parts + 2 * (own.part + chunk)
            entered = applied(tl.load(at), tl.load(at + 1), entered)
            chunk -= 1
    index = tl.arange(0, BLOCK)
    chunk = own.last
    while chunk >= own.first:
        chunk_factor, chunk_total = _exact(1.0), _exact(0.0)
        begin, stop = _tiles(own, chunk, BLOCK, TILES)
        tile = stop - 1
        while tile >= begin:
            here = tile * BLOCK
            # the maps of the positions after each, so that the scan leaves at each what it is passed
            inner = index < _within(end - here, BLOCK)
            counted = counted_at(_moved(mask, (here + 1) * mask_step), mask_step, None, index, inner)
            total = tl.zeros([BLOCK], tl.float64)
            if TAKES_RETURN:
                total += of_return * _at(rewards, own.start + here + 1, index, counted)
            if TAKES_VALUE:
                total += of_value * _at(values, own.start + here + 1, index, counted)
            factor = _factors(counted, inner, of_return, HOLES)
            factor, total = tl.associative_scan((factor, total), 0, composed, reverse=True)
            if phase != PART:
                passed = applied(factor, total, applied(chunk_factor, chunk_total, entered))
                inside = index < _within(own.length - here, BLOCK)
                counted = counted_at(_moved(mask, here * mask_step), mask_step, None, index, inside)
                result = tl.where(counted, _at(rewards, own.start + here, index, counted) + passed, 0.0)
                tl.store(returns + (own.start + here) + index, result.to(tl.float32), mask=inside)
                if advantages is not None:
                    result -= _at(values, own.start + here, index, counted)
                    tl.store(advantages + (own.start + here) + index, result.to(tl.float32), mask=inside)
            chunk_factor, chunk_total = composed(
                chunk_factor, chunk_total, _pick(factor, index, 0), _pick(total, index, 0)
            )
            tile -= 1
        entered = applied(chunk_factor, chunk_total, entered)
        if phase == PART:
            at = parts + 2 * (own.part + chunk)
            tl.store(at, chunk_factor)
            tl.store(at + 1, chunk_total)
        chunk -= 1


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_DATA)
def _backward_kernel(
    to_advantages, to_returns, mask, mask_row: tl.int64, mask_step: tl.int64,
    bounds, bounds_step: tl.int64, sequences: tl.int64, tokens: tl.int64,
    to_rewards, to_values, to_bootstrap, parts,
    phase: tl.int32, gamma: tl.float64, of_return: tl.float64, of_value: tl.float64,
    HOLES: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    gamma, of_return, of_value = _exact(gamma), _exact(of_return), _exact(of_value)
    own = _own(bounds, bounds_step, sequences, tokens, phase, BLOCK * TILES)
    mask = _own_mask(mask, mask_row, mask_step, bounds, own)
    end = _end(mask, mask_step, own, HOLES, to_bootstrap is not None)
    entered = _exact(0.0)
    chunk = tl.full((), 0, tl.int64)
    if phase == APPLY:
        while chunk < own.first:
            at = parts + 2 * (own.part + chunk)
            entered = applied(tl.load(at), tl.load(at + 1), entered)
            chunk += 1
    index = tl.arange(0, BLOCK)
    chunk = own.first
    while chunk <= own.last:
        chunk_factor, chunk_total = _exact(1.0), _exact(0.0)
        tile, stop = _tiles(own, chunk, BLOCK, TILES)
        while tile < stop:
            here = tile * BLOCK
            # the maps of the positions before each
            inner = (index < _within(end + 2 - here, BLOCK)) & ((index > 0) | (tile > 0))
            counted = counted_at(_moved(mask, (here - 1) * mask_step), mask_step, None, index, inner)
            total = _at(to_advantages, own.start + here - 1, index, counted)
            total += _at(to_returns, own.start + here - 1, index, counted)
            factor = _factors(counted, inner, of_return, HOLES)
            factor, total = tl.associative_scan((factor, total), 0, composed)
            if phase != PART:
                carried = applied(factor, total, applied(chunk_factor, chunk_total, entered))
                inside = index < _within(own.length - here, BLOCK)
                counted = counted_at(_moved(mask, here * mask_step), mask_step, None, index, inside)
                to_advantage = _at(to_advantages, own.start + here, index, counted)
                upstream = to_advantage + _at(to_returns, own.start + here, index, counted)
                inner = index < _within(end + 1 - here, BLOCK)
                left = applied(_factors(counted, inner, of_return, HOLES), upstream, carried)
                to_reward = tl.where(counted, left, 0.0).to(tl.float32)
                tl.store(to_rewards + (own.start + here) + index, to_reward, mask=inside)
                if to_values is not None:
                    to_value = tl.where(counted, applied(of_value, -to_advantage, carried), 0.0)
                    tl.store(to_values + (own.start + here) + index, to_value.to(tl.float32), mask=inside)
                if to_bootstrap is not None:
                    if here + BLOCK >= own.length:
                        to_end = applied(gamma, 0.0, _pick(left, index, own.length - 1 - here))
                        tl.store(to_bootstrap + own.sequence, to_end.to(tl.float32))
            chunk_factor, chunk_total = composed(
                chunk_factor, chunk_total, _pick(factor, index, BLOCK - 1), _pick(total, index, BLOCK - 1)
            )
            tile += 1
        entered = applied(chunk_factor, chunk_total, entered)
        if phase == PART:
            at = parts + 2 * (own.part + chunk)
            tl.store(at, chunk_factor)
            tl.store(at + 1, chunk_total)
        chunk += 1


def _run(
    kernel: Any, given: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, numbers: tuple[Any, ...],
    inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...], **meta: Any,
) -> None:  # fmt: skip
    """One launch, or where sequences are few and long two."""
    chunk = BLOCK * TILES
    if cu_seqlens is None:
        sequences, tokens = given.shape
        chunks = sequences * triton.cdiv(tokens, chunk)
        own_mask = two_strides(mask)
    else:
        check_segments(cu_seqlens, given.shape[0], "the tokens of rewards")
        sequences, tokens = cu_seqlens.shape[0] - 1, given.shape[0]
        chunks = tokens // chunk + sequences
        own_mask = (None, 0, 0) if mask is None else (mask, 0, *mask.stride())
    split = sequences < SPLIT_BELOW and tokens > chunk
    parts = given.new_empty(2 * chunks if split else 0, dtype=torch.float64)
    for phase in (PART, APPLY) if split else (WHOLE,):
        launch(
            kernel, (chunks if split else sequences,), given.device, *inputs[:2], *own_mask, *inputs[2:],
            *one_stride(cu_seqlens), sequences, tokens, *outputs, parts, phase.value, *numbers,
            BLOCK=BLOCK, TILES=TILES, num_warps=WARPS, **meta,
        )  # fmt: skip


_OPTIONS = "float gamma, float lam, int holes"


def _numbers(gamma: float, lam: float) -> tuple[float, float, float]:
    options = GaeOptions(gamma, lam, HOLES[0])
    return gamma, options.of_return, options.of_value


def _fake_forward(rewards: Tensor, values: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    returns = rewards.new_empty(rewards.shape, dtype=torch.float32)
    return returns.new_empty(0 if values is None else rewards.shape), returns


@operator(
    "gae_forward(Tensor rewards, Tensor? values, Tensor? mask, Tensor? bootstrap, Tensor? cu_seqlens,"
    f" {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    holes: int,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _fake_forward(rewards, values)
    numbers = _numbers(gamma, lam)
    _run(
        _forward_kernel, rewards, mask, cu_seqlens, numbers,
        (rewards.contiguous(), dense(values), *one_stride(bootstrap)),
        (None if values is None else advantages, returns),
        HOLES=holes, TAKES_RETURN=numbers[1] != 0.0, TAKES_VALUE=numbers[2] != 0.0,
    )  # fmt: skip
    return advantages, returns


def _fake_backward(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    given = to_advantages if to_advantages is not None else to_returns
    assert given is not None
    to_values = given.new_empty(given.shape if options[-1] else 0)
    return (
        given.new_empty(given.shape),
        to_values,
        given.new_empty(0 if bootstrap is None else bootstrap.shape),
    )


@operator(
    "gae_backward(Tensor? to_advantages, Tensor? to_returns, Tensor? mask, Tensor? cu_seqlens, Tensor? bootstrap,"
    f" {_OPTIONS}, bool want_values) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
def _backward(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    holes: int,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _fake_backward(to_advantages, to_returns, mask, cu_seqlens, bootstrap, want_values)
    to_rewards, to_values, to_bootstrap = gradients
    _run(
        _backward_kernel, to_rewards, mask, cu_seqlens, _numbers(gamma, lam),
        (dense(to_advantages), dense(to_returns)),
        (to_rewards, to_values if want_values else None, None if bootstrap is None else to_bootstrap),
        HOLES=holes,
    )  # fmt: skip
    return gradients


_ops = torch.ops.lsc_kernels_triton


def arguments(options: GaeOptions) -> tuple[float, float, int]:
    """Options as the ops take them."""
    return options.gamma, options.lam, HOLES.index(options.holes)


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor]:
    advantages, returns = _ops.gae_forward(rewards, values, mask, bootstrap, cu_seqlens, *arguments(options))
    return advantages, returns


def backward(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    to_rewards, to_values, to_bootstrap = _ops.gae_backward(
        to_advantages, to_returns, mask, cu_seqlens, bootstrap, *arguments(options), True
    )
    return to_rewards, to_values, None if bootstrap is None else to_bootstrap
