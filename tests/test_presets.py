"""Presets: each trainer's formulas written out, against ours with its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk

NAMES = ("trl", "verl", "openrlhf", "slime", "nemo_rl")


def trl(logp: Tensor, ref: Tensor, kl: str) -> Tensor:
    return logp - ref if kl == "k1" else torch.exp(ref - logp) - (ref - logp) - 1


def verl(logp: Tensor, ref: Tensor, kl: str) -> Tensor:
    if kl.endswith("+"):
        surrogate = 0.5 * (logp - ref).square()
        return surrogate - surrogate.detach() + verl(logp, ref, kl[:-1]).detach()
    if kl in ("kl", "k1"):
        return logp - ref
    if kl == "abs":
        return (logp - ref).abs()
    if kl in ("mse", "k2"):
        return 0.5 * (logp - ref).square()
    x = torch.clamp(ref - logp, min=-20, max=20)
    return torch.clamp(x.exp() - x - 1, min=-10, max=10)


def openrlhf(logp: Tensor, ref: Tensor, kl: str) -> Tensor:
    log_ratio = logp - ref
    if kl.endswith("+"):
        surrogate = log_ratio**2 / 2.0
        return openrlhf(logp, ref, kl[:-1]).detach() + surrogate - surrogate.detach()
    if kl == "k1":
        value = log_ratio
    elif kl == "k2":
        value = log_ratio**2 / 2.0
    else:
        bounded = log_ratio.clamp(min=-10)
        value = (-bounded).exp() - 1 + bounded
    return value.clamp(min=-10, max=10)


def slime(logp: Tensor, ref: Tensor, kl: str) -> Tensor:
    log_ratio = logp - ref
    if kl == "k1":
        return log_ratio
    if kl == "k2":
        return log_ratio**2 / 2.0
    value = (-log_ratio).exp() - 1 + log_ratio
    return value.clamp(min=-10, max=10) if kl == "low_var_kl" else value


def nemo_rl(logp: Tensor, ref: Tensor, kl: str) -> Tensor:
    x = (ref - logp).clamp(min=-20, max=20)
    value = -x if kl == "k1" else x.square() / 2 if kl == "k2" else x.exp() - 1 - x
    return value.clamp(min=-10, max=10)


FORMULAS: dict[str, tuple[Callable[[Tensor, Tensor, str], Tensor], tuple[str, ...]]] = {
    "trl": (trl, ("k1", "k3")),
    "verl": (verl, ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "k3+")),
    "openrlhf": (openrlhf, ("k1", "k2", "k3", "k1+", "k2+", "k3+")),
    "slime": (slime, ("k1", "k2", "k3", "low_var_kl")),
    "nemo_rl": (nemo_rl, ("k1", "k2", "k3")),
}
CASES = [(name, kl) for name, (_, kinds) in FORMULAS.items() for kl in kinds]


@pytest.mark.parametrize("name, kl", CASES)
def test_kl(backend: str, generator: Generator, name: str, kl: str) -> None:
    """Values with differences up to 60, where the clamps act, and gradients where the value is not clamped."""
    options = lk.preset(name, kl=kl).token_kl
    logp = -20 * torch.rand(500, generator=generator)
    difference = torch.randn(500, generator=generator) * torch.tensor([0.01, 1.0, 5.0, 20.0, 60.0]).repeat(
        100
    )
    ref = logp - difference
    theirs_leaf, leaf = logp.double().requires_grad_(), logp.clone().requires_grad_()
    theirs = FORMULAS[name][0](theirs_leaf, ref.double(), kl)
    ours = lk.kl_from_logprobs(leaf, ref, **options)
    representable = theirs.detach().abs() < 1e30  # without a clamp exp overflows fp32
    torch.testing.assert_close(ours.double()[representable], theirs[representable], rtol=1e-5, atol=1e-9)
    theirs.sum().backward()
    ours.sum().backward()
    assert leaf.grad is not None and theirs_leaf.grad is not None
    unclamped = representable
    if kl.endswith("+"):  # a clamped element has gradient 0 here: see the notes
        low, high = options.get("kl_clamp", (-torch.inf, torch.inf))
        value = ours.detach()  # theirs is rounded away from the limit: value + surrogate - surrogate
        unclamped = unclamped & (value > low) & (value < high)
        lowest, highest = options.get("log_ratio_clamp", (None, None))
        unclamped &= (difference > (-torch.inf if lowest is None else lowest)) & (
            difference < (torch.inf if highest is None else highest)
        )
    assert unclamped.sum() > 200
    torch.testing.assert_close(
        leaf.grad.double()[unclamped], theirs_leaf.grad[unclamped], rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_rewards(backend: str, generator: Generator, name: str) -> None:
    """OpenRLHF's compute_reward; the others put the score at the same place."""
    utility, kl = torch.randn(4, generator=generator), torch.randn(4, 6, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
    last = mask.shape[1] - 1 - mask.fliplr().argmax(dim=1, keepdim=True)
    theirs = torch.zeros_like(kl).scatter_(1, last, utility.unsqueeze(1)) - 0.1 * kl
    ours = lk.token_rewards(utility, kl, mask, beta=0.1, **lk.preset(name).token_rewards)
    torch.testing.assert_close(ours, theirs * mask, rtol=1e-6, atol=1e-6)
    if name == "trl":  # RLOO: the sequence's reward less beta times the sum of its KL
        torch.testing.assert_close(ours.sum(-1), utility - 0.1 * (kl * mask).sum(-1), rtol=1e-5, atol=1e-6)


def carried_over(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """verl, NeMo-RL: what is outside the mask carries the next value and advantage through."""
    next_values: Tensor | float = 0.0
    last: Tensor | float = 0.0
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        kept = mask[:, t]
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        last = (delta + gamma * lam * last) * kept + (1 - kept) * last
        next_values = values[:, t] * kept + (1 - kept) * next_values
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


def zeroed(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """OpenRLHF, TRL's PPO trainer: every position is a step; outside the mask reward and value are 0."""
    values, rewards = mask * values, mask * rewards
    last: Tensor | float = 0.0
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lam * last
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("override", [{}, {"gamma": 0.98, "lam": 0.9}])
def test_gae(backend: str, generator: Generator, name: str, override: dict[str, float]) -> None:
    preset = lk.preset(name)
    rewards, values = torch.randn(2, 8, 40, generator=generator).double()
    lengths = torch.randint(5, 41, (8, 1), generator=generator)
    mask = torch.arange(40) < lengths
    if name != "slime":  # which has no mask but the lengths
        mask &= torch.rand(8, 40, generator=generator) < 0.8
    options = preset.gae | override
    loop = zeroed if options["holes"] == "zero" else carried_over
    theirs = loop(rewards, values, mask.double(), options["gamma"], options["lam"])
    advantages, returns = lk.gae(rewards.float(), values.float(), mask, **options)
    torch.testing.assert_close(advantages.double(), theirs * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns.double(), (theirs + values) * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_plain_and_frozen(name: str) -> None:
    first = lk.preset(name)
    assert first == lk.preset(name) and first.name == name and first.version
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.version = "2"  # type: ignore[misc]
    first.token_kl["kl"] = "abs"
    assert lk.preset(name).token_kl["kl"] != "abs"


@pytest.mark.parametrize(
    "name, kl, message",
    [
        ("ppo", None, "preset must be one of trl, verl, openrlhf, slime, nemo_rl; got 'ppo'"),
        ("verl", "full", r"kl must be one of k1, .* \(or with '\+'\) with verl; got 'full'"),
        ("trl", "k3+", "kl must be one of k1, k3 with trl; got 'k3\\+'"),
    ],
)
def test_bad_input(name: str, kl: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.preset(name, kl=kl)
