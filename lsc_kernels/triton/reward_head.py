"""reward_head in Triton: a few dot products per row that is read, and nothing else of hidden is touched.

Forward: a program per sequence (per position with ``every``) finds its row and multiplies it with 8 weights at a
time; sums run in fp32 down the lanes of a tile, and meet in fp64. Backward to hidden: a program per row of hidden
writes its gradient, 0 for the rows that were not read. Backward to weight and bias: a program owns columns of H and
goes through a part of the sequences in order; the parts, cut by their number alone, are added afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.reward_head import check_inside, check_segments
from lsc_kernels.triton._launch import launch, operator
from lsc_kernels.triton.positions import NOWHERE, last_counted
from lsc_kernels.triton.token_kl import rows_of
from lsc_kernels.triton.token_rewards import one_stride, two_strides
from lsc_kernels.triton.token_rows import narrow

WIDTH = 512
"""Columns of hidden read together, 4 for each of 128 threads, times 8 weights: 32 registers of sums."""

WEIGHTS = 8

ROWS_PER_PART = 64
MOST_PARTS = 64

EVERY, BY_INDEX, BY_MASK, BY_SEGMENT, AT_END = (tl.constexpr(pool) for pool in range(5))

_NUMBERS = (
    "outer_stride", "inner_stride", "column_stride", "length", "mask_row", "mask_step", "index_stride",
    "segment_stride", "outputs", "rows_per_part", "weight_row", "weight_column", "bias_stride", "grad_row",
    "grad_column",
)  # fmt: skip
_DATA = (
    "hidden",
    "mask",
    "index",
    "segments",
    "weight",
    "bias",
    "scores",
    "grad",
    "to_hidden",
    "to_weight",
    "to_bias",
)


@triton.jit
def scored_position(
    sequence,
    mask,
    mask_row,
    mask_step,
    index,
    index_stride,
    segments,
    segment_stride,
    length,
    POOL: tl.constexpr,
):
    """The row of [outer, inner] that a sequence is scored at, as (outer, inner); inner is NOWHERE if there is none."""
    outer, inner = sequence, length - 1
    if POOL == BY_INDEX:
        inner = tl.load(index + sequence * index_stride).to(tl.int64)
        inner = tl.where((inner >= 0) & (inner < length), inner, NOWHERE)
    elif POOL == BY_MASK:
        inner = last_counted(mask + sequence * mask_row, mask_step, None, length)
    elif POOL == BY_SEGMENT:
        begin = tl.load(segments + sequence * segment_stride).to(tl.int64)
        end = tl.load(segments + (sequence + 1) * segment_stride).to(tl.int64)
        outer = sequence * 0
        inner = tl.where((begin >= 0) & (begin < end) & (end <= length), end - 1, NOWHERE)
    elif POOL == EVERY:
        outer, inner = sequence // length, sequence % length
        if mask is not None:
            counted = tl.load(mask + outer * mask_row + inner * mask_step) != 0
            inner = tl.where(counted, inner, NOWHERE)
    return outer, inner


@triton.jit
def dot_products(
    row, column_stride, width, weight, weight_row, weight_column, bias, bias_stride, property_, known,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A row times the weights of the properties that are ``known``, plus their bias, in fp64."""
    sums = tl.zeros([property_.shape[0], WIDTH], tl.float32)
    for first in range(0, width, WIDTH):
        column = (first + tl.arange(0, WIDTH)).to(tl.int64)
        inside = column < width
        hidden = tl.load(row + column * column_stride, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(
            weight + property_[:, None] * weight_row + column[None, :] * weight_column,
            mask=known[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        sums = tl.fma(factor, tl.broadcast_to(hidden[None, :], factor.shape), sums)
    scores = tl.sum(sums.to(tl.float64), 1)
    if bias is not None:
        scores += tl.load(bias + property_ * bias_stride, mask=known, other=0.0).to(tl.float64)
    return scores


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_DATA)
def _forward_kernel(
    hidden, outer_stride: tl.int64, inner_stride: tl.int64, column_stride: tl.int64, length: tl.int64, width,
    mask, mask_row: tl.int64, mask_step: tl.int64, index, index_stride: tl.int64, segments, segment_stride: tl.int64,
    weight, weight_row: tl.int64, weight_column: tl.int64, bias, bias_stride: tl.int64, scores, properties,
    POOL: tl.constexpr, WEIGHTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    outer, inner = scored_position(
        sequence, mask, mask_row, mask_step, index, index_stride, segments, segment_stride, length, POOL
    )
    for first in range(0, properties, WEIGHTS):
        property_ = (first + tl.arange(0, WEIGHTS)).to(tl.int64)
        known = property_ < properties
        values = tl.full([WEIGHTS], 0.0 if POOL == EVERY else float("nan"), tl.float64)
        if inner >= 0:
            row = hidden + outer * outer_stride + inner * inner_stride
            values = dot_products(
                row, column_stride, width, weight, weight_row, weight_column, bias, bias_stride, property_, known,
                WIDTH,
            )  # fmt: skip
        tl.store(scores + sequence * properties + property_, values.to(tl.float32), mask=known)


@triton.jit
def _sequence_of(
    outer, inner, mask, mask_row, mask_step, index, index_stride, segments, segment_stride, length, outputs,
    POOL: tl.constexpr,
):  # fmt: skip
    """The sequence that is scored at row (outer, inner), NOWHERE if there is none."""
    if POOL == BY_SEGMENT:
        found = tl.full((), NOWHERE, tl.int64)
        for first in range(0, outputs, 1024):
            sequence = first + tl.arange(0, 1024).to(tl.int64)
            inside = sequence < outputs
            begin = tl.load(segments + sequence * segment_stride, mask=inside, other=0)
            end = tl.load(segments + (sequence + 1) * segment_stride, mask=inside, other=0)
            found = tl.maximum(
                found, tl.max(tl.where(inside & (begin < end) & (end == inner + 1), sequence, NOWHERE), 0)
            )
        return found
    else:
        sequence = outer * length + inner if POOL == EVERY else outer
        _, place = scored_position(
            sequence, mask, mask_row, mask_step, index, index_stride, segments, segment_stride, length, POOL
        )
        return tl.where(place == inner, sequence, NOWHERE)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_DATA)
def _to_hidden_kernel(
    grad, grad_row: tl.int64, grad_column: tl.int64, length: tl.int64, width,
    mask, mask_row: tl.int64, mask_step: tl.int64, index, index_stride: tl.int64, segments, segment_stride: tl.int64,
    weight, weight_row: tl.int64, weight_column: tl.int64, to_hidden, properties, outputs: tl.int64,
    POOL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence = _sequence_of(
        row // length, row % length, mask, mask_row, mask_step, index, index_stride, segments, segment_stride,
        length, outputs, POOL,
    )  # fmt: skip
    for first in range(0, width, WIDTH):
        column = (first + tl.arange(0, WIDTH)).to(tl.int64)
        inside = column < width
        gradient = tl.zeros([WIDTH], tl.float32)
        if sequence >= 0:
            for property_ in range(properties):
                upstream = tl.load(grad + sequence * grad_row + property_ * grad_column).to(tl.float32)
                factor = tl.load(
                    weight + property_ * weight_row + column * weight_column, mask=inside, other=0.0
                ).to(tl.float32)
                gradient += upstream * factor
        tl.store(to_hidden + row * width + column, narrow(gradient, to_hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_DATA)
def _to_weight_kernel(
    grad, grad_row: tl.int64, grad_column: tl.int64,
    hidden, outer_stride: tl.int64, inner_stride: tl.int64, column_stride: tl.int64, length: tl.int64, width,
    mask, mask_row: tl.int64, mask_step: tl.int64, index, index_stride: tl.int64, segments, segment_stride: tl.int64,
    to_weight, to_bias, properties, outputs: tl.int64, rows_per_part: tl.int64,
    POOL: tl.constexpr, WEIGHTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (columns, properties, part). The part of the bias comes from the first columns' program."""
    column = (tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)
    property_ = (tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    inside, known = column < width, property_ < properties
    sums, biases = tl.zeros([WEIGHTS, WIDTH], tl.float64), tl.zeros([WEIGHTS], tl.float64)
    for sequence in range(part * rows_per_part, tl.minimum((part + 1) * rows_per_part, outputs)):
        outer, inner = scored_position(
            sequence, mask, mask_row, mask_step, index, index_stride, segments, segment_stride, length, POOL
        )
        upstream = tl.load(grad + sequence * grad_row + property_ * grad_column, mask=known, other=0.0).to(
            tl.float32
        )
        asked = tl.max(tl.where(upstream == 0, 0, 1), 0) > 0
        if (inner >= 0) & asked:  # a row without upstream gradient counts for nothing, even if it holds NaN
            row = hidden + outer * outer_stride + inner * inner_stride
            own = tl.load(row + column * column_stride, mask=inside, other=0.0).to(tl.float32)
            sums += (upstream[:, None] * own[None, :]).to(tl.float64)
            biases += upstream.to(tl.float64)
    if to_weight is not None:
        cell = (part * properties + property_[:, None]) * width + column[None, :]
        tl.store(to_weight + cell, sums, mask=known[:, None] & inside[None, :])
    if to_bias is not None:
        if tl.program_id(0) == 0:
            tl.store(to_bias + part * properties + property_, biases, mask=known)


def pooling(mask: Tensor | None, index: Tensor | None, segments: Tensor | None, every: bool) -> int:
    """The rule that says which rows are read, as kernels know it. ``index`` decides even beside a mask."""
    rules = (every, index is not None, mask is not None, segments is not None)
    return rules.index(True) if True in rules else AT_END.value


def positions(
    hidden: Tensor, mask: Tensor | None, index: Tensor | None, segments: Tensor | None, every: bool
) -> tuple[Any, ...]:
    """What says which rows are read, as kernels take it."""
    own_mask = mask if mask is None or mask.dim() == 2 else mask.reshape(1, -1)
    if every and mask is not None:
        own_mask = mask.reshape(rows_of(hidden).shape[:2])
    return *two_strides(own_mask), *one_stride(index), *one_stride(segments)


def check_positions(hidden: Tensor, index: Tensor | None, segments: Tensor | None) -> None:
    if index is not None:
        check_inside(index, hidden.shape[1])
    if segments is not None:
        check_segments(segments, hidden.shape[0], "the rows of hidden")


def tile(properties: int) -> dict[str, int]:
    return {"WEIGHTS": min(triton.next_power_of_2(max(properties, 1)), WEIGHTS), "WIDTH": WIDTH}


def _new_scores(
    hidden: Tensor, weight: Tensor, bias: Any, mask: Any, index: Any, segments: Any, every: bool
) -> Tensor:
    if every:
        outputs = hidden.shape[:-1]
    else:
        outputs = torch.Size((hidden.shape[0] if segments is None else segments.shape[0] - 1,))
    return hidden.new_empty((*outputs, weight.shape[0]), dtype=torch.float32)


@operator(
    "reward_head_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? attention_mask, Tensor? index,"
    " Tensor? cu_seqlens, bool every) -> Tensor",
    _new_scores,
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    segments: Tensor | None,
    every: bool,
) -> Tensor:
    check_positions(hidden, index, segments)
    scores = _new_scores(hidden, weight, bias, mask, index, segments, every)
    rows, properties = rows_of(hidden), weight.shape[0]
    launch(
        _forward_kernel, (scores.numel() // max(properties, 1),), hidden.device, rows, *rows.stride(), rows.shape[1],
        rows.shape[2], *positions(hidden, mask, index, segments, every), weight, *weight.stride(), *one_stride(bias),
        scores, properties, pooling(mask, index, segments, every), **tile(properties),
    )  # fmt: skip
    return scores


def _fake_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    want_hidden, want_weight, want_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if want_hidden else (0,)),
        weight.new_empty(weight.shape if want_weight else (0,)),
        weight.new_empty(weight.shape[:1] if want_bias else (0,), dtype=torch.float32),
    )


@operator(
    "reward_head_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? attention_mask, Tensor? index,"
    " Tensor? cu_seqlens, bool every, bool want_hidden, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
)
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    segments: Tensor | None,
    every: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    to_hidden, to_weight, to_bias = _fake_gradients(grad, hidden, weight, want_hidden, want_weight, want_bias)
    rows, (properties, width) = rows_of(hidden), weight.shape
    upstream = grad.reshape(-1, properties) if properties else grad.reshape(0, 0)
    pool = pooling(mask, index, segments, every)
    where = positions(hidden, mask, index, segments, every)
    outputs = upstream.shape[0]
    if want_hidden:
        launch(
            _to_hidden_kernel, (rows.shape[0] * rows.shape[1],), hidden.device, *two_strides(upstream), rows.shape[1],
            width, *where, weight, *weight.stride(), to_hidden, properties, outputs, pool, WIDTH=WIDTH,
        )  # fmt: skip
    if want_weight or want_bias:
        block = tile(properties)["WEIGHTS"]
        rows_per_part = max(ROWS_PER_PART, triton.cdiv(outputs, MOST_PARTS))
        parts = triton.cdiv(outputs, rows_per_part)
        weights = hidden.new_empty((parts, properties, width), dtype=torch.float64) if want_weight else None
        biases = hidden.new_empty((parts, properties), dtype=torch.float64) if want_bias else None
        grid = (max(1, triton.cdiv(width, 128)), triton.cdiv(properties, block), parts)
        launch(
            _to_weight_kernel, grid, hidden.device, *two_strides(upstream), rows, *rows.stride(), rows.shape[1],
            width, *where, weights, biases, properties, outputs, rows_per_part, pool, WEIGHTS=block, WIDTH=128,
        )  # fmt: skip
        if weights is not None:
            to_weight = weights.sum(0).to(weight.dtype)
        if biases is not None:
            to_bias = biases.sum(0).float()
    return to_hidden, to_weight, to_bias


_ops = torch.ops.lsc_kernels_triton


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
) -> Tensor:
    result: Tensor = _ops.reward_head_forward(hidden, weight, bias, attention_mask, index, cu_seqlens, every)
    return result


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_hidden, to_weight, to_bias = _ops.reward_head_backward(
        *(grad, hidden, weight, attention_mask, index, cu_seqlens, every, want_hidden, want_weight, want_bias)
    )
    return (
        to_hidden if want_hidden else None,
        to_weight if want_weight else None,
        to_bias if want_bias else None,
    )
