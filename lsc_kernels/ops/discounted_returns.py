"""Discounted sums of rewards."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.gae import GaeOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.gae import check_holes, check_sequences
from lsc_kernels.ops.lsc_transform import wants_grad


def discounted_returns(
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""What is still to come at each position: the rewards from there on, discounted.

    .. math:: R_t = r_t + \gamma R_n

    where n is the next counted position after t; nothing comes after the last one. The returns of
    :func:`lsc_kernels.gae` with ``lam=1``, without values.

    Args:
        rewards: r, [B, T]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides. Or packed sequences [N] with
            ``cu_seqlens``.
        mask: of this shape, bool, int or float; nonzero counts. What it leaves out never reaches a result, even where
            it is NaN. None counts everything.
        gamma: :math:`\gamma` in [0, 1], the discount.
        holes: what a position is that the mask leaves out between counted ones, as in :func:`lsc_kernels.gae`:
            ``skip``, stepped over; ``zero``, a step with reward 0 that costs a factor :math:`\gamma` (OpenRLHF);
            ``cut``, the end of a sequence.
        cu_seqlens: [B+1] int64 or int32, rising from 0 to N: sequence b is tokens cu_seqlens[b] ... cu_seqlens[b+1]-1.

    Returns:
        Of the shape of ``rewards``, fp32 (fp64 if they are); 0 where the mask leaves out. |error| at most 1e-5 of the
        sequence's largest partial sum at T = 32768.

    Gradients:
        To ``rewards``, in their dtype. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, ``gamma`` outside [0, 1], an unknown ``holes``,
            ``cu_seqlens`` that does not rise from 0 to N (checked on the CPU only).

    Source:
        R. J. Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning"
        (1992).

    Example:
        >>> import torch, lsc_kernels as lk
        >>> lk.discounted_returns(torch.tensor([[1.0, 1.0, 1.0, 7.0]]), torch.tensor([[1, 1, 1, 0]]), gamma=0.5)
        tensor([[1.7500, 1.5000, 1.0000, 0.0000]])
    """
    check_sequences(rewards, mask, cu_seqlens)
    options = GaeOptions(_checks.fraction("gamma", gamma), 1.0, check_holes(holes))

    kernels = select("discounted_returns", rewards)
    if wants_grad(rewards):
        returns: Tensor = _apply((kernels, mask, cu_seqlens, options), rewards)
    else:
        returns = kernels.forward(rewards, mask, cu_seqlens, options)
    return returns


class _DiscountedReturns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[ModuleType, Tensor | None, Tensor | None, GaeOptions], rewards: Tensor
    ) -> Tensor:
        kernels, mask, cu_seqlens, options = call
        ctx.save_for_backward(mask, cu_seqlens)
        ctx.call = kernels, options, rewards.dtype
        returns: Tensor = kernels.forward(rewards, mask, cu_seqlens, options)
        return returns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kernels, options, dtype = ctx.call
        with torch.no_grad():
            to_rewards = kernels.backward(grad, *ctx.saved_tensors, options).to(dtype)
        return None, first_derivative("discounted_returns", to_rewards, grad)


_apply = quick_apply(_DiscountedReturns)
