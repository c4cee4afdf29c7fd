"""aggregate_rewards through the compiled kernels, which take the operands in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import reduced
from lsc_kernels.native.lsc_transform import new_like, operand

_ops = torch.ops.lsc_kernels


def forward(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
) -> Tensor:
    result: Tensor = _ops.aggregate_rewards_forward.default(
        *(scores, *operand(reference_reward), *operand(scale), *operand(floor)),
        *(None if weights is None else weights.float(), ignore_missing, program),
    )
    return result


def backward(
    grad: Tensor,
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
    want_reference: bool,
    want_scale: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    to_scores, to_reference, to_scale, to_weights = _ops.aggregate_rewards_backward.default(
        *(grad, scores, *operand(reference_reward), *operand(scale), *operand(floor)),
        *(None if weights is None else weights.float(), ignore_missing, program),
        *(want_reference, want_scale, want_weights),
    )
    return (
        to_scores,
        reduced(to_reference, reference_reward) if want_reference else None,
        reduced(to_scale, scale) if want_scale else None,
        reduced(to_weights, weights) if want_weights and weights is not None else None,
    )


@torch.library.register_fake("lsc_kernels::aggregate_rewards_forward")
def _(scores: Tensor, *_: object) -> Tensor:
    return scores.new_empty(scores.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::aggregate_rewards_backward")
def _(grad: Tensor, scores: Tensor, *rest: object) -> tuple[Tensor, ...]:
    gradients = (new_like(scores, bool(want)) for want in rest[-3:])
    return scores.new_empty(scores.shape), *gradients
