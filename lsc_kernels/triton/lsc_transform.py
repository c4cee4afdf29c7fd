"""lsc_transform in Triton: reads a score and what is not broadcast against it, writes u; backward reads the upstream
gradient too and writes the gradients that are wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.lsc_transform import reduced
from lsc_kernels.triton._launch import block, launch, operator, per_row
from lsc_kernels.triton.log_sigmoid import Operand, centred, operand_at, utility
from lsc_kernels.triton.token_rows import narrow

BLOCK = block(1024)
"""Scores a program takes, 8 for each of 128 threads: loads of 16 bytes in bf16."""

_STRIDES = tuple(
    f"{name}_{stride}"
    for name in ("score", "reference", "scale", "floor", "weight")
    for stride in ("row", "column")
)
_DATA = ("grad", "scores", "reference", "scale", "floor", "weight")


@triton.jit(do_not_specialize=("columns", "count", *_STRIDES), do_not_specialize_on_alignment=_DATA)
def _kernel(
    grad, grad_stride: tl.int64, scores, score_row: tl.int64, score_column: tl.int64,
    reference, reference_row: tl.int64, reference_column: tl.int64, reference_number: tl.float64,
    scale, scale_row: tl.int64, scale_column: tl.int64, scale_number: tl.float64,
    floor, floor_row: tl.int64, floor_column: tl.int64, floor_number: tl.float64,
    utilities, to_scores, to_reference, to_scale, columns: tl.int64, count: tl.int64,
    HAS_FLOOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward where ``utilities`` is given, else backward."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    row, column = index // columns, index % columns
    score = tl.load(scores + row * score_row + column * score_column, mask=inside, other=0.0).to(tl.float32)
    r = operand_at(Operand(reference, reference_row, reference_column, reference_number), row, column, inside)
    s = operand_at(Operand(scale, scale_row, scale_column, scale_number), row, column, inside)
    f = operand_at(Operand(floor, floor_row, floor_column, floor_number), row, column, inside)
    z = centred(score, r, s)
    value, slope = utility(z, f, HAS_FLOOR)
    if utilities is not None:
        tl.store(utilities + index, value, mask=inside)
    else:
        upstream = tl.load(grad + index * grad_stride, mask=inside, other=0.0).to(tl.float32)
        # a slope that nobody asked for counts for nothing, even if it is NaN
        to_z = tl.where(upstream == 0, 0.0, upstream * slope)
        write_gradients(z, s, to_z, index, inside, to_scores, to_reference, to_scale)


@triton.jit
def write_gradients(z, scale, to_z, index, inside, to_scores, to_reference, to_scale):
    """(1, -1, -z) / scale times the gradient to z."""
    gradient = (to_z.to(tl.float64) / scale).to(tl.float32)
    tl.store(to_scores + index, narrow(gradient, to_scores.dtype.element_ty), mask=inside)
    if to_reference is not None:
        tl.store(to_reference + index, -gradient, mask=inside)
    if to_scale is not None:
        tl.store(to_scale + index, tl.where(gradient == 0, 0.0, -gradient * z.high), mask=inside)


def rows_and_columns(scores: Tensor) -> Tensor:
    """Scores of any shape as [rows, columns]; a copy only where their leading dimensions cannot be merged."""
    return (
        scores.reshape(1, 1)
        if scores.dim() == 0
        else scores.reshape(scores.shape[:-1].numel(), scores.shape[-1])
    )


def operand(value: float | Tensor | None, shape: torch.Size) -> tuple[Any, ...]:
    """An operand as kernels take it: data, row stride, column stride, number."""
    if not isinstance(value, Tensor):
        return None, 0, 0, 1.0 if value is None else value
    if value.dim() == 0:
        return value, 0, 0, 0.0
    if value.dim() == 1 and len(shape) != 1:
        return value, 0, value.stride(0), 0.0
    own = rows_and_columns(value)
    return own, own.stride(0), own.stride(1), 0.0


def has_floor(floor: float | Tensor) -> bool:
    return isinstance(floor, Tensor) or floor != 0.0


def wanted_like(scores: Tensor, wanted: bool) -> Tensor:
    """Room for a gradient at the scores' shape, empty where it is not wanted."""
    return scores.new_empty(scores.shape if wanted else (0,), dtype=torch.float32)


def _run(grad: Tensor | None, scores: Tensor, operands: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    own = rows_and_columns(scores)
    spread = (each for value in operands for each in operand(value, scores.shape))
    launch(
        _kernel, (triton.cdiv(scores.numel(), BLOCK),), scores.device, *per_row(grad), own, *own.stride(), *spread,
        *outputs, own.shape[1], scores.numel(), has_floor(operands[2]), BLOCK=BLOCK,
    )  # fmt: skip


_OPERANDS = (
    "Tensor? reference, float reference_number, Tensor? scale, float scale_number,"
    " Tensor? floor, float floor_number"
)


def joined(tensor: Tensor | None, number: float) -> float | Tensor:
    return number if tensor is None else tensor


def split(value: float | Tensor) -> tuple[Tensor | None, float]:
    """An operand as the ops take it: a tensor, or else a number."""
    return (value, 0.0) if isinstance(value, Tensor) else (None, value)


@operator(
    f"lsc_transform_forward(Tensor reward, {_OPERANDS}) -> Tensor",
    lambda reward, *_: wanted_like(reward, True),
)
def _forward(reward: Tensor, *arguments: Any) -> Tensor:
    utilities = wanted_like(reward, True)
    operands = tuple(joined(*arguments[i : i + 2]) for i in range(0, 6, 2))
    _run(None, reward, operands, (utilities, None, None, None))
    return utilities


def _fake_gradients(grad: Tensor, reward: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return reward.new_empty(reward.shape), *(wanted_like(reward, want) for want in rest[-2:])


@operator(
    f"lsc_transform_backward(Tensor grad, Tensor reward, {_OPERANDS}, bool want_reference, bool want_scale)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
)
def _backward(grad: Tensor, reward: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    gradients = _fake_gradients(grad, reward, *arguments)
    operands = tuple(joined(*arguments[i : i + 2]) for i in range(0, 6, 2))
    wanted = (
        gradient if want else None for gradient, want in zip(gradients[1:], arguments[-2:], strict=True)
    )
    _run(grad, reward, operands, (None, gradients[0], *wanted))
    return gradients


_ops = torch.ops.lsc_kernels_triton


def forward(
    reward: Tensor, reference_reward: float | Tensor, scale: float | Tensor, floor: float | Tensor
) -> Tensor:
    result: Tensor = _ops.lsc_transform_forward(
        reward, *split(reference_reward), *split(scale), *split(floor)
    )
    return result


def backward(
    grad: Tensor,
    reward: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    want_reference: bool,
    want_scale: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    to_reward, to_reference, to_scale = _ops.lsc_transform_backward(
        grad, reward, *split(reference_reward), *split(scale), *split(floor), want_reference, want_scale
    )
    return (
        to_reward,
        reduced(to_reference, reference_reward) if want_reference else None,
        reduced(to_scale, scale) if want_scale else None,
    )
