"""gae: the recursion, holes, packed sequences, long sequences, gradients, modes, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _upstream
import pytest
import torch
from _modes import compile_once, needs_native, on_one_thread
from _reward_side import DTYPES, check_against_fp64, instruction_set, instruction_sets, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk

HOLES = ("skip", "zero", "cut")
MASK = [
    [1, 1, 1, 0, 0, 0],  # right padding
    [1, 1, 1, 1, 1, 1],  # all of it
    [0, 0, 1, 1, 1, 1],  # left padding
    [1, 0, 0, 1, 1, 0],  # a hole
    [0, 1, 0, 1, 0, 1],  # nothing but holes
    [0, 0, 0, 1, 0, 0],  # one position
    [0, 0, 0, 0, 0, 0],  # none
]


def by_hand(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
    holes: str = "skip",
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, position by position, in Python's floats."""
    advantages, returns = torch.zeros(2, *rewards.shape, dtype=torch.float64)
    for b in range(rewards.shape[0]):
        counted = [t for t in range(rewards.shape[1]) if mask[b, t]]
        if not counted:
            continue
        next_value, next_advantage = 0.0 if bootstrap is None else float(bootstrap[b]), 0.0
        for t in range(counted[-1], -1, -1):
            if t in counted:
                reward, value = float(rewards[b, t]), float(values[b, t])
            elif holes == "zero":
                reward = value = 0.0
            else:
                if holes == "cut":
                    next_value = next_advantage = 0.0
                continue
            next_advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
            next_value = value
            if t in counted:
                advantages[b, t], returns[b, t] = next_advantage, next_advantage + value
    return advantages, returns


def case(generator: Generator, *shape: int, level: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator) + level


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("with_bootstrap", [False, True])
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_values(
    backend: str, generator: Generator, holes: str, with_bootstrap: bool, gamma: float, lam: float
) -> None:
    mask = torch.tensor(MASK)
    rewards, values = case(generator, *mask.shape)
    bootstrap = torch.randn(len(MASK), generator=generator) if with_bootstrap else None
    truth = by_hand(rewards, values, mask, gamma, lam, bootstrap, holes)
    rewards[mask == 0], values[mask == 0] = torch.nan, torch.inf  # may be anything
    options: dict[str, Any] = {"gamma": gamma, "lam": lam, "bootstrap": bootstrap, "holes": holes}
    for name in instruction_sets(backend):
        with instruction_set(name):
            results = lk.gae(rewards, values, mask, **options)
        for got, true in zip(results, truth, strict=True):
            assert got.dtype is torch.float32 and (got[mask == 0] == 0).all()
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6)


