"""aggregate_rewards with a formula in Triton: a program takes one row of scores, and runs the formula in it.

Reads each score that the formula names and what is broadcast against it, writes u; backward reads the upstream gradient
too and writes the gradients that are wanted, over zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.triton._launch import launch, per_row
from lsc_kernels.triton.formula import (
    NUMBERS,
    PROPERTY,
    differentiate,
    evaluate,
    gradients,
    ignored,
    judge,
    program_on,
)
from lsc_kernels.triton.log_sigmoid import Centred, Operand, operand_at
from lsc_kernels.triton.lsc_transform import operand, rows_and_columns, write_gradients

_STRIDES = tuple(
    f"{name}_{stride}"
    for name in ("score", "reference", "scale", "floor", "weight")
    for stride in ("row", "column")
)
_DATA = ("program", "grad", "scores", "reference", "scale", "floor", "weights", "utilities")


@triton.jit
def instructions(program, length, SLOTS: tl.constexpr):
    """Of each slot: its number, its property's column, whether it is a property, and whose part it is."""
    slot = tl.arange(0, SLOTS)
    known = slot < length
    kind = tl.load(program + slot * NUMBERS, mask=known, other=-1)
    column = tl.load(program + slot * NUMBERS + 1, mask=known, other=0)
    parent = tl.load(program + slot * NUMBERS + 3, mask=known, other=-1)
    return slot, column, kind == PROPERTY, parent


@triton.jit
def evaluated(
    program, length, score, slot, column, inside, parent, reference, scale, floor, weight, row,
    IGNORE_MISSING: tl.constexpr,
):  # fmt: skip
    """From a row's scores, in the slots of their properties: how each is judged, and the values of all slots."""
    divisor = operand_at(scale, row, column, inside)
    z = (score - operand_at(reference, row, column, inside)) / divisor
    judged = judge(
        z,
        tl.where(inside, operand_at(floor, row, column, inside), 0.0),
        operand_at(weight, row, column, inside),
    )
    if IGNORE_MISSING:
        judged = ignored(score != score, judged)
    values = evaluate(program, length, judged.weighted.good, judged.weighted.bad, slot, parent)
    return z, divisor, judged, values


@triton.jit
def result(values, slot, length):
    """log p of the formula: of its last instruction."""
    return tl.sum(tl.where(slot == length - 1, values.good, 0.0), 0)


@triton.jit(
    do_not_specialize=("length", "columns", "grad_stride", *_STRIDES), do_not_specialize_on_alignment=_DATA
)
def _kernel(
    program, length, grad, grad_stride: tl.int64, scores, score_row: tl.int64, score_column: tl.int64,
    reference, reference_row: tl.int64, reference_column: tl.int64, reference_number: tl.float64,
    scale, scale_row: tl.int64, scale_column: tl.int64, scale_number: tl.float64,
    floor, floor_row: tl.int64, floor_column: tl.int64, floor_number: tl.float64,
    weights, weight_row: tl.int64, weight_column: tl.int64, weight_number: tl.float64,
    utilities, to_scores, to_reference, to_scale, to_weights, columns,
    IGNORE_MISSING: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Forward where ``utilities`` is given, else backward into gradients that are 0 where no property is."""
    row = tl.program_id(0).to(tl.int64)
    slot, column, inside, parent = instructions(program, length, SLOTS)
    offset = row * score_row + column.to(tl.int64) * score_column
    score = tl.load(scores + offset, mask=inside, other=0.0).to(tl.float64)
    z, divisor, judged, values = evaluated(
        program, length, score, slot, column, inside, parent,
        Operand(reference, reference_row, reference_column, reference_number),
        Operand(scale, scale_row, scale_column, scale_number),
        Operand(floor, floor_row, floor_column, floor_number),
        Operand(weights, weight_row, weight_column, weight_number),
        row, IGNORE_MISSING,
    )  # fmt: skip
    if utilities is not None:
        tl.store(utilities + row, result(values, slot, length).to(tl.float32))
    else:
        upstream = tl.load(grad + row * grad_stride).to(tl.float64)
        slopes = differentiate(program, length, values.good, values.bad, slot, parent)
        to_z, to_weight = gradients(judged, slopes)
        # a slope that nobody asked for counts for nothing, even if it is NaN
        to_z = tl.where(upstream == 0, 0.0, upstream * to_z)
        index = row * columns + column
        write_gradients(Centred(high=z.to(tl.float32), low=z.to(tl.float32)), divisor, to_z, index, inside, to_scores,
                        to_reference, to_scale)  # fmt: skip
        if to_weights is not None:
            to_weight = tl.where(upstream == 0, 0.0, upstream * to_weight)
            tl.store(to_weights + index, to_weight.to(tl.float32), mask=inside)


def slots(program: Tensor) -> int:
    """Of the vectors that hold a program's values."""
    return triton.next_power_of_2(program.shape[0])


def run(
    grad: Tensor | None,
    scores: Tensor,
    operands: tuple[Any, ...],
    ignore_missing: bool,
    program: Sequence[int],
    outputs: tuple[Tensor | None, ...],
) -> None:
    """``outputs`` are the utilities, or the gradients to scores, reference, scale and weights, which become 0 first."""
    for gradient in outputs[1:]:
        if gradient is not None:
            gradient.zero_()
    own, formula = rows_and_columns(scores), program_on(tuple(program), scores.device)
    spread = (each for value in operands for each in operand(value, scores.shape))
    launch(
        _kernel, (own.shape[0],), scores.device, formula, formula.shape[0], *per_row(grad), own, *own.stride(),
        *spread, *outputs, own.shape[1], ignore_missing, SLOTS=slots(formula),
    )  # fmt: skip
