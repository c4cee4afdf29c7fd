"""Rewards per token from a utility per sequence and a KL per token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.token_rewards import RewardOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import wants_grad

PLACEMENTS = ("last", "eos_plus_one", "before_last", "index")


def reward_options(
    beta: float, placement: str, index: object, utility_clip: tuple[float, float] | None, name: str = "index"
) -> RewardOptions:
    """Check the options of the placement, ``index`` by its name, and put them in the form the backends take."""
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}; got {placement!r}")
    if index is not None:
        if placement not in ("last", "index"):
            raise ValueError(f"placement={placement!r} and {name} both say where the utility goes; pass one")
        placement = "index"
    elif placement == "index":
        raise ValueError(f"{name} must be given with placement='index'; got None")
    return RewardOptions(
        _checks.number("beta", beta), placement, *_checks.interval("utility_clip", utility_clip)
    )


def token_rewards(
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    *,
    beta: float,
    placement: str = "last",
    index: Tensor | None = None,
    dense: Tensor | None = None,
    utility_clip: tuple[float, float] | None = None,
) -> Tensor:
    r"""Rewards per token: the KL penalty at every counted token, and the sequence's utility at one of them.

    .. math:: r_{bt} = -\beta\,\mathrm{kl}_{bt} + \mathrm{dense}_{bt} + u_b\,1[t = p(b)]

    ================  =====================================================================================
    ``placement``     p(b)
    ================  =====================================================================================
    ``last``          the last counted position
    ``eos_plus_one``  the one after the last counted; the last counted where that is T (TRL up to 1.12)
    ``before_last``   the counted position before the last; the last where it is the only one (length - 2 of
                      NeMo-Aligner and AReaL)
    ``index``         ``index[b]``, counted or not
    ================  =====================================================================================

    Args:
        utility: u, [B]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        kl: [B, T], of any of these dtypes.
        mask: [B, T], bool, int or float; nonzero counts. What it leaves out has no KL and no dense reward,
            even where they are NaN. None counts everything.
        beta: :math:`\beta`, a finite float: the price of a nat of KL in units of utility. With 0 the KL plays
            no part, whatever it is.
        placement: see above.
        index: [B] int64 or int32 in [0, T); implies ``placement="index"``.
        dense: [B, T] scores per token, added where ``mask`` counts.
        utility_clip: (low, high) on u; where it acts, u gets exactly zero gradient.

    Returns:
        [B, T], fp32 (fp64 if an input is fp64). A sequence without a counted position gets zeros.

    Gradients:
        To ``utility``, ``kl`` and ``dense``, each in its dtype. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, a ``beta`` that is not finite, an unknown
            ``placement``, an ``index`` beside another placement, a bad ``utility_clip``.
        IndexError: ``index`` outside [0, T) in a sequence with a counted position, on the CPU; on a GPU that
            row is NaN.

    Source:
        The KL penalty in the reward: D. Ziegler et al., "Fine-Tuning Language Models from Human Preferences"
        (2019), arXiv:1909.08593. The log-probability of being good as the utility: Z. Wang et al.,
        "Transforming and Combining Rewards for Aligning Large Language Models" (2024), arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> kl = torch.tensor([[0.5, 1.0, 7.0]])
        >>> lk.token_rewards(torch.tensor([2.0]), kl, torch.tensor([[1, 1, 0]]), beta=0.1)
        tensor([[-0.0500,  1.9000,  0.0000]])
    """
    _checks.floating("utility", utility)
    _checks.floating("kl", kl)
    if kl.dim() != 2:
        raise ValueError(f"kl must be [B, T]; got {list(kl.shape)}")
    sequences, device = kl.shape[:1], kl.device
    _checks.like("utility", utility, sequences, "one utility per row of kl", "kl", device)
    if mask is not None:
        _checks.mask("mask", mask, kl.shape, "kl", device)
    if index is not None:
        _checks.integer("index", index)
        _checks.like("index", index, sequences, "one position per row of kl", "kl", device)
    if dense is not None:
        _checks.floating("dense", dense)
        _checks.like("dense", dense, kl.shape, "kl", "kl", device)
    options = reward_options(beta, placement, index, utility_clip)

    kernels = select("token_rewards", utility, kl, dense)
    if wants_grad(utility, kl, dense):
        rewards: Tensor = _apply((kernels, mask, index, options), utility, kl, dense)
    else:
        rewards = kernels.forward(utility, kl, mask, index, dense, options)
    return rewards


class _TokenRewards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, Tensor | None, Tensor | None, RewardOptions],
        utility: Tensor,
        kl: Tensor,
        dense: Tensor | None,
    ) -> Tensor:
        kernels, mask, index, options = call
        ctx.save_for_backward(utility, kl, mask, index, dense)
        ctx.call = kernels, options
        rewards: Tensor = kernels.forward(utility, kl, mask, index, dense, options)
        return rewards

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kernels, options = ctx.call
        with torch.no_grad():
            gradients = kernels.backward(grad, *ctx.saved_tensors, options, *ctx.needs_input_grad[1:])
        return None, *(first_derivative("token_rewards", each, grad) for each in gradients)


_apply = quick_apply(_TokenRewards)
