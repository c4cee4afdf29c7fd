"""token_rewards through the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.token_rewards import RewardOptions

PLACEMENTS = ("last", "eos_plus_one", "before_last", "index")
"""In the order of ``Placement`` in csrc/arguments/token_rewards.h."""

_ops = torch.ops.lsc_kernels


def forward(
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
) -> Tensor:
    beta, placement, low, high = options
    result: Tensor = _ops.token_rewards_forward.default(
        utility, kl, mask, index, dense, beta, PLACEMENTS.index(placement), low, high
    )
    return result


def backward(
    grad: Tensor,
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
    want_utility: bool,
    want_kl: bool,
    want_dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    beta, placement, low, high = options
    to_utility, to_kl, to_dense = _ops.token_rewards_backward.default(
        *(grad, utility, kl, mask, index, dense, beta, PLACEMENTS.index(placement), low, high),
        *(want_utility, want_kl, want_dense),
    )
    return (
        to_utility if want_utility else None,
        to_kl if want_kl else None,
        to_dense if want_dense else None,
    )


@torch.library.register_fake("lsc_kernels::token_rewards_forward")
def _(utility: Tensor, kl: Tensor, *_: object) -> Tensor:
    return kl.new_empty(kl.shape, dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::token_rewards_backward")
def _(
    grad: Tensor,
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    beta: float,
    placement: int,
    low: float,
    high: float,
    want_utility: bool,
    want_kl: bool,
    want_dense: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(wanted: bool, tensor: Tensor | None) -> Tensor:
        if wanted and tensor is not None:
            return tensor.new_empty(tensor.shape)
        return kl.new_empty(0, dtype=torch.float32)

    return like(want_utility, utility), like(want_kl, kl), like(want_dense, dense)
