"""bradley_terry_loss through the compiled kernels, which take both scores in one dtype and the margin in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.bradley_terry_loss import REDUCTIONS
from lsc_kernels.eager.lsc_transform import reduced
from lsc_kernels.native.lsc_transform import new_like, operand

_ops = torch.ops.lsc_kernels


def _arguments(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor, center: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None, float, float, int]:
    if chosen.dtype is not rejected.dtype:
        chosen, rejected = chosen.float(), rejected.float()
    return chosen, rejected, *operand(margin), center, REDUCTIONS.index(reduction)


def forward(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor, center: float, reduction: str
) -> Tensor:
    result: Tensor = _ops.bradley_terry_loss_forward.default(
        *_arguments(chosen, rejected, margin, center, reduction)
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
    to_chosen, to_rejected, to_margin = _ops.bradley_terry_loss_backward.default(
        grad, *_arguments(chosen, rejected, margin, center, reduction), *wants
    )
    return (
        to_chosen.to(chosen.dtype) if want_chosen else None,
        to_rejected.to(rejected.dtype) if want_rejected else None,
        reduced(to_margin, margin) if want_margin else None,
    )


@torch.library.register_fake("lsc_kernels::bradley_terry_loss_forward")
def _(chosen: Tensor, rejected: Tensor, *rest: object) -> Tensor:
    shape = chosen.shape if rest[-1] == REDUCTIONS.index("none") else ()
    return chosen.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::bradley_terry_loss_backward")
def _(grad: Tensor, chosen: Tensor, rejected: Tensor, *rest: object) -> tuple[Tensor, ...]:
    want_chosen, want_rejected, want_margin = rest[-3:]
    to_scores = (
        scores.new_empty(scores.shape if wanted else (0,))
        for scores, wanted in ((chosen, want_chosen), (rejected, want_rejected))
    )
    return *to_scores, new_like(chosen, bool(want_margin))
