"""discounted_returns in Triton: gae without values."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.gae import GaeOptions
from lsc_kernels.triton.gae import arguments

_ops = torch.ops.lsc_kernels_triton


def forward(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    returns: Tensor = _ops.gae_forward(rewards, None, mask, None, cu_seqlens, *arguments(options))[1]
    return returns


def backward(grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    to_rewards: Tensor = _ops.gae_backward(None, grad, mask, cu_seqlens, None, *arguments(options), False)[0]
    return to_rewards
