"""Whitening over what a mask counts, on one process or on many."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.masked_whiten import WhitenOptions, merged
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import wants_grad

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def masked_whiten(
    x: Tensor,
    mask: Tensor | None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    correction: int = 1,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    r"""Mean 0 and variance 1 over all counted elements.

    .. math:: y = \frac{x - m}{\sqrt{\mathrm{var} + \varepsilon}}, \qquad
        \mathrm{var} = \frac{1}{n - \mathrm{correction}} \sum (x - m)^2

    Args:
        x: [...]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        mask: of the shape of ``x``, bool, int or float; nonzero counts. What it leaves out never reaches a result, even
            where it is NaN. None counts everything.
        shift_mean: False puts the mean back: :math:`y + m`, scaled but not shifted.
        eps: :math:`\varepsilon` >= 0. Where var + eps is 0, so is y.
        correction: 1, the unbiased variance (TRL, verl, slime), or 0 (OpenRLHF). Where no more than one element
            counts, var is 0.
        process_group: a ``torch.distributed`` group, each process of which has a part of the elements: count, mean and
            sum of squares are gathered and merged in rank order, so that all processes use the same bits. Every process
            must call, also one with no counted element. The gradient is that of the sum of all processes' losses.

    Returns:
        Of the shape of ``x``, fp32 (fp64 if ``x`` is); 0 where the mask leaves out. The squares are summed about the
        mean, in fp64: a large mean costs no accuracy.

    Gradients:
        To ``x``, in its dtype, through mean and variance. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, a negative ``eps``, another ``correction``.

    Source:
        Whitening of rewards and advantages in PPO: S. Huang et al., "The N+ Implementation Details of RLHF with PPO"
        (2024), arXiv:2403.17031. The merging of parts: T. Chan et al., "Algorithms for computing the sample variance"
        (1983).

    Example:
        >>> import torch, lsc_kernels as lk
        >>> lk.masked_whiten(torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]]))
        tensor([[-1.,  0.,  1.,  0.]])
    """
    _checks.floating("x", x)
    if mask is not None:
        _checks.mask("mask", mask, x.shape, "x", x.device)
    if not isinstance(shift_mean, bool):
        raise TypeError(f"shift_mean must be a bool; got {type(shift_mean).__name__}")
    eps = _checks.number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps must be >= 0; got {eps}")
    if correction not in (0, 1):
        raise ValueError(f"correction must be 0 or 1; got {correction!r}")
    _check_group(process_group)
    options = WhitenOptions(shift_mean, eps, int(correction))

    kernels = select("masked_whiten", x)
    if wants_grad(x):
        result: Tensor = _apply((kernels, mask, options, process_group), x)
    else:
        moments = _of_all(kernels.moments(x, mask), process_group)
        result = kernels.forward(x, mask, moments, options)
    return result


def _check_group(group: object) -> None:
    if group is None:
        return
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup or None; got {type(group).__name__}"
        )


def _gathered(part: Tensor, group: ProcessGroup) -> Tensor:
    """[processes, ...] every process's part, in rank order."""
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part, group=group)
    return torch.stack(parts)


def _of_all(moments: Tensor, group: ProcessGroup | None) -> Tensor:
    return moments if group is None else merged(_gathered(moments, group))


class _MaskedWhiten(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[ModuleType, Tensor | None, WhitenOptions, ProcessGroup | None], x: Tensor
    ) -> Tensor:
        kernels, mask, options, group = call
        moments = _of_all(kernels.moments(x, mask), group)
        ctx.save_for_backward(x, mask, moments)
        ctx.call = kernels, options, group
        result: Tensor = kernels.forward(x, mask, moments, options)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mask, moments = ctx.saved_tensors
        kernels, options, group = ctx.call
        with torch.no_grad():
            sums = kernels.sums(grad, x, mask, moments)
            if group is not None:
                sums = _gathered(sums, group).sum(0)
            to_x = kernels.backward(grad, x, mask, moments, sums, options)
        return None, first_derivative("masked_whiten", to_x, grad, x)


_apply = quick_apply(_MaskedWhiten)
