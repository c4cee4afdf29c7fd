"""Advantages of the samples of one prompt over one another."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.group_advantages import GroupOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import wants_grad

METHODS = ("grpo", "dr_grpo", "rloo", "gdpo")


def group_advantages(
    utility: Tensor,
    group: Tensor | int,
    *,
    method: str = "grpo",
    eps: float = 1e-4,
    leave_one_out: bool = False,
    weights: Tensor | Sequence[float] | None = None,
) -> Tensor:
    r"""How much better each sample is than the others of its group, which mostly are those of one prompt.

    With m the mean of a group, s its sample standard deviation (n - 1 in the denominator) and n its size:

    ===========  ===========================================================================================
    ``method``   A
    ===========  ===========================================================================================
    ``grpo``     :math:`(u - m) / (s + \varepsilon)`
    ``dr_grpo``  :math:`u - m`
    ``rloo``     u less the mean of the others, :math:`\frac{n}{n-1}(u - m)`
    ``gdpo``     of ``utility`` [B, K]: the ``grpo`` score of each property, their weighted sum, and of that
                 the same score over the whole batch
    ===========  ===========================================================================================

    **Group z-scores undo LSC.** A utility bends where the output is good already, so that what is good enough
    earns little more. The z-score within a group divides by the group's own spread and puts the difference back:
    eight samples at centred reward +6 with standard deviation 1 have utilities with s about 3e-3, yet their z-scores
    correlate 0.93 with those of the raw reward. At +12 they still do, and the 1e-4 in the denominator decides how large
    they are: 0.07 in place of 1. With a utility from
    :func:`lsc_kernels.aggregate_rewards`, prefer ``dr_grpo`` or ``rloo``, and scale over the batch
    (:func:`lsc_kernels.masked_whiten`) if at all.

    Args:
        utility: u, [B], or with ``gdpo`` [B, K]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        group: [B] int64 or int32, any id per sample, equal within a group; or the size of all groups, which then lie
            one after another.
        method: see above.
        eps: :math:`\varepsilon` >= 0, added to standard deviations. Where their sum is 0 the advantage is 0.
        leave_one_out: subtract the mean of the group's other members, not of all; with ``rloo`` that is so anyway. The
            standard deviation stays that of the whole group (NeMo-RL takes that of the others, too).
        weights: [K], the properties' weights in ``gdpo``; None is 1 each.

    Returns:
        A, [B], fp32 (fp64 if ``utility`` is). A member that is alone in its group has 0. NaN spoils its group, or with
        ``gdpo`` the batch.

    Gradients:
        To ``utility``, in its dtype; where a group's standard deviation is 0, none through it. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, a group size that does not divide B, a negative
            ``eps``, an unknown ``method``, ``weights`` with another method than ``gdpo`` or that require grad.

    Source:
        GRPO: Z. Shao et al., arXiv:2402.03300. Dr. GRPO: Z. Liu et al., arXiv:2503.20783. RLOO: A. Ahmadian et al.,
        arXiv:2402.14740. GDPO: S.-Y. Liu et al., arXiv:2601.05242.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> lk.group_advantages(torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 8.0]), 3, method="rloo")
        tensor([-1.5000,  0.0000,  1.5000, -1.5000, -1.5000,  3.0000])
        >>> reward = 6.0 + torch.tensor([-1.4, -0.9, -0.5, -0.2, 0.2, 0.5, 0.9, 1.4])
        >>> utility = lk.lsc_transform(reward, 0.0)
        >>> z, raw_z = (lk.group_advantages(x, 8) for x in (utility, reward))
        >>> f"spread {utility.std():.1e}, correlation with raw {torch.corrcoef(torch.stack([z, raw_z]))[0, 1]:.2f}"
        'spread 3.2e-03, correlation with raw 0.93'
    """
    _checks.floating("utility", utility)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    several = method == "gdpo"
    if utility.dim() != 1 + several:
        wanted = "[B, K] with method='gdpo'" if several else f"[B] with method={method!r}"
        raise ValueError(f"utility must be {wanted}; got {list(utility.shape)}")
    eps = _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be >= 0; got {eps}")
    if not isinstance(leave_one_out, bool):
        raise TypeError(f"leave_one_out must be a bool; got {type(leave_one_out).__name__}")
    if weights is not None and not several:
        raise ValueError(f"weights are those of the properties in method='gdpo'; got them with {method!r}")
    options = GroupOptions(method in ("grpo", "gdpo"), leave_one_out or method == "rloo", several, eps)
    fixed = (_groups(group, utility), _weights(weights, utility), options)

    kernels = select("group_advantages", utility)
    if wants_grad(utility):
        advantages: Tensor = _apply((kernels, *fixed), utility)
    else:
        advantages = kernels.forward(utility, *fixed)
    return advantages


def _groups(group: object, utility: Tensor) -> Tensor | int:
    """An id for each sample, or the size of all groups."""
    samples = utility.shape[0]
    if isinstance(group, Tensor):
        ids = _checks.integer("group", group)
        _checks.like("group", ids, utility.shape[:1], "one id per row of utility", "utility", utility.device)
        return ids
    size = _checks.whole(group)
    if size is None:
        raise TypeError(f"group must be a tensor of ids or a group size; got {type(group).__name__}")
    if size < 1 or samples % size:
        raise ValueError(f"group must be a size >= 1 that divides B = {samples}, or ids [B]; got {size}")
    return size


def _weights(weights: object, utility: Tensor) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, (list, tuple)):
        weights = torch.tensor(weights, dtype=torch.float64, device=utility.device)
    tensor = _checks.floating("weights", weights)
    _checks.like("weights", tensor, utility.shape[1:], "one weight per property", "utility", utility.device)
    _checks.no_grad("weights", tensor)
    return tensor


class _GroupAdvantages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[ModuleType, Tensor | int, Tensor | None, GroupOptions], utility: Tensor
    ) -> Tensor:
        kernels, group, weights, options = call
        ids, size = (group, None) if isinstance(group, Tensor) else (None, group)
        ctx.save_for_backward(utility, ids, weights)
        ctx.call = kernels, size, options
        advantages: Tensor = kernels.forward(utility, group, weights, options)
        return advantages

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        utility, ids, weights = ctx.saved_tensors
        kernels, size, options = ctx.call
        with torch.no_grad():
            to_utility = kernels.backward(grad, utility, size if ids is None else ids, weights, options)
        return None, first_derivative("group_advantages", to_utility, grad, utility)


_apply = quick_apply(_GroupAdvantages)
