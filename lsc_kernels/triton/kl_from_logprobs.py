"""kl_from_logprobs in Triton: reads two log-probabilities, writes the KL; in fp64 inside, like a row's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.triton._launch import block, dense, launch, operator, per_row
from lsc_kernels.triton.kl import KINDS, evaluate_kl
from lsc_kernels.triton.token_rows import narrow

BLOCK = block(512)
"""Positions a program takes, 4 for each of 128 threads: an exponential in fp64 holds many registers."""

_DATA = ("grad", "logprobs", "ref_logprobs", "mask", "old_logprobs", "kl", "to_logprobs", "to_ref")


@triton.jit
def evaluate_logprobs(
    logprob, ref_logprob, old_logprob, ratio_low, ratio_high, kl_low, kl_high,
    KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """From log-probabilities in fp64; equal ones give 0, also where both are -inf."""
    d = tl.where(logprob == ref_logprob, 0.0, logprob - ref_logprob)
    log_weight = d
    if WEIGHTED:
        log_weight = logprob - old_logprob
    return evaluate_kl(
        d, d, log_weight, ratio_low, ratio_high, kl_low, kl_high, KIND, STRAIGHT_THROUGH, WEIGHTED
    )


@triton.jit(do_not_specialize=("grad_stride", "count"), do_not_specialize_on_alignment=_DATA)
def _kernel(
    grad, grad_stride: tl.int64, logprobs, ref_logprobs, mask, old_logprobs, kl, to_logprobs, to_ref,
    count: tl.int64, ratio_low: tl.float64, ratio_high: tl.float64, kl_low: tl.float64, kl_high: tl.float64,
    KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward where ``kl`` is given, else backward."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    counted = inside
    if mask is not None:
        counted = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
    x = tl.load(logprobs + index, mask=counted, other=0.0).to(tl.float64)
    y = tl.load(ref_logprobs + index, mask=counted, other=0.0).to(tl.float64)
    old = x
    if old_logprobs is not None:
        old = tl.load(old_logprobs + index, mask=counted, other=0.0).to(tl.float64)
    value = evaluate_logprobs(
        x, y, old, ratio_low, ratio_high, kl_low, kl_high, KIND, STRAIGHT_THROUGH, old_logprobs is not None
    )
    if kl is not None:
        tl.store(kl + index, tl.where(counted, value.kl, 0.0).to(tl.float32), mask=inside)
    else:
        upstream = tl.load(grad + index * grad_stride, mask=counted, other=0.0).to(tl.float64)
        asked = counted & (upstream != 0)
        to_x = tl.where(asked, upstream * value.on_logprob, 0.0).to(tl.float32)
        to_y = tl.where(asked, -upstream * value.on_ratio, 0.0).to(tl.float32)
        if to_logprobs is not None:
            tl.store(to_logprobs + index, narrow(to_x, to_logprobs.dtype.element_ty), mask=inside)
        if to_ref is not None:
            tl.store(to_ref + index, narrow(to_y, to_ref.dtype.element_ty), mask=inside)


def _run(
    grad: Tensor | None,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: Sequence[Any],
    outputs: tuple[Tensor | None, ...],
) -> None:
    kind, straight_through, *limits = options
    launch(
        _kernel, (triton.cdiv(logprobs.numel(), BLOCK),), logprobs.device, *per_row(grad), logprobs.contiguous(),
        ref_logprobs.contiguous(), dense(mask), dense(old_logprobs), *outputs, logprobs.numel(), *limits,
        kind, straight_through, BLOCK=BLOCK,
    )  # fmt: skip


_OPTIONS = "int kind, bool straight_through, float ratio_low, float ratio_high, float kl_low, float kl_high"


@operator(
    "kl_from_logprobs_forward(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? old_logprobs,"
    f" {_OPTIONS}) -> Tensor",
    lambda logprobs, *_: logprobs.new_empty(logprobs.shape, dtype=torch.float32),
)
def _forward(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, old_logprobs: Tensor | None, *options: Any
) -> Tensor:
    kl = logprobs.new_empty(logprobs.shape, dtype=torch.float32)
    _run(None, logprobs, ref_logprobs, mask, old_logprobs, options, (kl, None, None))
    return kl


def _fake_gradients(
    grad: Tensor, logprobs: Tensor, ref_logprobs: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    want_logprobs, want_ref = rest[-2:]
    return (
        logprobs.new_empty(logprobs.shape if want_logprobs else (0,)),
        ref_logprobs.new_empty(ref_logprobs.shape if want_ref else (0,)),
    )


@operator(
    "kl_from_logprobs_backward(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? old_logprobs,"
    f" {_OPTIONS}, bool want_logprobs, bool want_ref) -> (Tensor, Tensor)",
    _fake_gradients,
)
def _backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *options, want_logprobs, want_ref = rest
    to_logprobs, to_ref = _fake_gradients(grad, logprobs, ref_logprobs, want_logprobs, want_ref)
    outputs = (None, to_logprobs if want_logprobs else None, to_ref if want_ref else None)
    _run(grad, logprobs, ref_logprobs, mask, old_logprobs, options, outputs)
    return to_logprobs, to_ref


_ops = torch.ops.lsc_kernels_triton


def arguments(options: KLOptions) -> tuple[int, bool, float, float, float, float]:
    """KL options as the ops take them."""
    return KINDS.index(options.kind), options.straight_through, *options.log_ratio_limits, *options.kl_limits


def forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
) -> Tensor:
    result: Tensor = _ops.kl_from_logprobs_forward(
        logprobs, ref_logprobs, mask, old_logprobs, *arguments(options)
    )
    return result


def backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
    want_logprobs: bool,
    want_ref: bool,
) -> tuple[Tensor | None, Tensor | None]:
    to_logprobs, to_ref = _ops.kl_from_logprobs_backward(
        *(grad, logprobs, ref_logprobs, mask, old_logprobs),
        *(*arguments(options), want_logprobs, want_ref),
    )
    return to_logprobs if want_logprobs else None, to_ref if want_ref else None
