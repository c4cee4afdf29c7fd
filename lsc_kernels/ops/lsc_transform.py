"""The log-sigmoid-centred transform of a reward."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply


class Range(NamedTuple):
    """Values an operand may have: low <= value < high, or low < value where ``low`` is left out."""

    low: float
    high: float
    with_low: bool
    wanted: str


RANGES = {
    "reference_reward": Range(-math.inf, math.inf, False, "finite"),
    "scale": Range(0.0, math.inf, False, "finite and > 0"),
    "floor": Range(0.0, 1.0, True, "in [0, 1)"),
}


def operand(name: str, value: object, device: torch.device) -> float | Tensor:
    """Check one operand of the transform. A tensor's values are checked on the CPU only: no host wait."""
    if isinstance(value, Tensor):
        _checks.floating(name, value)
        _checks.on(name, value, device)
        if name == "reference_reward":
            return value
        if name == "floor":
            _checks.no_grad(name, value)
        if not _checks.has_values(value):
            return value
        low, high = (extreme.item() for extreme in torch.aminmax(value.detach()))
    elif not _checks.is_number(value):
        raise TypeError(f"{name} must be a float or a tensor; got {type(value).__name__}")
    else:
        value = low = high = float(value)
    least, limit, with_low, wanted = RANGES[name]
    if not (high < limit and (least <= low if with_low else least < low)):
        raise ValueError(f"{name} must be {wanted}; got {f'{low} ... {high}' if low < high else low}")
    return value


def spread(name: str, tensor: Tensor, operands: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Broadcast a tensor and its operands together, to one of the forms that backends take.

    An operand becomes a float, a scalar, [last dimension], or all of the common shape. What is done here is
    differentiated by PyTorch, so that backends reduce gradients in these forms only.
    """
    shape, values = tensor.shape, list(operands.values())
    for value in values:
        if isinstance(value, Tensor) and not _fits(value, shape):
            break
    else:
        return tensor, values

    for operand_name, value in operands.items():
        if not isinstance(value, Tensor):
            continue
        try:
            shape = torch.broadcast_shapes(shape, value.shape)
        except RuntimeError:
            got = list(value.shape)
            raise ValueError(
                f"{operand_name} must broadcast against {name}, {list(tensor.shape)}; got {got}"
            ) from None

    def form(value: Any) -> Any:
        if not isinstance(value, Tensor) or _fits(value, shape):
            return value
        return value.reshape(()) if value.numel() == 1 else expanded(value, shape)

    return tensor if tensor.shape == shape else expanded(tensor, shape), [form(value) for value in values]


def expanded(value: Tensor, shape: torch.Size) -> Tensor:
    """A broadcast view, whose gradient PyTorch sums: in fp32, so that it is rounded once and not at every term."""
    narrow = value.requires_grad and value.dtype in (torch.bfloat16, torch.float16)
    return (value.float() if narrow else value).expand(shape)


def _fits(value: Tensor, shape: torch.Size) -> bool:
    """Whether an operand has one of the forms that backends take beside a tensor of this shape."""
    sizes = value.shape
    return sizes == shape or len(sizes) == 0 or sizes == shape[-1:]


def wants_grad(*operands: object) -> bool:
    for value in operands:
        if isinstance(value, Tensor) and value.requires_grad:
            return torch.is_grad_enabled()
    return False


def lsc_transform(
    reward: Tensor,
    reference_reward: float | Tensor,
    *,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
) -> Tensor:
    r"""The log-sigmoid-centred transform: the log-probability that a reward beats its reference.

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
    device = reward.device
    reference_reward = operand("reference_reward", reference_reward, device)
    scale = operand("scale", scale, device)
    floor = operand("floor", floor, device)
    if isinstance(reference_reward, Tensor) or isinstance(scale, Tensor) or isinstance(floor, Tensor):
        operands = {"reference_reward": reference_reward, "scale": scale, "floor": floor}
        reward, (reference_reward, scale, floor) = spread("reward", reward, operands)

    kernels = select("lsc_transform", reward, reference_reward, scale, floor)
    if wants_grad(reward, reference_reward, scale):
        result: Tensor = _apply((kernels, floor), reward, reference_reward, scale)
    else:
        result = kernels.forward(reward, reference_reward, scale, floor)
    return result


class _LscTransform(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, float | Tensor],
        reward: Tensor,
        reference_reward: float | Tensor,
        scale: float | Tensor,
    ) -> Tensor:
        kernels, floor = call
        ctx.kernels = kernels
        save_operands(ctx, reward, reference_reward, scale, floor)
        result: Tensor = kernels.forward(reward, reference_reward, scale, floor)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operands = saved_operands(ctx)
        want_reference, want_scale = ctx.needs_input_grad[2:4]
        with torch.no_grad():
            gradients = ctx.kernels.backward(grad, *operands, want_reference, want_scale)
        sources = (grad, *tensors(*operands))
        return None, *(first_derivative("lsc_transform", each, *sources) for each in gradients)


_apply = quick_apply(_LscTransform)


def tensors(*operands: object) -> list[Tensor]:
    return [value for value in operands if isinstance(value, Tensor)]


def save_operands(ctx: Any, *operands: object) -> None:
    """Save operands some of which are tensors, for :func:`saved_operands`."""
    saved: list[object] = []
    numbers: list[object] = []
    for value in operands:
        is_tensor = isinstance(value, Tensor)
        saved.append(value if is_tensor else None)
        numbers.append(None if is_tensor else value)
    ctx.save_for_backward(*saved)
    ctx.numbers = numbers


def saved_operands(ctx: Any) -> list[Any]:
    saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
    return [number if tensor is None else tensor for tensor, number in saved]
