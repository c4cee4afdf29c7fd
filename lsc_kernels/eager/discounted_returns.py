"""Discounted sums of the rewards from each position on: the definition.

R_t = r_t + gamma R_n, with n the next counted position: the returns of gae with lam 1, which no value enters.
"""

from __future__ import annotations

from torch import Tensor

from lsc_kernels.eager.gae import GaeOptions, gradients, returns
from lsc_kernels.eager.lsc_transform import has_fp64


def forward(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    total, _ = returns(rewards, None, mask, None, cu_seqlens, options)
    return total if has_fp64(rewards) else total.float()


def backward(grad: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, options: GaeOptions) -> Tensor:
    """To the rewards, in the dtype of ``grad``."""
    to_rewards, _, _ = gradients(None, grad, mask, cu_seqlens, None, options)
    return to_rewards.to(grad.dtype)
