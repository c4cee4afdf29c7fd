"""masked_whiten in Triton: moments of blocks, merged by the eager definition, and one pass that applies them.

In fp64 inside: the op waits for memory. Moments read x and the mask once, and whitening once more; a block's mean is
taken, and then its squares about that mean, while the block is in registers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.masked_whiten import WhitenOptions, merged
from lsc_kernels.triton._launch import dense, launch, operator
from lsc_kernels.triton.positions import counted_at
from lsc_kernels.triton.token_rows import narrow

BLOCK = 1024
"""Elements a program takes, 8 for each of 128 threads; the sums depend on it, not on the device."""

_DATA = ("grad", "x", "mask", "parts", "moments", "sums", "out")


@triton.jit
def _loaded(data, index, counted):
    return tl.load(data + index, mask=counted, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=_DATA)
def _moments_kernel(x, mask, parts, count: tl.int64, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    counted = counted_at(mask, 1, None, index, index < count)
    value = _loaded(x, index, counted)
    members = tl.sum(counted.to(tl.float64), 0)
    mean = tl.sum(value, 0) / tl.maximum(members, 1.0)
    centred = tl.where(counted, value - mean, 0.0)
    tl.store(parts + 3 * block, members)
    tl.store(parts + 3 * block + 1, mean)
    tl.store(parts + 3 * block + 2, tl.sum(centred * centred, 0))


@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=_DATA)
def _sums_kernel(grad, x, mask, moments, parts, count: tl.int64, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK)
    counted = counted_at(mask, 1, None, index, index < count)
    upstream = _loaded(grad, index, counted)
    centred = tl.where(counted, _loaded(x, index, counted) - tl.load(moments + 1), 0.0)
    tl.store(parts + 2 * block, tl.sum(upstream, 0))
    tl.store(parts + 2 * block + 1, tl.sum(upstream * centred, 0))


@triton.jit(do_not_specialize=("count", "correction"), do_not_specialize_on_alignment=_DATA)
def _apply_kernel(
    grad, x, mask, moments, sums, out, count: tl.int64, eps: tl.float64, correction: tl.int32,
    SHIFT_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward where there is no ``grad``, else backward."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    counted = counted_at(mask, 1, None, index, inside)
    members, mean = tl.load(moments), tl.load(moments + 1)
    degrees = tl.maximum(members - correction, 1.0)
    variance = tl.load(moments + 2) / degrees + eps
    scale = tl.where(variance == 0, 0.0, 1.0 / tl.sqrt(variance))
    centred = _loaded(x, index, counted) - mean
    if grad is None:
        value = scale * centred
        if not SHIFT_MEAN:
            value += mean
    else:
        mean_grad = tl.load(sums) / tl.maximum(members, 1.0)
        along = scale * (scale * (scale * tl.load(sums + 1) / degrees))
        value = scale * (_loaded(grad, index, counted) - mean_grad) - along * centred
        if not SHIFT_MEAN:
            value += mean_grad
    value = tl.where(counted, value, 0.0).to(tl.float32)
    tl.store(out + index, narrow(value, out.dtype.element_ty), mask=inside)


def _blocks(x: Tensor) -> int:
    return int(triton.cdiv(x.numel(), BLOCK))


@operator(
    "masked_whiten_moments(Tensor x, Tensor? mask) -> Tensor",
    lambda x, *_: x.new_empty(3, dtype=torch.float64),
)
def _moments(x: Tensor, mask: Tensor | None) -> Tensor:
    parts = x.new_empty((_blocks(x), 3), dtype=torch.float64)
    launch(
        _moments_kernel, (_blocks(x),), x.device, x.contiguous(), dense(mask), parts, x.numel(), BLOCK=BLOCK
    )
    return merged(parts)


@operator(
    "masked_whiten_forward(Tensor x, Tensor? mask, Tensor moments, bool shift_mean, float eps, int correction)"
    " -> Tensor",
    lambda x, *_: x.new_empty(x.shape, dtype=torch.float32),
)
def _forward(
    x: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, eps: float, correction: int
) -> Tensor:
    out = x.new_empty(x.shape, dtype=torch.float32)
    launch(
        _apply_kernel, (_blocks(x),), x.device, None, x.contiguous(), dense(mask), moments, None, out, x.numel(),
        eps, correction, shift_mean, BLOCK=BLOCK,
    )  # fmt: skip
    return out


@operator(
    "masked_whiten_sums(Tensor grad, Tensor x, Tensor? mask, Tensor moments) -> Tensor",
    lambda grad, *_: grad.new_empty(2, dtype=torch.float64),
)
def _sums(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor) -> Tensor:
    parts = x.new_empty((_blocks(x), 2), dtype=torch.float64)
    launch(
        _sums_kernel, (_blocks(x),), x.device, grad.contiguous(), x.contiguous(), dense(mask), moments, parts,
        x.numel(), BLOCK=BLOCK,
    )  # fmt: skip
    return parts.sum(0)


@operator(
    "masked_whiten_backward(Tensor grad, Tensor x, Tensor? mask, Tensor moments, Tensor sums, bool shift_mean,"
    " float eps, int correction) -> Tensor",
    lambda grad, x, *_: x.new_empty(x.shape),
)
def _backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, sums: Tensor, *options: Any
) -> Tensor:
    shift_mean, eps, correction = options
    to_x = x.new_empty(x.shape)
    launch(
        _apply_kernel, (_blocks(x),), x.device, grad.contiguous(), x.contiguous(), dense(mask), moments, sums, to_x,
        x.numel(), eps, correction, shift_mean, BLOCK=BLOCK,
    )  # fmt: skip
    return to_x


_ops = torch.ops.lsc_kernels_triton


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    result: Tensor = _ops.masked_whiten_moments(x, mask)
    return result


def forward(x: Tensor, mask: Tensor | None, moments: Tensor, options: WhitenOptions) -> Tensor:
    result: Tensor = _ops.masked_whiten_forward(x, mask, moments, *options)
    return result


def sums(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor) -> Tensor:
    result: Tensor = _ops.masked_whiten_sums(grad, x, mask, moments)
    return result


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, sums: Tensor, options: WhitenOptions
) -> Tensor:
    to_x: Tensor = _ops.masked_whiten_backward(grad, x, mask, moments, sums, *options)
    return to_x
