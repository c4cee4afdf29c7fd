"""group_advantages through the compiled kernels, which take a tensor of ids or a size."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.group_advantages import GroupOptions, ids_and_size

_ops = torch.ops.lsc_kernels


def _weights(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.double()


def forward(utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions) -> Tensor:
    advantages: Tensor = _ops.group_advantages_forward.default(
        utility, *ids_and_size(group), _weights(weights), *options
    )
    return advantages


def backward(
    grad: Tensor, utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions
) -> Tensor:
    to_utility: Tensor = _ops.group_advantages_backward.default(
        grad, utility, *ids_and_size(group), _weights(weights), *options
    )
    return to_utility


@torch.library.register_fake("lsc_kernels::group_advantages_forward")
def _(utility: Tensor, *_: object) -> Tensor:
    return utility.new_empty(utility.shape[:1], dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::group_advantages_backward")
def _(grad: Tensor, utility: Tensor, *_: object) -> Tensor:
    return utility.new_empty(utility.shape)
