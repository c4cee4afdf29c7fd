"""The loss that reward models are trained with on preferences."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.bradley_terry_loss import REDUCTIONS
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import expanded, save_operands, saved_operands, tensors, wants_grad


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: float | Tensor | None = None,
    center: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""The negative log-likelihood that each chosen output is preferred, under the Bradley-Terry model.

    .. math:: -\log\sigma(r_c - r_r - m) + \mathrm{center}\,(r_c + r_r)^2

    Args:
        chosen: :math:`r_c`, the preferred outputs' scores [...]; fp32, bf16, fp16, or fp64 (computed in fp64). Any
            strides.
        rejected: :math:`r_r`, the others', of the same shape.
        margin: m, by how much the chosen output should win; a float, or a tensor that broadcasts against ``chosen``.
            None is 0.
        center: the weight >= 0 of the penalty that keeps the mean of two scores near 0, as preferences alone leave it
            free.
        reduction: ``mean`` or ``sum`` over all pairs, or ``none``.

    Returns:
        A scalar, or with ``none`` [...]; fp32 (fp64 if an input is fp64). Relative error at most 4e-7 of each pair's
        loss, however certain the pair. The mean of no pairs is NaN.

    Gradients:
        To ``chosen``, ``rejected`` and ``margin``, each in its dtype. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a ``center`` that is negative or not finite, an unknown
            ``reduction``.

    Source:
        R. A. Bradley and M. E. Terry, "Rank analysis of incomplete block designs" (1952); as a loss, L. Ouyang et al.,
        arXiv:2203.02155; the margin, H. Touvron et al., "Llama 2", arXiv:2307.09288; the penalty, J. Eisenstein et al.,
        "Helping or Herding?", arXiv:2312.09244.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> loss = lk.bradley_terry_loss(torch.tensor([2.0, 30.0]), torch.tensor([0.0, 0.0]), reduction="none")
        >>> [f"{x:.4g}" for x in loss.tolist()]
        ['0.1269', '9.358e-14']
    """
    _checks.floating("chosen", chosen)
    _checks.floating("rejected", rejected)
    _checks.like("rejected", rejected, chosen.shape, "chosen", "chosen", chosen.device)
    margin = _margin(margin, chosen)
    center = _checks.number("center", center)
    if center < 0:
        raise ValueError(f"center must be >= 0; got {center}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")

    kernels = select("bradley_terry_loss", chosen, rejected, margin)
    if wants_grad(chosen, rejected, margin):
        result: Tensor = _apply((kernels, center, reduction), chosen, rejected, margin)
    else:
        result = kernels.forward(chosen, rejected, margin, center, reduction)
    return result


def _margin(value: object, chosen: Tensor) -> float | Tensor:
    """A number, or a tensor of the scores' shape."""
    if value is None:
        return 0.0
    if not isinstance(value, Tensor):
        return _checks.number("margin", value)
    _checks.floating("margin", value)
    _checks.same_device("margin", value, "chosen", chosen.device)
    try:
        return expanded(value, chosen.shape)
    except RuntimeError:
        raise ValueError(
            f"margin must broadcast against chosen, {list(chosen.shape)}; got {list(value.shape)}"
        ) from None


class _BradleyTerryLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, float, str],
        chosen: Tensor,
        rejected: Tensor,
        margin: float | Tensor,
    ) -> Tensor:
        ctx.call = kernels, center, reduction = call
        save_operands(ctx, chosen, rejected, margin)
        result: Tensor = kernels.forward(chosen, rejected, margin, center, reduction)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operands = saved_operands(ctx)
        kernels, *options = ctx.call
        with torch.no_grad():
            gradients = kernels.backward(grad, *operands, *options, *ctx.needs_input_grad[1:])
        sources = (grad, *tensors(*operands))
        return None, *(first_derivative("bradley_terry_loss", each, *sources) for each in gradients)


_apply = quick_apply(_BradleyTerryLoss)