def verl(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> Tensor:
    """The recursion of verl 0.9's GAE, before it whitens."""
    next_values: Tensor | float = 0.0
    last: Tensor | float = 0.0
    advantages = []
    for t in reversed(range(token_level_rewards.shape[-1])):
        kept = response_mask[:, t]
        delta = token_level_rewards[:, t] + gamma * next_values - values[:, t]
        next_values = values[:, t] * kept + (1 - kept) * next_values
        last = (delta + gamma * lam * last) * kept + (1 - kept) * last
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


def openrlhf(values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float) -> Tensor:
    """The recursion of OpenRLHF's GAE, which is also that of TRL's PPO trainer."""
    values, rewards = action_mask * values, action_mask * rewards
    last: Tensor | float = 0.0
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t < rewards.shape[1] - 1 else 0.0
        last = rewards[:, t] + gamma * next_values - values[:, t] + gamma * lambd * last
        advantages.append(last)
    return torch.stack(advantages[::-1], 1)


def test_holes_as_the_trainers_treat_them(backend: str, generator: Generator) -> None:
    mask = torch.tensor(MASK).double()
    rewards, values = case(generator, *mask.shape)
    exact = rewards.double(), values.double()
    for holes, theirs in (
        ("skip", verl(*exact, mask, 0.97, 0.9)),
        ("zero", openrlhf(*exact[::-1], mask, 0.97, 0.9)),
    ):
        advantages, returns = lk.gae(rewards, values, mask, gamma=0.97, lam=0.9, holes=holes)
        torch.testing.assert_close(advantages.double(), theirs * mask, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(returns.double(), (theirs + exact[1]) * mask, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("holes", HOLES)
def test_packed_is_padded_without_the_padding(backend: str, generator: Generator, holes: str) -> None:
    lengths = [3, 0, 700, 1, 0, 512, 513]
    longest, total = max(lengths), sum(lengths)
    rewards, values = case(generator, total)
    mask = torch.rand(total, generator=generator) < 0.7
    mask[3:10] = False  # holes where a sequence begins
    mask[-513:-3] = False
    bootstrap = torch.randn(len(lengths), generator=generator)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    padded = torch.zeros(3, len(lengths), longest)
    for b, length in enumerate(lengths):
        for into, packed in zip(padded, (rewards, values, mask), strict=True):
            into[b, :length] = packed[int(bounds[b]) : int(bounds[b + 1])]
    options: dict[str, Any] = {"gamma": 0.99, "lam": 0.9, "bootstrap": bootstrap, "holes": holes}
    expected = lk.gae(padded[0], padded[1], padded[2], **options)
    rewards[~mask] = torch.nan
    for cu_seqlens in (bounds, bounds.int(), torch.stack([bounds, bounds], 1)[:, 0]):
        results = lk.gae(rewards, values, mask, cu_seqlens=cu_seqlens, **options)
        for got, wide in zip(results, expected, strict=True):
            parts = [wide[b, :length] for b, length in enumerate(lengths)]
            torch.testing.assert_close(got, torch.cat(parts), rtol=1e-6, atol=1e-6)
    strided = torch.stack([rewards, values, mask.float()], 1)
    again = lk.gae(*strided.unbind(1), cu_seqlens=bounds, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.999, 0.999)])
@pytest.mark.parametrize("kind", ["random", "equal", "far"])
def test_long_sequences(backend: str, generator: Generator, gamma: float, lam: float, kind: str) -> None:
    """Within 1e-5 of the largest partial sum after 32768 steps, also where every rounding goes the same way."""
    length = 32768
    rewards, values = case(generator, 2, length, level=1000.0 if kind == "far" else 0.0)
    if kind == "equal":
        rewards, values = torch.full((2, length), 0.1), torch.zeros(2, length)
    truth = by_hand_dense(rewards, values, gamma, lam)
    for name in instruction_sets(backend):
        with instruction_set(name):
            results = lk.gae(rewards, values, None, gamma=gamma, lam=lam)
        for got, true in zip(results, truth, strict=True):
            assert (got.double() - true).abs().max() <= 1e-5 * true.abs().max()
            # beyond the promise: a partial sum is accurate to its own size
            torch.testing.assert_close(got.double(), true, rtol=1e-6, atol=1e-6 * float(values.abs().max()))


def by_hand_dense(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rows = []
    for reward, value in zip(rewards.tolist(), values.tolist(), strict=True):  # Python's numbers are fp64
        row, last, next_value = [], 0.0, 0.0
        for r, v in zip(reversed(reward), reversed(value), strict=True):
            last = r + gamma * next_value - v + gamma * lam * last
            row.append(last)
            next_value = v
        rows.append(row[::-1])
    advantages = torch.tensor(rows, dtype=torch.float64)
    return advantages, advantages + values.double()


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(generator: Generator, holes: str, packed: bool) -> None:
    mask = torch.tensor(MASK)
    inputs = [
        torch.randn(shape, generator=generator).double() for shape in (mask.shape, mask.shape, (len(MASK),))
    ]
    bounds = torch.arange(len(MASK) + 1) * mask.shape[1]

    def function(rewards: Tensor, values: Tensor, bootstrap: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "bootstrap": bootstrap, "holes": holes}
        if packed:
            return lk.gae(rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens=bounds, **options)
        return lk.gae(rewards, values, mask, **options)

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize("holes", HOLES)
@pytest.mark.parametrize("result", [0, 1, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(
    backend: str, generator: Generator, holes: str, result: int | None, dtype: torch.dtype
) -> None:
    rewards, values = case(generator, 5, 1100)
    mask = torch.rand(5, 1100, generator=generator) < 0.8
    upstream = torch.randn(5 if result is not None else 10, 1100, generator=generator)

    def function(rewards: Tensor, values: Tensor, bootstrap: Tensor) -> Tensor:
        results = lk.gae(rewards, values, mask, gamma=0.98, lam=0.9, bootstrap=bootstrap, holes=holes)
        return torch.cat(results) if result is None else results[result]

    bootstrap = torch.randn(5, generator=generator)
    for name in instruction_sets(backend):
        with instruction_set(name):
            check_against_fp64(function, upstream, [rewards.to(dtype), values, bootstrap], 1e-6)


def test_masked_positions_get_and_send_exactly_nothing(backend: str) -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]])
    nan = torch.where(mask == 1, 1.0, torch.nan)
    for holes in HOLES:
        _, (to_rewards, to_values, to_bootstrap) = with_gradients(
            lambda r, v, b, how=holes: lk.gae(r, v, mask, gamma=0.5, lam=0.5, bootstrap=b, holes=how)[0],
            nan,
            [nan, nan, torch.tensor([1.0, torch.nan])],
        )
        assert to_rewards is not None and to_values is not None and to_bootstrap is not None
        assert (to_rewards[mask == 0] == 0).all() and (to_values[mask == 0] == 0).all()
        assert to_rewards.isfinite().all() and to_values.isfinite().all()
        assert to_bootstrap[1] == 0 and to_bootstrap[0] > 0


def test_a_term_with_coefficient_zero_plays_no_part(backend: str) -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1.0, torch.nan, 1.0]])
    _, returns = lk.gae(rewards, values, None, lam=1.0)
    assert returns.tolist() == [[7.0, 6.0, 4.0]]
    advantages, _ = lk.gae(torch.tensor([[1.0, 2.0, torch.nan]]), torch.ones(1, 3), None, lam=0.0)
    assert advantages[:, :2].tolist() == [[1.0, 2.0]] and advantages[0, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_reward_is_one_for_all_before_it(backend: str, dtype: torch.dtype) -> None:
    """However small the power of gamma lam."""
    rewards = torch.zeros(1, 3000, dtype=dtype)
    rewards[0, -2] = torch.inf
    for result in lk.gae(rewards, torch.zeros_like(rewards), None, gamma=0.9, lam=0.5):
        assert (result[0, :-1] == torch.inf).all() and result[0, -1] == 0


def test_a_bad_row_spoils_no_other(backend: str, generator: Generator) -> None:
    rewards, values = case(generator, 3, 40)
    expected = lk.gae(rewards, values, None)
    rewards[1, 20] = torch.nan
    for got, wide in zip(lk.gae(rewards, values, None), expected, strict=True):
        assert torch.equal(got[[0, 2]], wide[[0, 2]]) and torch.equal(got[1, 21:], wide[1, 21:])
        assert got[1, :21].isnan().all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    _, gradients = with_gradients(
        lambda r, v, b: lk.gae(r, v, torch.ones(shape), bootstrap=b)[0],
        torch.ones(shape),
        [torch.ones(shape), torch.ones(shape), torch.ones(shape[0])],
    )
    assert [g.shape for g in gradients if g is not None] == [shape, shape, shape[:1]]
    for bounds in ([0], [0, 0, 0]):
        results = lk.gae(torch.ones(0), torch.ones(0), None, cu_seqlens=torch.tensor(bounds))
        assert [result.shape for result in results] == [(0,), (0,)]


def test_any_strides_and_the_same_bits(backend: str, generator: Generator) -> None:
    base, mask = torch.randn(60, 40, generator=generator), torch.rand(20, 20, generator=generator) < 0.7
    for rewards in (base[::3, ::2], base[:20, :20].mT, base[:1, :20].expand(20, 20), base[40:, 20:].flip(1)):
        expected = lk.gae(rewards.contiguous(), rewards.contiguous(), mask)
        wide = torch.ones(20, 40)
        wide[:, ::2] = mask.float()
        for given_mask in (mask, mask.mT.contiguous().mT, wide[:, ::2], mask.long()):
            got = lk.gae(rewards, rewards, given_mask)
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    rewards, values = case(generator, 300, 1000)
    first = lk.gae(rewards, values, None)
    with on_one_thread():
        again = lk.gae(rewards, values, None)
    alone = lk.gae(rewards[7:8], values[7:8], None)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b) and torch.equal(a[7:8], c)


