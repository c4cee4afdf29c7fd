"""gae through the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.gae import HOLES, GaeOptions

_ops = torch.ops.lsc_kernels


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor]:
    gamma, lam, holes = options
    advantages, returns = _ops.gae_forward.default(
        rewards, values, mask, bootstrap, cu_seqlens, gamma, lam, HOLES.index(holes)
    )
    return advantages, returns


def backward(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    gamma, lam, holes = options
    to_rewards, to_values, to_bootstrap = _ops.gae_backward.default(
        to_advantages, to_returns, mask, cu_seqlens, bootstrap, gamma, lam, HOLES.index(holes), True
    )
    return to_rewards, to_values, None if bootstrap is None else to_bootstrap


@torch.library.register_fake("lsc_kernels::gae_forward")
def _(rewards: Tensor, values: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    returns = rewards.new_empty(rewards.shape, dtype=torch.float32)
    return returns.new_empty(0) if values is None else torch.empty_like(returns), returns


@torch.library.register_fake("lsc_kernels::gae_backward")
def _(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    lam: float,
    holes: int,
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = to_advantages if to_advantages is not None else to_returns
    assert given is not None
    to_rewards = given.new_empty(given.shape)
    to_values = given.new_empty(given.shape if want_values else 0)
    return to_rewards, to_values, given.new_empty(0 if bootstrap is None else bootstrap.shape)
