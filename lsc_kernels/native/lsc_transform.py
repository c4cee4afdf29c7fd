"""lsc_transform through the compiled kernels, which take the operands in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import reduced

_ops = torch.ops.lsc_kernels


def operand(value: float | Tensor) -> tuple[Tensor | None, float]:
    """An operand as the native ops take it: a tensor, or else a number."""
    if isinstance(value, Tensor):
        return value if value.dtype is torch.float32 else value.float(), 0.0
    return None, value


def forward(
    reward: Tensor, reference_reward: float | Tensor, scale: float | Tensor, floor: float | Tensor
) -> Tensor:
    result: Tensor = _ops.lsc_transform_forward.default(
        reward, *operand(reference_reward), *operand(scale), *operand(floor)
    )
    return result


def backward(
    grad: Tensor,
    reward: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    want_reference: bool,
    want_scale: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    to_reward, to_reference, to_scale = _ops.lsc_transform_backward.default(
        *(grad, reward, *operand(reference_reward), *operand(scale), *operand(floor)),
        *(want_reference, want_scale),
    )
    return (
        to_reward,
        reduced(to_reference, reference_reward) if want_reference else None,
        reduced(to_scale, scale) if want_scale else None,
    )


def new_like(scores: Tensor, wanted: bool) -> Tensor:
    """What a native op gives for a gradient at the scores' shape: empty where it is not wanted."""
    return scores.new_empty(scores.shape if wanted else (0,), dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::lsc_transform_forward")
def _(reward: Tensor, *_: object) -> Tensor:
    return new_like(reward, True)


@torch.library.register_fake("lsc_kernels::lsc_transform_backward")
def _(grad: Tensor, reward: Tensor, *rest: object) -> tuple[Tensor, ...]:
    want_reference, want_scale = rest[-2:]
    gradients = (new_like(reward, bool(want)) for want in (want_reference, want_scale))
    return reward.new_empty(reward.shape), *gradients