@given(data=st.data(), holes=st.sampled_from(HOLES))
@settings(max_examples=60, deadline=None)
def test_any_mask(data: st.DataObject, holes: str) -> None:
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    rows = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    mask = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    rewards = torch.arange(float(batch * length)).reshape(batch, length)
    values = torch.cos(rewards)
    truth = by_hand(rewards, values, mask, 0.9, 0.7, values[:, 0], holes)
    results = lk.gae(rewards, values, mask, gamma=0.9, lam=0.7, bootstrap=values[:, 0], holes=holes)
    for got, true in zip(results, truth, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)


def test_modes(backend: str, generator: Generator) -> None:
    rewards, values = case(generator, 2, 5)
    values.requires_grad_()
    expected = lk.gae(rewards, values, None)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            for got, wide in zip(lk.gae(rewards, values, None), expected, strict=True):
                assert torch.equal(got, wide)
    leaf = torch.ones(2, 5, requires_grad=True)
    (first,) = torch.autograd.grad(expected[1], values, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="gae has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        rewards, values = case(generator, batch, length)
        mask = torch.rand(batch, length, generator=generator) < 0.8
        return (
            rewards.requires_grad_(),
            values.requires_grad_(),
            mask,
            torch.randn(batch, generator=generator),
        )

    calls = [call(3, 4), call(5, 7), call(4, 90)]
    compile_once(lambda r, v, m, b: lk.gae(r, v, m, gamma=0.99, bootstrap=b, holes="zero"), calls)
    bounds = [torch.tensor(b) for b in ([0, 2, 5], [0, 0, 3, 7], [0, 4, 9, 9, 12])]
    packed = [(*case(generator, int(b[-1])), b) for b in bounds]
    compile_once(lambda r, v, b: lk.gae(r, v, None, cu_seqlens=b), packed)


@pytest.mark.parametrize("output", [0, 1], ids=["advantages", "returns"])
def test_any_gradient_from_above(backend: str, generator: Generator, output: int) -> None:
    mask = torch.rand(_upstream.SHAPE, generator=generator) < 0.8
    rewards, values = torch.randn(2, *_upstream.SHAPE, generator=generator)
    _upstream.check(lambda r, v: lk.gae(r, v, mask, gamma=0.9)[output], (rewards, values), generator)


@needs_native
def test_opcheck(generator: Generator) -> None:
    rewards, values = case(generator, 7, 6)
    mask, bootstrap, ops = torch.tensor(MASK), torch.randn(7, generator=generator), torch.ops.lsc_kernels
    for holes in range(3):
        torch.library.opcheck(
            ops.gae_forward, (rewards.half(), values, mask, bootstrap, None, 0.9, 0.8, holes)
        )
        torch.library.opcheck(ops.gae_backward, (rewards, None, mask, None, bootstrap, 0.9, 0.8, holes, True))
    bounds = torch.tensor([0, 4, 4, 42])
    flat = rewards.flatten()
    torch.library.opcheck(ops.gae_forward, (flat, None, mask.flatten(), None, bounds, 0.9, 1.0, 0))
    torch.library.opcheck(ops.gae_backward, (None, flat, None, bounds, None, 0.9, 1.0, 0, False))


R = torch.zeros(2, 3)
N = torch.zeros(5)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.gae([[0.0]], R, None), TypeError, "rewards must be a tensor; got list"),
    (lambda: lk.gae(R.long(), R, None), TypeError, "rewards must be float32.*got torch.int64"),
    (
        lambda: lk.gae(N, N, None),
        ValueError,
        r"rewards must be \[B, T\], or \[N\] with cu_seqlens; got \[5\]",
    ),
    (
        lambda: lk.gae(R, R[0], None),
        ValueError,
        r"values must have the shape of rewards, \[2, 3\]; got \[3\]",
    ),
    (lambda: lk.gae(R, R.int(), None), TypeError, "values must be float32"),
    (lambda: lk.gae(R, R.to("meta"), None), ValueError, "values must be on the device of rewards"),
    (lambda: lk.gae(R, R, [[1, 1, 1]]), TypeError, "mask must be a tensor"),
    (
        lambda: lk.gae(R, R, R[:, :2]),
        ValueError,
        r"mask must have the shape of rewards, \[2, 3\]; got \[2, 2\]",
    ),
    (lambda: lk.gae(R, R, None, bootstrap=R), ValueError, r"bootstrap must have .*\[2\]; got \[2, 3\]"),
    (lambda: lk.gae(R, R, None, bootstrap=0.0), TypeError, "bootstrap must be a tensor; got float"),
    (lambda: lk.gae(R, R, None, bootstrap=R[:, 0].to("meta")), ValueError, "bootstrap must be on the device"),
    (lambda: lk.gae(R, R, None, gamma=1.1), ValueError, r"gamma must be in \[0, 1\]; got 1.1"),
    (lambda: lk.gae(R, R, None, lam=-0.1), ValueError, r"lam must be in \[0, 1\]; got -0.1"),
    (lambda: lk.gae(R, R, None, lam=math.nan), ValueError, "lam must be finite; got nan"),
    (lambda: lk.gae(R, R, None, gamma=torch.tensor(1.0)), TypeError, "gamma must be a float; got Tensor"),
    (
        lambda: lk.gae(R, R, None, holes="jump"),
        ValueError,
        "holes must be one of skip, zero, cut; got 'jump'",
    ),
    (
        lambda: lk.gae(R, R, None, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"rewards must be packed, \[N\], with cu_seqlens; got \[2, 3\]",
    ),
    (lambda: lk.gae(N, N, None, cu_seqlens=[0, 5]), TypeError, "cu_seqlens must be a tensor; got list"),
    (
        lambda: lk.gae(N, N, None, cu_seqlens=torch.tensor(5)),
        ValueError,
        r"cu_seqlens must be \[B\+1\]; got \[\]",
    ),
    (
        lambda: lk.gae(N, N, None, cu_seqlens=torch.tensor([0])),
        ValueError,
        "cu_seqlens must rise from 0 to N = 5",
    ),
    *(
        (
            lambda b=b: lk.gae(N, N, None, cu_seqlens=torch.tensor(b)),
            ValueError,
            "must rise from 0 to N = 5.*got",
        )
        for b in ([0, 4], [1, 5], [0, 3, 2, 5], [0, 9, 5], [0, -1, 5])
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    if "cuda" in backend and "must rise" in message:
        pytest.skip("a GPU is not waited for")
    with pytest.raises(error, match=message):
        call()
