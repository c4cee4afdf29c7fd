"""What comes after the rewards: advantages and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _measure import Outputs
from torch import Generator, Tensor

import lsc_kernels as lk

BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
GAMMA, LAM = 1.0, 0.95


def lengths_mask(size: Any, generator: Generator) -> Tensor:
    lengths = torch.randint(1, size.length + 1, (size.sequences, 1), generator=generator)
    return torch.arange(size.length) < lengths


def test_gae(compare: Any, size: Any, generator: Generator) -> None:
    """No backward pass: trainers compute advantages without one, and their loop has none."""
    rewards, values = torch.randn(2, size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator)

    def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
        advantages, returns = lk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
        return {"advantages": advantages, "returns": returns}

    def textbook(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
        """As verl: a loop over the positions, in Python."""
        counted = mask.to(rewards.dtype)
        next_values = last = torch.zeros_like(rewards[:, 0])
        reversed_advantages = []
        for t in reversed(range(rewards.shape[1])):
            kept = counted[:, t]
            delta = rewards[:, t] + GAMMA * next_values - values[:, t]
            next_values = values[:, t] * kept + (1 - kept) * next_values
            last = (delta + GAMMA * LAM * last) * kept + (1 - kept) * last
            reversed_advantages.append(last)
        advantages = torch.stack(reversed_advantages[::-1], 1)
        return {"advantages": advantages * counted, "returns": (advantages + values) * counted}

    def truth(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
        return textbook(rewards.double(), values.double(), mask)

    compare(
        "gae",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(rewards, values, mask),
        reads=(rewards, values),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
    )


@BACKWARD
def test_discounted_returns(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    """Without a discount the textbook needs no loop: a sum from the end."""
    rewards = torch.randn(size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator)

    def ours(rewards: Tensor, mask: Tensor) -> Outputs:
        return {"returns": lk.discounted_returns(rewards, mask)}

    def textbook(rewards: Tensor, mask: Tensor) -> Outputs:
        counted = torch.where(mask, rewards, 0.0)
        return {"returns": torch.where(mask, counted.flip(-1).cumsum(-1).flip(-1), 0.0)}

    def truth(rewards: Tensor, mask: Tensor) -> Outputs:
        return textbook(rewards.double(), mask)

    compare(
        "discounted_returns",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(rewards, mask),
        reads=(rewards,),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )


@BACKWARD
def test_masked_whiten(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    x = torch.randn(size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator)

    def ours(x: Tensor, mask: Tensor) -> Outputs:
        return {"whitened": lk.masked_whiten(x, mask)}

    def textbook(x: Tensor, mask: Tensor) -> Outputs:
        """As TRL and verl."""
        counted = mask.to(x.dtype)
        count = counted.sum()
        mean = (x * counted).sum() / count
        variance = ((x - mean) ** 2 * counted).sum() / count * count / (count - 1)
        return {"whitened": (x - mean) * torch.rsqrt(variance + 1e-8) * counted}

    def truth(x: Tensor, mask: Tensor) -> Outputs:
        return textbook(x.double(), mask)

    compare(
        "masked_whiten",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(x, mask),
        reads=(x,),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )


@BACKWARD
def test_group_advantages(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    """Groups of eight that lie together; half a million samples, so that something can be timed."""
    utility = torch.randn(size.sequences * size.length // 16, generator=generator)

    def ours(utility: Tensor) -> Outputs:
        return {"advantages": lk.group_advantages(utility, 8)}

    def textbook(utility: Tensor) -> Outputs:
        """As TRL."""
        grouped = utility.view(-1, 8)
        mean, std = grouped.mean(1).repeat_interleave(8), grouped.std(1).repeat_interleave(8)
        return {"advantages": (utility - mean) / (std + 1e-4)}

    def truth(utility: Tensor) -> Outputs:
        return textbook(utility.double())

    compare(
        "group_advantages",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(utility,),
        reads=(utility,),
        shape={"B": utility.numel()},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )
