"""The log-sigmoid-centred transform of a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative


class Centring(NamedTuple):
    """The operands that turn a reward into a utility, each a float or a tensor."""

    reference_reward: float | Tensor
    scale: float | Tensor
    floor: float | Tensor

    def tensors(self) -> list[Tensor]:
        return [operand for operand in self if isinstance(operand, Tensor)]


def centring(reference_reward: object, scale: object, floor: object, device: torch.device) -> Centring:
    """Check the operands of the transform. Values of tensors are checked on the CPU only: no host wait."""
    checked = Centring(
        _float_or_tensor("reference_reward", reference_reward, device),
        _float_or_tensor("scale", scale, device),
        _float_or_tensor("floor", floor, device),
    )
    if isinstance(checked.floor, Tensor):
        _checks.no_grad("floor", checked.floor)
    low, high = _extremes(checked.scale)
    if not (0.0 < low and high < math.inf):
        raise ValueError(f"scale must be finite and > 0; got {_span(low, high)}")
    low, high = _extremes(checked.floor)
    if not (0.0 <= low and high < 1.0):
        raise ValueError(f"floor must be in [0, 1); got {_span(low, high)}")
    return checked


def _float_or_tensor(name: str, value: object, device: torch.device) -> float | Tensor:
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float or a tensor; got {type(value).__name__}")
        return _checks.number(name, value)
    _checks.floating(name, value)
    if value.device != device:
        raise ValueError(f"{name} must be on {device}; got {value.device}")
    return value


def _extremes(value: float | Tensor) -> tuple[float, float]:
    """Least and greatest value (NaN if one is NaN); a valid pair where looking would wait for a device."""
    if not isinstance(value, Tensor):
        return value, value
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return 0.5, 0.5
    low, high = torch.aminmax(value.detach())
    return low.item(), high.item()


def _span(low: float, high: float) -> str:
    return f"{low}" if low == high else f"{low} ... {high}"


def broadcast(name: str, tensor: Tensor, operands: dict[str, Tensor]) -> torch.Size:
    """The shape ``tensor`` and the operands broadcast to together."""
    shape = tensor.shape
    for operand_name, operand in operands.items():
        if operand.dim() == 0 or operand.shape == shape or operand.shape == shape[-1:]:
            continue
        try:
            shape = torch.broadcast_shapes(shape, operand.shape)
        except RuntimeError:
            raise ValueError(
                f"{operand_name} must broadcast against {name}, {list(tensor.shape)}; got {list(operand.shape)}"
            ) from None
    return shape


def spread(operand: float | Tensor, shape: Sequence[int]) -> Any:
    """An operand in one of the forms that backends take: a float, a scalar, [last dimension], or all of ``shape``.

    What is done here is differentiated by PyTorch, so that backends reduce gradients in these forms only.
    """
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return operand
    if operand.shape == shape or operand.shape == shape[-1:]:
        return operand
    return operand.reshape(()) if operand.numel() == 1 else operand.expand(shape)


def lsc_transform(
    reward: Tensor,
    reference_reward: float | Tensor,
    *,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
) -> Tensor:
    r"""The log-sigmoid-centred transform: how likely it is that a reward beats its reference, as a log-probability.

    .. math:: u = \log\bigl(f + (1 - f)\,\sigma(z)\bigr), \qquad z = (r - r_\mathrm{ref}) / s

    Args:
        reward: r, [...]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        reference_reward: the threshold :math:`r_\mathrm{ref}`; a float or a tensor that broadcasts against
            ``reward``.
        scale: s > 0, the reward model's Bradley-Terry temperature, in units of the reward; a float or a
            tensor.
        floor: f in [0, 1), the rate at which a judge is wrong; a float or a tensor. It keeps u above log f.

    Returns:
        u, of the broadcast shape, fp32 (fp64 if an input is fp64), in nats, never above 0. The difference is
        taken before any rounding, and u is accurate to its own size: relative error at most 4e-7 wherever u
        is a normal number. A reward of -inf gives log f, +inf gives 0, NaN gives NaN.

    Gradients:
        To ``reward``, ``reference_reward`` and ``scale``, each in its dtype: with :math:`f = 0`,
        :math:`\partial u / \partial z = \sigma(-z)`. ``floor`` has none. First derivative only.

    Raises:
        TypeError: an argument that is neither a float nor a floating-point tensor.
        ValueError: shapes that do not broadcast, devices that differ, a ``scale`` that is not finite and
            positive, a ``floor`` outside [0, 1) or that requires grad (tensors' values are checked on the CPU
            only).

    Source:
        Z. Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models" (2024),
        arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> u = lk.lsc_transform(torch.tensor([-20.0, 0.0, 20.0]), 0.0)
        >>> [f"{x:.4g}" for x in u.tolist()]
        ['-20', '-0.6931', '-2.061e-09']
    """
    _checks.floating("reward", reward)
    operands = centring(reference_reward, scale, floor, reward.device)
    tensors = operands.tensors()
    if tensors:
        named = zip(Centring._fields, operands, strict=True)
        operand_tensors = {name: value for name, value in named if isinstance(value, Tensor)}
        shape = broadcast("reward", reward, operand_tensors)
        if reward.shape != shape:
            reward = reward.expand(shape)
        operands = Centring(*(spread(operand, shape) for operand in operands))
        tensors = operands.tensors()

    kernels = select("lsc_transform", reward, *tensors)
    if torch.is_grad_enabled() and (reward.requires_grad or any(tensor.requires_grad for tensor in tensors)):
        result: Tensor = _LscTransform.apply(kernels, reward, *operands)
    else:
        result = kernels.forward(reward, *operands)
    return result


class _LscTransform(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        reward: Tensor,
        reference_reward: float | Tensor,
        scale: float | Tensor,
        floor: float | Tensor,
    ) -> Tensor:
        ctx.kernels = kernels
        save_operands(ctx, reward, reference_reward, scale, floor)
        result: Tensor = kernels.forward(reward, reference_reward, scale, floor)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        reward, reference_reward, scale, floor = saved_operands(ctx)
        want_reference, want_scale = ctx.needs_input_grad[2:4]
        with torch.no_grad():
            gradients = ctx.kernels.backward(
                grad, reward, reference_reward, scale, floor, want_reference, want_scale
            )
        sources = (grad, reward, *Centring(reference_reward, scale, floor).tensors())
        return None, *(first_derivative("lsc_transform", each, *sources) for each in gradients), None


def save_operands(ctx: Any, *operands: float | Tensor | None) -> None:
    """Save operands some of which are tensors, for :func:`saved_operands`."""
    ctx.save_for_backward(*(operand if isinstance(operand, Tensor) else None for operand in operands))
    ctx.numbers = tuple(None if isinstance(operand, Tensor) else operand for operand in operands)


def saved_operands(ctx: Any) -> list[Any]:
    return [
        number if tensor is None else tensor
        for tensor, number in zip(ctx.saved_tensors, ctx.numbers, strict=True)
    ]
