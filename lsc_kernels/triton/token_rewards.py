"""token_rewards in Triton: one pass over kl, mask and dense rewards, one write of the rewards.

Program (sequence, block of positions) looks for the sequence's place from the end of its mask. The sum is formed in
fp64 and rounded once: the op waits for memory, not for arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.token_rewards import RewardOptions, check_index
from lsc_kernels.triton._launch import block, launch, operator
from lsc_kernels.triton.kl import clamp
from lsc_kernels.triton.positions import OUTSIDE, PLACEMENTS, counted_at, placed
from lsc_kernels.triton.token_rows import narrow

BLOCK = block(1024)
"""Positions a program takes, 8 for each of 128 threads."""

_NUMBERS = (
    "utility_stride", "kl_row", "kl_step", "mask_row", "mask_step", "index_stride", "dense_row", "dense_step",
    "grad_row", "grad_step", "length",
)  # fmt: skip
_DATA = ("utility", "kl", "mask", "index", "dense", "grad")


@triton.jit
def per_token(kl, dense, counted, beta, HAS_KL: tl.constexpr):
    """dense - beta kl in fp64, 0 where not counted. HAS_KL is false for beta 0, which keeps even a NaN KL out."""
    value = tl.zeros(counted.shape, tl.float64)
    if dense is not None:
        value += dense.to(tl.float64)
    if HAS_KL:
        value -= beta * kl.to(tl.float64)
    return tl.where(counted, value, 0.0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=(*_DATA, "rewards"))
def _forward_kernel(
    utility, utility_stride: tl.int64, kl, kl_row: tl.int64, kl_step: tl.int64,
    mask, mask_row: tl.int64, mask_step: tl.int64, index, index_stride: tl.int64,
    dense, dense_row: tl.int64, dense_step: tl.int64, rewards, length: tl.int64,
    beta: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    PLACEMENT: tl.constexpr, HAS_KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    own_mask = mask if mask is None else mask + row * mask_row
    own_index = index if index is None else tl.load(index + row * index_stride)
    place = placed(own_mask, mask_step, None, own_index, length, PLACEMENT)
    counted = counted_at(own_mask, mask_step, None, position, inside)
    own_kl, own_dense = position, dense
    if HAS_KL:
        own_kl = tl.load(kl + row * kl_row + position * kl_step, mask=counted, other=0.0)
    if dense is not None:
        own_dense = tl.load(dense + row * dense_row + position * dense_step, mask=counted, other=0.0)
    value = per_token(own_kl, own_dense, counted, beta, HAS_KL)
    own_utility = clamp(tl.load(utility + row * utility_stride).to(tl.float64), clip_low, clip_high)
    value = tl.where(position == place, value + own_utility, value)
    value = tl.where(place == OUTSIDE, float("nan"), value)
    tl.store(rewards + row * length + position, value.to(tl.float32), mask=inside)


@triton.jit(
    do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=(*_DATA, "to_utility", "to_kl", "to_dense")
)
def _backward_kernel(
    grad, grad_row: tl.int64, grad_step: tl.int64, utility, utility_stride: tl.int64,
    mask, mask_row: tl.int64, mask_step: tl.int64, index, index_stride: tl.int64,
    to_utility, to_kl, to_dense, length: tl.int64,
    beta: tl.float64, clip_low: tl.float64, clip_high: tl.float64,
    PLACEMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    own_mask = mask if mask is None else mask + row * mask_row
    if to_utility is not None:
        if tl.program_id(1) == 0:
            own_index = index if index is None else tl.load(index + row * index_stride)
            place = placed(own_mask, mask_step, None, own_index, length, PLACEMENT)
            upstream = tl.full((), 0.0, tl.float32)
            if place >= 0:
                upstream = tl.load(grad + row * grad_row + place * grad_step).to(tl.float32)
            value = tl.load(utility + row * utility_stride).to(tl.float64)
            upstream = tl.where((value < clip_low) | (value > clip_high), 0.0, upstream)
            tl.store(to_utility + row, narrow(upstream, to_utility.dtype.element_ty))
    counted = counted_at(own_mask, mask_step, None, position, inside)
    gradient = tl.load(grad + row * grad_row + position * grad_step, mask=counted, other=0.0).to(tl.float32)
    if to_dense is not None:
        tl.store(to_dense + row * length + position, narrow(gradient, to_dense.dtype.element_ty), mask=inside)
    if to_kl is not None:
        scaled = tl.where((gradient == 0) | (beta == 0), 0.0, -beta * gradient.to(tl.float64)).to(tl.float32)
        tl.store(to_kl + row * length + position, narrow(scaled, to_kl.dtype.element_ty), mask=inside)


def two_strides(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None, 0, 0) if tensor is None else (tensor, *tensor.stride())


def one_stride(tensor: Tensor | None) -> tuple[Any, ...]:
    return (None, 0) if tensor is None else (tensor, *tensor.stride())


@operator(
    "token_rewards_forward(Tensor utility, Tensor kl, Tensor? mask, Tensor? index, Tensor? dense, float beta,"
    " int placement, float clip_low, float clip_high) -> Tensor",
    lambda utility, kl, *_: kl.new_empty(kl.shape, dtype=torch.float32),
)
def _forward(
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    beta: float,
    placement: int,
    *clip: float,
) -> Tensor:
    check_index(index, kl, mask)
    rewards = kl.new_empty(kl.shape, dtype=torch.float32)
    launch(
        _forward_kernel, (kl.shape[0], triton.cdiv(kl.shape[1], BLOCK)), kl.device, *one_stride(utility),
        *two_strides(kl), *two_strides(mask), *one_stride(index), *two_strides(dense), rewards, kl.shape[1],
        beta, *clip, placement, beta != 0.0, BLOCK=BLOCK,
    )  # fmt: skip
    return rewards


def _fake_gradients(grad: Tensor, utility: Tensor, kl: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dense, wanted = rest[2], rest[-3:]

    def like(tensor: Tensor | None, want: bool) -> Tensor:
        if want and tensor is not None:
            return tensor.new_empty(tensor.shape)
        return grad.new_empty(0)

    return tuple(like(tensor, want) for tensor, want in zip((utility, kl, dense), wanted, strict=True))


@operator(
    "token_rewards_backward(Tensor grad, Tensor utility, Tensor kl, Tensor? mask, Tensor? index, Tensor? dense,"
    " float beta, int placement, float clip_low, float clip_high, bool want_utility, bool want_kl, bool want_dense)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
)
def _backward(
    grad: Tensor,
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    beta: float,
    placement: int,
    clip_low: float,
    clip_high: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    gradients = _fake_gradients(grad, utility, kl, mask, index, dense, *wanted)
    if grad.shape[1] == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    launch(
        _backward_kernel, (kl.shape[0], triton.cdiv(kl.shape[1], BLOCK)), kl.device, *two_strides(grad),
        *one_stride(utility), *two_strides(mask), *one_stride(index),
        *(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)),
        kl.shape[1], beta, clip_low, clip_high, placement, BLOCK=BLOCK,
    )  # fmt: skip
    return gradients


_ops = torch.ops.lsc_kernels_triton


def arguments(options: RewardOptions) -> tuple[float, int, float, float]:
    """Reward options as the ops take them."""
    return options.beta, PLACEMENTS.index(options.placement), options.clip_low, options.clip_high


def forward(
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
) -> Tensor:
    result: Tensor = _ops.token_rewards_forward(utility, kl, mask, index, dense, *arguments(options))
    return result


def backward(
    grad: Tensor,
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
    want_utility: bool,
    want_kl: bool,
    want_dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wanted = want_utility, want_kl, want_dense and dense is not None
    gradients = _ops.token_rewards_backward(
        grad, utility, kl, mask, index, dense, *arguments(options), *wanted
    )
    to_utility, to_kl, to_dense = (
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return to_utility, to_kl, to_dense
