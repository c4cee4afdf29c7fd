"""discounted_returns: values, holes, gradients, modes. What it shares with gae is tested there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _upstream
import pytest
import torch
from _modes import compile_once
from _reward_side import DTYPES, check_against_fp64, instruction_set, instruction_sets, with_gradients
from torch import Generator, Tensor

import lsc_kernels as lk

HOLES = ("skip", "zero", "cut")


def by_hand(rewards: Tensor, mask: Tensor, gamma: float, holes: str) -> Tensor:
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        total = 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[b, t]:
                returns[b, t] = total = float(rewards[b, t]) + gamma * total
            elif holes != "skip":
                total *= gamma if holes == "zero" else 0.0
    return returns


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
@pytest.mark.parametrize("packed", [False, True])
def test_values(backend: str, generator: Generator, holes: str, gamma: float, packed: bool) -> None:
    rewards, mask = torch.randn(6, 700, generator=generator), torch.rand(6, 700, generator=generator) < 0.8
    mask[0], mask[1] = False, True
    truth = by_hand(rewards, mask, gamma, holes)
    rewards[~mask] = torch.nan
    arguments = (rewards.flatten(), mask.flatten()) if packed else (rewards, mask)
    bounds = {"cu_seqlens": torch.arange(7) * 700} if packed else {}
    for name in instruction_sets(backend):
        with instruction_set(name):
            got = lk.discounted_returns(*arguments, gamma=gamma, holes=holes, **bounds)
        assert got.dtype is torch.float32 and got.shape == arguments[0].shape
        torch.testing.assert_close(got.reshape(6, 700).double(), truth, rtol=1e-6, atol=1e-5)


def test_cut_is_the_reinforce_plus_plus_of_old_verl(backend: str, generator: Generator) -> None:
    """The loop of its older versions: what follows a position outside the mask never reaches what is before."""
    rewards, mask = torch.randn(4, 30, generator=generator), torch.rand(4, 30, generator=generator) < 0.8
    returns, running = torch.zeros(4, 30), torch.zeros(4)
    for t in reversed(range(30)):
        running = rewards[:, t] + 0.9 * running
        returns[:, t] = running
        running = running * mask[:, t]
    ours = lk.discounted_returns(rewards, mask, gamma=0.9, holes="cut")
    torch.testing.assert_close(ours, returns * mask, rtol=1e-5, atol=1e-6)


def test_long_sequences(backend: str) -> None:
    """A float chain is off by 4e-5 of the sum here."""
    rewards = torch.full((1, 32768), 0.1)
    truth = rewards.double().flip(-1).cumsum(-1).flip(-1)
    error = lk.discounted_returns(rewards, None).double() - truth
    assert error.abs().max() <= 1e-6 * truth.max()


def test_without_values_gae_gives_the_same(backend: str, generator: Generator) -> None:
    rewards, values = torch.randn(2, 3, 50, generator=generator)
    mask = torch.rand(3, 50, generator=generator) < 0.8
    _, returns = lk.gae(rewards, values, mask, gamma=0.9, lam=1.0)
    assert torch.equal(lk.discounted_returns(rewards, mask, gamma=0.9), returns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("holes", HOLES)
def test_gradients(backend: str, generator: Generator, dtype: torch.dtype, holes: str) -> None:
    rewards = torch.randn(4, 600, generator=generator).to(dtype)
    mask = torch.rand(4, 600, generator=generator) < 0.8
    upstream = torch.randn(4, 600, generator=generator)
    check_against_fp64(
        lambda r: lk.discounted_returns(r, mask, gamma=0.98, holes=holes), upstream, [rewards], 1e-6
    )
    _, (gradient,) = with_gradients(
        lambda r: lk.discounted_returns(r, mask, holes=holes),
        upstream.masked_fill(~mask, torch.nan),
        [rewards],
    )
    assert gradient is not None and gradient.isfinite().all() and (gradient[~mask] == 0).all()


def test_gradcheck(generator: Generator) -> None:
    rewards = torch.randn(3, 5, generator=generator).double().requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    for holes in HOLES:
        assert torch.autograd.gradcheck(
            lambda r, how=holes: lk.discounted_returns(r, mask, gamma=0.9, holes=how), rewards
        )


def test_modes(backend: str, generator: Generator) -> None:
    rewards = torch.randn(2, 5, generator=generator).requires_grad_()
    expected = lk.discounted_returns(rewards, None, gamma=0.9)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(lk.discounted_returns(rewards, None, gamma=0.9), expected)
    leaf = torch.ones(2, 5, requires_grad=True)
    (first,) = torch.autograd.grad(expected, rewards, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="discounted_returns has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    calls = [
        (
            torch.randn(shape, generator=generator).requires_grad_(),
            torch.rand(shape, generator=generator) < 0.8,
        )
        for shape in ((3, 4), (5, 7), (4, 90))
    ]
    compile_once(lambda r, m: [lk.discounted_returns(r, m, gamma=0.99)], calls)


R = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.discounted_returns(R.long(), None), TypeError, "rewards must be float32.*got torch.int64"),
    (
        lambda: lk.discounted_returns(R[0], None),
        ValueError,
        r"rewards must be \[B, T\], or \[N\] with cu_seqlens",
    ),
    (
        lambda: lk.discounted_returns(R, R[0]),
        ValueError,
        r"mask must have the shape of rewards, \[2, 3\]; got \[3\]",
    ),
    (lambda: lk.discounted_returns(R, None, gamma=-1.0), ValueError, r"gamma must be in \[0, 1\]; got -1.0"),
    (lambda: lk.discounted_returns(R, None, holes=None), ValueError, "holes must be one of skip, zero, cut"),
    (
        lambda: lk.discounted_returns(R[0], None, cu_seqlens=torch.tensor([0, 2])),
        ValueError,
        "cu_seqlens must rise from 0 to N = 3, the tokens of rewards; got",
    ),
]


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    rewards = torch.randn(_upstream.SHAPE, generator=generator)
    _upstream.check(lambda r: lk.discounted_returns(r, None, gamma=0.9), (rewards,), generator)


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    if "cuda" in backend and "must rise" in message:
        pytest.skip("a GPU is not waited for")
    with pytest.raises(error, match=message):
        call()
