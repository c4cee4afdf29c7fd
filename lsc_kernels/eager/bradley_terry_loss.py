"""The negative log-likelihood of preferences under the Bradley-Terry model: the definition.

With d = chosen - rejected - margin, of each pair

    loss      = -log sigmoid(d) + center (chosen + rejected)^2
    d/chosen  = -sigmoid(-d) + 2 center (chosen + rejected)
    d/rejected = sigmoid(-d) + 2 center (chosen + rejected)
    d/margin  = sigmoid(-d)
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import chain, double, has_fp64, log_sigmoid, reduced

REDUCTIONS = ("none", "sum", "mean")


def forward(
    chosen: Tensor, rejected: Tensor, margin: float | Tensor, center: float, reduction: str
) -> Tensor:
    """``margin`` is a number or of the scores' shape."""
    loss = -log_sigmoid(chosen.double() - rejected.double() - double(margin))
    if center:
        loss = loss + center * (chosen.double() + rejected.double()).square()
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.mean()
    return loss if has_fp64(chosen, rejected, margin) else loss.float()


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
    """To chosen, rejected and margin."""
    upstream = grad.double().expand(chosen.shape)
    if reduction == "mean":
        upstream = upstream / chosen.numel()
    slope = chain(upstream, torch.sigmoid(-(chosen.double() - rejected.double() - double(margin))))
    pull = chain(upstream, 2 * center * (chosen.double() + rejected.double())) if center else 0.0
    return (
        (pull - slope).to(chosen.dtype) if want_chosen else None,
        (pull + slope).to(rejected.dtype) if want_rejected else None,
        reduced(slope, margin) if want_margin else None,
    )
