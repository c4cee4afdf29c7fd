"""discounted_returns through the compiled kernels: gae without values."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.gae import HOLES, GaeOptions

_ops = torch.ops.lsc_kernels


def forward(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    gamma, lam, holes = options
    returns: Tensor = _ops.gae_forward.default(
        rewards, None, mask, None, cu_seqlens, gamma, lam, HOLES.index(holes)
    )[1]
    return returns


def backward(grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    gamma, lam, holes = options
    to_rewards: Tensor = _ops.gae_backward.default(
        None, grad, mask, cu_seqlens, None, gamma, lam, HOLES.index(holes), False
    )[0]
    return to_rewards
