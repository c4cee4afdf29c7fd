"""A trainer's estimate of KL by its own name, value and gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
from lsc_kernels.presets import preset


def trainer_kl(
    trainer: str,
    kl: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The estimator ``kl`` of a trainer, with its clamps; [...], fp32.

    With a ``+`` at the end of the name, the gradient is that of k2 times ``weight``, also where the value is clamped:
    so do the trainers, while ``straight_through`` of the ops gives a clamped element none.
    """
    options = preset(trainer, kl=kl).token_kl
    if options["grad"] == "autograd":
        return kl_from_logprobs(logprobs, ref_logprobs, mask=mask, old_logprobs=old_logprobs, **options)
    plain = options | {"grad": "autograd"}
    value = kl_from_logprobs(logprobs.detach(), ref_logprobs.detach(), mask=mask, **plain)
    if not (torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad)):
        return value
    surrogate = kl_from_logprobs(logprobs, ref_logprobs, kl="k2", mask=mask)
    result: Tensor = _GradientOf.apply(value, surrogate if weight is None else weight * surrogate)
    return result


class _GradientOf(torch.autograd.Function):
    """The value of one tensor, the gradient of another. As value + other - other, an infinity would make NaN of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad
