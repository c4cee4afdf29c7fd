"""aggregate_rewards in Triton: a program sums the properties of a block of rows, in fp64 and in order of the columns.

With a formula, a program takes one row: see ``aggregate_formula.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.lsc_transform import reduced
from lsc_kernels.triton import aggregate_formula
from lsc_kernels.triton._launch import block, launch, operator, per_row
from lsc_kernels.triton.log_sigmoid import Operand, centred, operand_at, utility
from lsc_kernels.triton.lsc_transform import (
    has_floor,
    joined,
    operand,
    rows_and_columns,
    split,
    wanted_like,
    write_gradients,
)

BLOCK = block(512)
"""Scores a program holds: rows times columns. With a weight and a floor a score takes about 20 registers."""

MOST_COLUMNS = 512

_STRIDES = tuple(
    f"{name}_{stride}"
    for name in ("score", "reference", "scale", "floor", "weight")
    for stride in ("row", "column")
)
_DATA = ("grad", "scores", "reference", "scale", "floor", "weights", "utilities")


@triton.jit
def judged(
    score,
    reference,
    scale,
    floor,
    weight,
    row,
    column,
    inside,
    IGNORE_MISSING: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):
    """z, u, du/dz, weight and scale of the scores at (row, column); nothing comes of a missing score to ignore."""
    divisor = operand_at(scale, row, column, inside)
    z = centred(score, operand_at(reference, row, column, inside), divisor)
    value, slope = utility(z, operand_at(floor, row, column, inside), HAS_FLOOR)
    if IGNORE_MISSING:
        value, slope = tl.where(score != score, 0.0, value), tl.where(score != score, 0.0, slope)
    return z, value, slope, operand_at(weight, row, column, inside), divisor


@triton.jit
def weighed(value, weight, inside):
    """Nothing at all comes of a property with weight 0."""
    return tl.where(inside & (weight != 0), weight * value.to(tl.float64), 0.0)


@triton.jit(do_not_specialize=("grad_stride", "rows", *_STRIDES), do_not_specialize_on_alignment=_DATA)
def _kernel(
    grad, grad_stride: tl.int64, scores, score_row: tl.int64, score_column: tl.int64,
    reference, reference_row: tl.int64, reference_column: tl.int64, reference_number: tl.float64,
    scale, scale_row: tl.int64, scale_column: tl.int64, scale_number: tl.float64,
    floor, floor_row: tl.int64, floor_column: tl.int64, floor_number: tl.float64,
    weights, weight_row: tl.int64, weight_column: tl.int64, weight_number: tl.float64,
    utilities, to_scores, to_reference, to_scale, to_weights, columns, rows: tl.int64,
    IGNORE_MISSING: tl.constexpr, HAS_FLOOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Forward where ``utilities`` is given, else backward."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = Operand(reference, reference_row, reference_column, reference_number)
    s = Operand(scale, scale_row, scale_column, scale_number)
    f = Operand(floor, floor_row, floor_column, floor_number)
    w = Operand(weights, weight_row, weight_column, weight_number)
    total = tl.zeros([ROWS], tl.float64)
    upstream = tl.zeros([ROWS], tl.float64)
    if grad is not None:
        upstream = tl.load(grad + row * grad_stride, mask=row < rows, other=0.0).to(tl.float64)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        offset = row[:, None] * score_row + column[None, :].to(tl.int64) * score_column
        score = tl.load(scores + offset, mask=inside, other=0.0).to(tl.float32)
        z, value, slope, weight, divisor = judged(
            score, r, s, f, w, row[:, None], column[None, :], inside, IGNORE_MISSING, HAS_FLOOR
        )
        if utilities is not None:
            total += tl.sum(weighed(value, weight, inside), 1)
        else:
            index = row[:, None] * columns + column[None, :]
            to_u = upstream[:, None] * weight
            # a slope that nobody asked for counts for nothing, even if it is NaN
            to_z = tl.where(to_u == 0, 0.0, to_u * slope.to(tl.float64))
            write_gradients(z, divisor, to_z, index, inside, to_scores, to_reference, to_scale)
            if to_weights is not None:
                to_weight = tl.where(upstream[:, None] == 0, 0.0, upstream[:, None] * value.to(tl.float64))
                tl.store(to_weights + index, to_weight.to(tl.float32), mask=inside)
    if utilities is not None:
        tl.store(utilities + row, total.to(tl.float32), mask=row < rows)


def _run(
    grad: Tensor | None,
    scores: Tensor,
    operands: tuple[Any, ...],
    ignore_missing: bool,
    program: Sequence[int] | None,
    outputs: tuple[Any, ...],
) -> None:
    if program is not None:
        aggregate_formula.run(grad, scores, operands, ignore_missing, program, outputs)
        return
    own = rows_and_columns(scores)
    columns = min(triton.next_power_of_2(own.shape[1]), MOST_COLUMNS)
    rows = BLOCK // columns
    spread = (each for value in operands for each in operand(value, scores.shape))
    launch(
        _kernel, (triton.cdiv(own.shape[0], rows),), scores.device, *per_row(grad), own, *own.stride(), *spread,
        *outputs, own.shape[1], own.shape[0], ignore_missing, has_floor(operands[2]), ROWS=rows, COLUMNS=columns,
    )  # fmt: skip


_OPERANDS = (
    "Tensor? reference, float reference_number, Tensor? scale, float scale_number, Tensor? floor, float floor_number,"
    " Tensor? weights, bool ignore_missing, int[]? program"
)


def _operands(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return *(joined(*arguments[i : i + 2]) for i in range(0, 6, 2)), arguments[6]


@operator(
    f"aggregate_rewards_forward(Tensor scores, {_OPERANDS}) -> Tensor",
    lambda scores, *_: scores.new_empty(scores.shape[:-1], dtype=torch.float32),
)
def _forward(scores: Tensor, *arguments: Any) -> Tensor:
    utilities = scores.new_empty(scores.shape[:-1], dtype=torch.float32)
    _run(None, scores, _operands(arguments), arguments[7], arguments[8], (utilities, None, None, None, None))
    return utilities


def _fake_gradients(grad: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return scores.new_empty(scores.shape), *(wanted_like(scores, want) for want in rest[-3:])


@operator(
    f"aggregate_rewards_backward(Tensor grad, Tensor scores, {_OPERANDS}, bool want_reference, bool want_scale,"
    " bool want_weights) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_gradients,
)
def _backward(grad: Tensor, scores: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradients = _fake_gradients(grad, scores, *arguments)
    wanted = (
        gradient if want else None for gradient, want in zip(gradients[1:], arguments[-3:], strict=True)
    )
    _run(grad, scores, _operands(arguments), arguments[7], arguments[8], (None, gradients[0], *wanted))
    return gradients


_ops = torch.ops.lsc_kernels_triton


def forward(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
) -> Tensor:
    result: Tensor = _ops.aggregate_rewards_forward(
        scores, *split(reference_reward), *split(scale), *split(floor), weights, ignore_missing, program
    )
    return result


def backward(
    grad: Tensor,
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
    want_reference: bool,
    want_scale: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    to_scores, to_reference, to_scale, to_weights = _ops.aggregate_rewards_backward(
        *(grad, scores, *split(reference_reward), *split(scale), *split(floor)),
        *(weights, ignore_missing, program),
        *(want_reference, want_scale, want_weights),
    )
    return (
        to_scores,
        reduced(to_reference, reference_reward) if want_reference else None,
        reduced(to_scale, scale) if want_scale else None,
        reduced(to_weights, weights) if want_weights and weights is not None else None,
    )
