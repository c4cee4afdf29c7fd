"""What comes after the rewards: advantages and returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _measure import Function, Outputs
from torch import Generator, Tensor

import lsc_kernels as lk

BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
GAMMA, LAM = 1.0, 0.95
GROUP = 8


def lengths_mask(size: Any, generator: Generator) -> Tensor:
    lengths = torch.randint(1, size.length + 1, (size.sequences, 1), generator=generator)
    return torch.arange(size.length) < lengths


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> Outputs:
    advantages, returns = lk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
    return {"advantages": advantages, "returns": returns}


def gae_step(
    reward: Tensor, value: Tensor, kept: Tensor, next_value: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """As verl."""
    delta = reward + GAMMA * next_value - value
    next_value = value * kept + (1 - kept) * next_value
    return next_value, (delta + GAMMA * LAM * last) * kept + (1 - kept) * last


def textbook_gae(
    rewards: Tensor, values: Tensor, mask: Tensor, step: Callable[..., tuple[Tensor, Tensor]] = gae_step
) -> Outputs:
    """As verl: a loop over the positions, in Python."""
    counted = mask.to(rewards.dtype)
    next_values = last = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        next_values, last = step(rewards[:, t], values[:, t], counted[:, t], next_values, last)
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    return {"advantages": advantages * counted, "returns": (advantages + values) * counted}


def returns(rewards: Tensor, mask: Tensor) -> Outputs:
    return {"returns": lk.discounted_returns(rewards, mask)}


def textbook_returns(rewards: Tensor, mask: Tensor) -> Outputs:
    """Without a discount no loop is needed: a sum from the end."""
    counted = torch.where(mask, rewards, 0.0)
    return {"returns": torch.where(mask, counted.flip(-1).cumsum(-1).flip(-1), 0.0)}


def whitened(x: Tensor, mask: Tensor) -> Outputs:
    return {"whitened": lk.masked_whiten(x, mask)}


def textbook_whitened(x: Tensor, mask: Tensor) -> Outputs:
    """As TRL and verl."""
    counted = mask.to(x.dtype)
    count = counted.sum()
    mean = (x * counted).sum() / count
    variance = ((x - mean) ** 2 * counted).sum() / count * count / (count - 1)
    return {"whitened": (x - mean) * torch.rsqrt(variance + 1e-8) * counted}


def grouped(utility: Tensor) -> Outputs:
    return {"advantages": lk.group_advantages(utility, GROUP)}


def textbook_grouped(utility: Tensor) -> Outputs:
    """As TRL."""
    in_groups = utility.view(-1, GROUP)
    mean, std = (each.repeat_interleave(GROUP) for each in (in_groups.mean(1), in_groups.std(1)))
    return {"advantages": (utility - mean) / (std + 1e-4)}


def in_fp64(textbook: Function) -> Function:
    """The textbook's formula on the same inputs, floats widened."""

    def truth(*inputs: Tensor) -> Outputs:
        return textbook(*(x.double() if x.is_floating_point() else x for x in inputs))

    return truth


def test_gae(compare: Any, size: Any, generator: Generator) -> None:
    """No backward pass: trainers compute advantages without one, and their loop has none. No torch.compile: it traces
    every one of thousands of steps and does not end within minutes."""
    rewards, values = torch.randn(2, size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator)

    compare(
        "gae",
        ours=gae,
        textbook=textbook_gae,
        truth=in_fp64(textbook_gae),
        inputs=(rewards, values, mask),
        reads=(rewards, values),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        compile=False,
    )


@BACKWARD
def test_discounted_returns(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    rewards = torch.randn(size.sequences, size.length, generator=generator)
    mask = lengths_mask(size, generator)

    compare(
        "discounted_returns",
        ours=returns,
        textbook=textbook_returns,
        truth=in_fp64(textbook_returns),
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

    compare(
        "masked_whiten",
        ours=whitened,
        textbook=textbook_whitened,
        truth=in_fp64(textbook_whitened),
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

    compare(
        "group_advantages",
        ours=grouped,
        textbook=textbook_grouped,
        truth=in_fp64(textbook_grouped),
        inputs=(utility,),
        reads=(utility,),
        shape={"B": utility.numel()},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )
