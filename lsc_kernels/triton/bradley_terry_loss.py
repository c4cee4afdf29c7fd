"""bradley_terry_loss in Triton: -log sigmoid(d) + center (chosen + rejected)^2, d = chosen - rejected - margin.

Forward reads two scores a pair, and writes one loss, or the sum of a block of them in fp64, from which PyTorch makes
one number; backward reads two scores and writes two gradients. d is formed in fp64 and taken as a pair of floats: the
loss of a pair that is ranked right is about e^-d.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.bradley_terry_loss import REDUCTIONS
from lsc_kernels.eager.lsc_transform import reduced
from lsc_kernels.triton._launch import launch, operator, per_row
from lsc_kernels.triton.log_sigmoid import centred, utility
from lsc_kernels.triton.lsc_transform import joined, split, wanted_like
from lsc_kernels.triton.token_rows import narrow

BLOCK = 1024
"""Pairs a program takes, 8 for each of 128 threads: loads of 16 bytes in bf16."""

_DATA = ("grad", "chosen", "rejected", "margin", "losses", "sums", "to_chosen", "to_rejected", "to_margin")


@triton.jit(do_not_specialize=("grad_stride", "count"), do_not_specialize_on_alignment=_DATA)
def _kernel(
    grad, grad_stride: tl.int64, factor: tl.float64, chosen, rejected, margin, margin_number: tl.float64,
    center: tl.float64, losses, sums, to_chosen, to_rejected, to_margin, count: tl.int64,
    CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward where ``losses`` or ``sums`` is given, else backward."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    c = tl.load(chosen + index, mask=inside, other=0.0).to(tl.float64)
    r = tl.load(rejected + index, mask=inside, other=0.0).to(tl.float64)
    if margin is None:
        d = centred(c - r, margin_number, 1.0)
    else:
        d = centred(c - r, tl.load(margin + index, mask=inside, other=0.0).to(tl.float64), 1.0)
    value, slope = utility(d, 0.0, False)
    if grad is None:
        loss = -value.to(tl.float64)
        if CENTERED:
            loss += center * (c + r) * (c + r)
        if losses is not None:
            tl.store(losses + index, loss.to(tl.float32), mask=inside)
        else:
            tl.store(sums + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), 0))
    else:
        upstream = tl.load(grad + index * grad_stride, mask=inside, other=0.0).to(tl.float64) * factor
        # a slope that nobody asked for counts for nothing, even if it is NaN
        push = tl.where(upstream == 0, 0.0, upstream * slope.to(tl.float64))
        pull = tl.zeros_like(push)
        if CENTERED:
            pull = tl.where(upstream == 0, 0.0, upstream * 2.0 * center * (c + r))
        if to_chosen is not None:
            to = narrow((pull - push).to(tl.float32), to_chosen.dtype.element_ty)
            tl.store(to_chosen + index, to, mask=inside)
        if to_rejected is not None:
            to = narrow((pull + push).to(tl.float32), to_rejected.dtype.element_ty)
            tl.store(to_rejected + index, to, mask=inside)
        if to_margin is not None:
            tl.store(to_margin + index, push.to(tl.float32), mask=inside)


def _run(
    grad: tuple[Tensor | None, int, float],
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor,
    center: float,
    outputs: tuple[Tensor | None, ...],
) -> None:
    each = margin.contiguous() if isinstance(margin, Tensor) else None
    launch(
        _kernel, (triton.cdiv(chosen.numel(), BLOCK),), chosen.device, *grad, chosen.contiguous(),
        rejected.contiguous(), each, 0.0 if isinstance(margin, Tensor) else margin, center, *outputs, chosen.numel(),
        CENTERED=center != 0.0, BLOCK=BLOCK,
    )  # fmt: skip


_ARGUMENTS = (
    "Tensor chosen, Tensor rejected, Tensor? margin, float margin_number, float center, int reduction"
)


def _fake_loss(chosen: Tensor, *rest: Any) -> Tensor:
    return chosen.new_empty(chosen.shape if REDUCTIONS[rest[-1]] == "none" else (), dtype=torch.float32)


@operator(f"bradley_terry_loss_forward({_ARGUMENTS}) -> Tensor", _fake_loss)
def _forward(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    margin_number: float,
    center: float,
    reduction: int,
) -> Tensor:
    given = (chosen, rejected, joined(margin, margin_number), center)
    how = REDUCTIONS[reduction]
    if how == "none":
        losses = chosen.new_empty(chosen.shape, dtype=torch.float32)
        _run((None, 0, 1.0), *given, (losses, None, None, None, None))
        return losses
    sums = chosen.new_empty(triton.cdiv(chosen.numel(), BLOCK), dtype=torch.float64)
    _run((None, 0, 1.0), *given, (None, sums, None, None, None))
    total = sums.sum()
    return (total if how == "sum" else total / chosen.numel()).float()


def _fake_gradients(grad: Tensor, chosen: Tensor, rejected: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    want_chosen, want_rejected, want_margin = rest[-3:]
    to_scores = (
        scores.new_empty(scores.shape if wanted else 0)
        for scores, wanted in ((chosen, want_chosen), (rejected, want_rejected))
    )
    return *to_scores, wanted_like(chosen, want_margin)


@operator(
    f"bradley_terry_loss_backward(Tensor grad, {_ARGUMENTS}, bool want_chosen, bool want_rejected, bool want_margin)"
    " -> (Tensor, Tensor, Tensor)",
    _fake_gradients,
)
def _backward(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    margin_number: float,
    center: float,
    reduction: int,
    want_chosen: bool,
    want_rejected: bool,
    want_margin: bool,
) -> tuple[Tensor, ...]:
    wants = want_chosen, want_rejected, want_margin
    gradients = _fake_gradients(grad, chosen, rejected, *wants)
    how = REDUCTIONS[reduction]
    factor = 1.0 / chosen.numel() if how == "mean" and chosen.numel() else 1.0
    wanted = (gradient if want else None for gradient, want in zip(gradients, wants, strict=True))
    given = (*(per_row(grad) if how == "none" else (grad, 0)), factor)
    _run(given, chosen, rejected, joined(margin, margin_number), center, (None, None, *wanted))
    return gradients


_ops = torch.ops.lsc_kernels_triton


def forward(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor, center: float, reduction: str
) -> Tensor:
    result: Tensor = _ops.bradley_terry_loss_forward(
        chosen, rejected, *split(margin), center, REDUCTIONS.index(reduction)
    )
    return result


def backward(
    grad: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor,
    center: float,
    reduction: str,
    want_chosen: bool,
    want_rejected: bool,
    want_margin: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wants = want_chosen, want_rejected, want_margin
    to_chosen, to_rejected, to_margin = _ops.bradley_terry_loss_backward(
        grad, chosen, rejected, *split(margin), center, REDUCTIONS.index(reduction), *wants
    )
    return (
        to_chosen if want_chosen else None,
        to_rejected if want_rejected else None,
        reduced(to_margin, margin) if want_margin else None,
    )
