"""Advantages and returns from rewards and values per token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.gae import HOLES, GaeOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import wants_grad


def check_sequences(rewards: object, mask: object, cu_seqlens: object) -> int:
    """Check rewards [B, T], or packed [N] with ``cu_seqlens``, and their mask; returns B."""
    given = _checks.floating("rewards", rewards)
    if cu_seqlens is None:
        if given.dim() != 2:
            raise ValueError(f"rewards must be [B, T], or [N] with cu_seqlens; got {list(given.shape)}")
        sequences = given.shape[0]
    else:
        bounds = _checks.integer("cu_seqlens", cu_seqlens)
        if bounds.dim() != 1 or bounds.shape[0] == 0:
            raise ValueError(f"cu_seqlens must be [B+1]; got {list(bounds.shape)}")
        if given.dim() != 1:
            raise ValueError(f"rewards must be packed, [N], with cu_seqlens; got {list(given.shape)}")
        _checks.same_device("cu_seqlens", bounds, "rewards", given.device)
        sequences = bounds.shape[0] - 1
        if sequences == 0 and given.shape[0] > 0:
            raise ValueError(f"cu_seqlens must rise from 0 to N = {given.shape[0]}; it has one element")
    if mask is not None:
        _checks.mask("mask", mask, given.shape, "rewards", given.device)
    return sequences


def check_holes(holes: object) -> str:
    if holes not in HOLES:
        raise ValueError(f"holes must be one of {', '.join(HOLES)}; got {holes!r}")
    return str(holes)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    holes: str = "skip",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Generalised advantage estimation, and the returns that the critic is trained on.

    .. math:: \delta_t = r_t + \gamma V_{n} - V_t, \qquad A_t = \delta_t + \gamma\lambda A_{n}, \qquad R_t = A_t + V_t

    where n is the next counted position after t. After the last one V is ``bootstrap`` and A is 0.

    =========  ===============================================================================================
    ``holes``  a position that the mask leaves out between counted ones
    =========  ===============================================================================================
    ``skip``   is stepped over: n is the next counted position (verl, NeMo-RL)
    ``zero``   is a step with reward 0 and value 0, discounted like one (OpenRLHF; TRL's PPO trainer)
    ``cut``    ends a sequence: what follows does not count, and the step before it has :math:`V_n = A_n = 0`
    =========  ===============================================================================================

    Args:
        rewards: r, [B, T]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides. Or packed sequences [N] with
            ``cu_seqlens``.
        values: V, of the shape of ``rewards``, of any of these dtypes.
        mask: of this shape, bool, int or float; nonzero counts. What it leaves out never reaches a result, even where
            it is NaN. None counts everything.
        gamma: :math:`\gamma` in [0, 1], the discount.
        lam: :math:`\lambda` in [0, 1]: 0 trusts the values one step ahead, 1 only what was rewarded.
        bootstrap: [B], V of the state after the last counted position, for sequences that were cut short; None is 0.
        holes: see above. What follows the last counted position is no hole, but the end.
        cu_seqlens: [B+1] int64 or int32, rising from 0 to N: sequence b is tokens cu_seqlens[b] ... cu_seqlens[b+1]-1.

    Returns:
        ``(advantages, returns)``, each of the shape of ``rewards``, fp32 (fp64 if an input is fp64); 0 where the mask
        leaves out. |error| at most 1e-5 of the sequence's largest partial sum at T = 32768. A term whose coefficient is
        0 plays no part: with ``lam=1`` no value enters the returns. Advantages are not whitened:
        :func:`lsc_kernels.masked_whiten` does it.

    Gradients:
        To ``rewards``, ``values`` and ``bootstrap``, each in its dtype. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, ``gamma`` or ``lam`` outside [0, 1], an unknown
            ``holes``, ``cu_seqlens`` that does not rise from 0 to N (checked on the CPU only).

    Source:
        J. Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2015),
        arXiv:1506.02438.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> rewards, values = torch.tensor([[0.0, 9.9, 0.0, 1.0]]), torch.tensor([[0.5, 9.9, 0.5, 0.5]])
        >>> advantages, returns = lk.gae(rewards, values, torch.tensor([[1, 0, 1, 1]]), lam=0.5)
        >>> advantages
        tensor([[0.1250, 0.0000, 0.2500, 0.5000]])
        >>> returns
        tensor([[0.6250, 0.0000, 0.7500, 1.0000]])
    """
    sequences = check_sequences(rewards, mask, cu_seqlens)
    _checks.floating("values", values)
    _checks.like("values", values, rewards.shape, "rewards", "rewards", rewards.device)
    if bootstrap is not None:
        _checks.floating("bootstrap", bootstrap)
        _checks.like(
            "bootstrap", bootstrap, (sequences,), "one value per sequence", "rewards", rewards.device
        )
    options = GaeOptions(_checks.fraction("gamma", gamma), _checks.fraction("lam", lam), check_holes(holes))

    kernels = select("gae", rewards, values, bootstrap)
    if wants_grad(rewards, values, bootstrap):
        advantages, returns = _apply((kernels, mask, cu_seqlens, options), rewards, values, bootstrap)
    else:
        advantages, returns = kernels.forward(rewards, values, mask, bootstrap, cu_seqlens, options)
    return advantages, returns


class _Gae(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, Tensor | None, Tensor | None, GaeOptions],
        rewards: Tensor,
        values: Tensor,
        bootstrap: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kernels, mask, cu_seqlens, options = call
        # linear in all that has a gradient: of those only dtypes and shapes are needed
        ctx.save_for_backward(mask, cu_seqlens, bootstrap)
        ctx.set_materialize_grads(False)
        dtypes = rewards.dtype, values.dtype, None if bootstrap is None else bootstrap.dtype
        ctx.call = kernels, options, dtypes
        advantages, returns = kernels.forward(rewards, values, mask, bootstrap, cu_seqlens, options)
        return advantages, returns

    @staticmethod
    def backward(ctx: Any, to_advantages: Tensor | None, to_returns: Tensor | None) -> tuple[Any, ...]:
        if to_advantages is None and to_returns is None:
            return None, None, None, None
        kernels, options, dtypes = ctx.call
        with torch.no_grad():
            gradients = kernels.backward(to_advantages, to_returns, *ctx.saved_tensors, options)
        return None, *(
            None if each is None else first_derivative("gae", each.to(dtype), to_advantages, to_returns)
            for each, dtype in zip(gradients, dtypes, strict=True)
        )


_apply = quick_apply(_Gae)
