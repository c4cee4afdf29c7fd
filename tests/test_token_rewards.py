"""token_rewards: placement, masks, clamping, gradients, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _upstream
import pytest
import torch
from _modes import compile_once, needs_native
from _reward_side import DTYPES, check_against_fp64, instruction_set, instruction_sets, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk

PLACEMENTS = ("last", "eos_plus_one", "before_last", "index")
MASK = [
    [1, 1, 1, 0, 0],  # right padding
    [1, 1, 1, 1, 1],  # nothing after the last
    [0, 0, 1, 1, 1],  # left padding
    [1, 0, 1, 0, 0],  # a hole before the last
    [0, 0, 1, 0, 0],  # one position only
    [0, 0, 0, 0, 0],  # none
]
INDEX = [4, 0, 2, 1, 2, 99]
PLACES = {
    "last": [2, 4, 4, 2, 2, None],
    "eos_plus_one": [3, 4, 4, 3, 3, None],
    "before_last": [1, 3, 3, 0, 2, None],
    "index": [4, 0, 2, 1, 2, None],
}


def options(placement: str) -> dict[str, Any]:
    return {"index": torch.tensor(INDEX)} if placement == "index" else {"placement": placement}


def by_hand(
    utility: Tensor,
    kl: Tensor,
    mask: list[list[int]],
    places: list[int | None],
    beta: float,
    dense: Tensor | None,
) -> Tensor:
    rewards = torch.zeros(kl.shape, dtype=torch.float64)
    for b, row in enumerate(mask):
        for t, counted in enumerate(row):
            if counted:
                rewards[b, t] = -beta * float(kl[b, t]) + (0.0 if dense is None else float(dense[b, t]))
        place = places[b]
        if place is not None:
            rewards[b, place] += float(utility[b])
    return rewards


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("with_dense", [False, True])
def test_placement(backend: str, generator: Generator, placement: str, with_dense: bool) -> None:
    utility, kl = torch.randn(6, generator=generator), torch.randn(6, 5, generator=generator)
    dense = torch.randn(6, 5, generator=generator) if with_dense else None
    truth = by_hand(utility, kl, MASK, PLACES[placement], 0.3, dense)
    out = torch.tensor(MASK) == 0
    kl[out] = torch.nan  # what the mask leaves out may be anything
    if dense is not None:
        dense[out] = torch.inf
    for name in instruction_sets(backend):
        with instruction_set(name):
            rewards = lk.token_rewards(
                utility, kl, torch.tensor(MASK), beta=0.3, dense=dense, **options(placement)
            )
        assert rewards.dtype is torch.float32
        assert torch.equal(rewards, truth.float()), "one rounding of the exact sum"


@pytest.mark.parametrize(
    "mask_dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
def test_mask_of_any_dtype(backend: str, generator: Generator, mask_dtype: torch.dtype) -> None:
    utility, kl = torch.randn(6, generator=generator), torch.randn(6, 5, generator=generator)
    truth = by_hand(utility, kl, MASK, PLACES["last"], 0.3, None).float()
    mask = torch.tensor(MASK, dtype=mask_dtype)
    if mask_dtype.is_floating_point:
        mask = torch.where(mask != 0, mask * 0.25, -0.0)
    wide = torch.ones(6, 10, dtype=mask_dtype)
    wide[:, ::2] = mask
    for given_mask in (mask, mask.mT.contiguous().mT, wide[:, ::2]):
        assert torch.equal(lk.token_rewards(utility, kl, given_mask, beta=0.3), truth)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradcheck(generator: Generator, placement: str) -> None:
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((6,), (6, 5), (6, 5))
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, kl, d: lk.token_rewards(u, kl, torch.tensor(MASK), beta=0.3, dense=d, **options(placement)),
        inputs,
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("utility_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(
    backend: str, generator: Generator, placement: str, dtype: torch.dtype, utility_dtype: torch.dtype
) -> None:
    utility = torch.randn(6, generator=generator).to(utility_dtype)
    kl = torch.randn(6, 5, generator=generator).to(dtype)
    dense = torch.randn(6, 5, generator=generator).half()
    upstream = torch.randn(6, 5, generator=generator)
    check_against_fp64(
        lambda u, k, d: lk.token_rewards(
            u, k, torch.tensor(MASK), beta=0.3, dense=d, utility_clip=(-1, 1), **options(placement)
        ),
        upstream,
        [utility, kl, dense],
        1e-7,
    )


def test_gradients_by_hand(backend: str) -> None:
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    upstream = torch.tensor([[1.0, 2.0, torch.nan], [3.0, 4.0, 5.0]])
    inputs = [torch.tensor([1.0, 1.0]), torch.full((2, 3), torch.nan), torch.zeros(2, 3)]
    _, (to_utility, to_kl, to_dense) = with_gradients(
        lambda u, kl, d: lk.token_rewards(u, kl, mask, beta=0.5, dense=d), upstream, inputs
    )
    assert to_utility is not None and to_utility.tolist() == [2.0, 0.0]
    assert to_kl is not None and to_kl.tolist() == [[-0.5, -1.0, 0.0], [0.0, 0.0, 0.0]]
    assert to_dense is not None and to_dense.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_utility_clip(backend: str) -> None:
    utility = torch.tensor([-5.0, -2.0, 0.0, 3.0, 7.0, torch.nan, -torch.inf])
    kl = torch.zeros(7, 2)
    for clip, expected, slopes in (
        ((-2.0, 3.0), [-2.0, -2.0, 0.0, 3.0, 3.0, math.nan, -2.0], [0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0]),
        ((None, 0.0), [-5.0, -2.0, 0.0, 0.0, 0.0, math.nan, -math.inf], [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
        (None, utility.tolist(), [1.0] * 7),
    ):
        rewards, (to_utility,) = with_gradients(
            lambda u, c=clip: lk.token_rewards(u, kl, torch.ones(7, 2), beta=0.1, utility_clip=c),
            torch.ones(7, 2),
            [utility],
        )
        assert rewards[:, 1].tolist() == pytest.approx(expected, nan_ok=True)
        assert to_utility is not None and to_utility.tolist() == slopes


def test_nothing_counted_gets_zeros(backend: str) -> None:
    rewards, gradients = with_gradients(
        lambda u, kl: lk.token_rewards(u, kl, torch.zeros(2, 3), beta=1.0, index=torch.tensor([-1, 7])),
        torch.ones(2, 3),
        [torch.full((2,), torch.nan), torch.full((2, 3), torch.nan)],
    )
    assert (rewards == 0).all() and all(
        gradient is not None and (gradient == 0).all() for gradient in gradients
    )


def test_beta_zero_leaves_the_kl_out(backend: str) -> None:
    kl = torch.tensor([[torch.inf, torch.nan, 1.0]])
    rewards, (to_kl,) = with_gradients(
        lambda k: lk.token_rewards(torch.tensor([2.0]), k, None, beta=0.0), torch.ones(1, 3), [kl]
    )
    assert rewards.tolist() == [[0.0, 0.0, 2.0]] and to_kl is not None and to_kl.tolist() == [[0.0, 0.0, 0.0]]


def test_without_mask_everything_counts(backend: str, generator: Generator) -> None:
    utility, kl = torch.randn(3, generator=generator), torch.randn(3, 4, generator=generator)
    expected = lk.token_rewards(utility, kl, torch.ones(3, 4), beta=0.1)
    assert torch.equal(lk.token_rewards(utility, kl, None, beta=0.1), expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_empty(backend: str, shape: tuple[int, int], placement: str) -> None:
    index = {"index": torch.zeros(shape[0]).long()} if placement == "index" else {}
    rewards, (to_utility, to_kl) = with_gradients(
        lambda u, kl: lk.token_rewards(u, kl, torch.ones(shape), beta=0.1, placement=placement, **index),
        torch.ones(shape),
        [torch.ones(shape[0]), torch.ones(shape)],
    )
    assert rewards.shape == shape
    assert to_utility is not None and to_utility.tolist() == [0.0] * shape[0]
    assert to_kl is not None and to_kl.shape == shape


@pytest.mark.parametrize("length", [1, 511, 512, 513, 1500])
def test_long_rows(backend: str, generator: Generator, length: int) -> None:
    kl, dense = torch.randn(4, length, generator=generator), torch.randn(4, length, generator=generator)
    utility = torch.randn(4, generator=generator)
    mask = torch.rand(4, length, generator=generator) < 0.7
    mask[1, length // 2 :] = False
    upstream = torch.randn(4, length, generator=generator)
    for name in instruction_sets(backend):
        with instruction_set(name):
            check_against_fp64(
                lambda u, k, d: lk.token_rewards(u, k, mask, beta=0.05, dense=d),
                upstream,
                [utility, kl, dense],
                1e-7,
            )


def test_any_strides(backend: str, generator: Generator) -> None:
    base = torch.randn(8, 12, generator=generator)
    utility = torch.randn(12, generator=generator)[::3]
    mask = torch.rand(4, 4, generator=generator) < 0.7
    upstream = torch.randn(1, 4, generator=generator).expand(4, 4)
    for kl in (base[::2, ::3], base[:4, :4].mT, base[:1, :4].expand(4, 4), base[4:, 4:8].flip(1)):
        expected, gradients = with_gradients(
            lambda u, k, d: lk.token_rewards(u, k, mask, beta=0.1, dense=d),
            upstream,
            [utility.contiguous(), kl.contiguous(), kl.contiguous()],
        )
        leaf, dense = kl.detach().requires_grad_(), kl.detach().requires_grad_()
        rewards = lk.token_rewards(utility, leaf, mask, beta=0.1, dense=dense)
        rewards.backward(upstream)
        assert torch.equal(rewards, expected)
        assert leaf.grad is not None and gradients[1] is not None and torch.equal(leaf.grad, gradients[1])
        assert dense.grad is not None and gradients[2] is not None and torch.equal(dense.grad, gradients[2])


@given(data=st.data(), placement=st.sampled_from(["last", "eos_plus_one", "before_last"]))
@settings(max_examples=60, deadline=None)
def test_any_mask(data: st.DataObject, placement: str) -> None:
    batch, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    mask = data.draw(
        st.lists(
            st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=batch, max_size=batch
        )
    )
    utility, kl = torch.arange(1.0, batch + 1), torch.ones(batch, length)
    rewards = lk.token_rewards(utility, kl, torch.tensor(mask), beta=0.25, placement=placement)
    places: list[int | None] = []
    for row in mask:
        counted = [t for t, kept in enumerate(row) if kept]
        if not counted:
            places.append(None)
        elif placement == "eos_plus_one":
            places.append(min(counted[-1] + 1, length - 1))
        else:
            places.append(counted[-2:][0] if placement == "before_last" else counted[-1])
    assert torch.equal(rewards, by_hand(utility, kl, mask, places, 0.25, None).float())
    # each counted sequence gets its utility once, and pays for each of its tokens
    totals = [(b + 1) * any(row) - 0.25 * sum(row) for b, row in enumerate(mask)]
    assert rewards.sum(-1).tolist() == pytest.approx(totals)


def test_trl_up_to_1_12(backend: str) -> None:
    """The lines of its PPO trainer that put the score one past the end of the response."""
    scores, kl = torch.tensor([1.5, -2.0]), torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.3, 0.4]])
    sequence_lengths = torch.tensor([2, 3])  # position of the last token
    rewards = -0.05 * kl
    actual_start = torch.arange(2)
    past_the_end = sequence_lengths + 1
    actual_end = torch.where(past_the_end < rewards.size(1), past_the_end, sequence_lengths)
    rewards[actual_start, actual_end] += scores
    mask = torch.arange(4) <= sequence_lengths.unsqueeze(1)
    ours = lk.token_rewards(scores, kl, mask, beta=0.05, placement="eos_plus_one")
    torch.testing.assert_close(ours, rewards, rtol=1e-6, atol=0)


def test_modes(backend: str, generator: Generator) -> None:
    utility, kl = (
        torch.randn(2, generator=generator),
        torch.randn(2, 3, generator=generator, requires_grad=True),
    )
    mask = torch.ones(2, 3)
    expected = lk.token_rewards(utility, kl, mask, beta=0.1)
    with torch.inference_mode():
        assert torch.equal(lk.token_rewards(utility, kl, mask, beta=0.1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lk.token_rewards(utility, kl, mask, beta=0.1), expected)
    leaf = torch.ones(2, 3, requires_grad=True)
    (first,) = torch.autograd.grad(expected, kl, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="token_rewards has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        tensors = [
            torch.randn(shape, generator=generator).requires_grad_()
            for shape in ((batch,), (batch, length), (batch, length))
        ]
        return *tensors, torch.rand(batch, length, generator=generator) < 0.8

    calls = [call(3, 4), call(5, 7), call(4, 9)]
    compile_once(
        lambda u, kl, d, m: [
            lk.token_rewards(u, kl, m, beta=0.1, dense=d, placement="before_last", utility_clip=(-1, 1))
        ],
        calls,
    )


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    kl, dense = torch.randn(2, *_upstream.SHAPE, generator=generator)
    utility = torch.randn(_upstream.ROWS, generator=generator)
    mask = torch.arange(_upstream.COLUMNS) < torch.randint(
        1, _upstream.COLUMNS, (_upstream.ROWS, 1), generator=generator
    )
    _upstream.check(
        lambda u, k, d: lk.token_rewards(u, k, mask, beta=0.1, dense=d), (utility, kl, dense), generator
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    utility, kl = torch.randn(6, generator=generator), torch.randn(6, 5, generator=generator)
    mask, index = torch.tensor(MASK), torch.tensor(INDEX)
    ops = torch.ops.lsc_kernels
    for where, dense, placement in ((None, None, 0), (None, kl.half(), 2), (index, kl.bfloat16(), 3)):
        arguments = (utility.bfloat16(), kl, mask, where, dense, 0.1, placement, -1.0, math.inf)
        torch.library.opcheck(ops.token_rewards_forward, arguments)
        for wanted in ((True, True, dense is not None), (False, False, False)):
            torch.library.opcheck(ops.token_rewards_backward, (kl, *arguments, *wanted))


U, KL, M = torch.zeros(2), torch.zeros(2, 3), torch.ones(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.token_rewards([0.0, 0.0], KL, M, beta=0.1), TypeError, "utility must be a tensor; got list"),
    (lambda: lk.token_rewards(U.long(), KL, M, beta=0.1), TypeError, "utility must be float32"),
    (lambda: lk.token_rewards(U, KL.int(), M, beta=0.1), TypeError, "kl must be float32"),
    (lambda: lk.token_rewards(U, KL[0], M, beta=0.1), ValueError, r"kl must be \[B, T\]; got \[3\]"),
    (
        lambda: lk.token_rewards(torch.zeros(3), KL, M, beta=0.1),
        ValueError,
        r"utility must have .*\[2\]; got \[3\]",
    ),
    (
        lambda: lk.token_rewards(U.to("meta"), KL, M, beta=0.1),
        ValueError,
        "utility must be on the device of kl",
    ),
    (lambda: lk.token_rewards(U, KL, [[1, 1, 1]], beta=0.1), TypeError, "mask must be a tensor"),
    (
        lambda: lk.token_rewards(U, KL, M[:, :2], beta=0.1),
        ValueError,
        r"mask must have .*\[2, 3\]; got \[2, 2\]",
    ),
    (lambda: lk.token_rewards(U, KL, M.to("meta"), beta=0.1), ValueError, "mask must be on .*; got meta"),
    (lambda: lk.token_rewards(U, KL, M), TypeError, "beta"),
    (lambda: lk.token_rewards(U, KL, M, beta="0.1"), TypeError, "beta must be a float; got str"),
    (
        lambda: lk.token_rewards(U, KL, M, beta=torch.tensor(0.1)),
        TypeError,
        "beta must be a float; got Tensor",
    ),
    *(
        (lambda b=b: lk.token_rewards(U, KL, M, beta=b), ValueError, "beta must be finite; got")
        for b in (math.nan, math.inf, -math.inf)
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, placement="first"),
        ValueError,
        "placement must be one of last, .*; got 'first'",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, placement="index"),
        ValueError,
        "index must be given with placement='index'",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, placement="before_last", index=torch.zeros(2).long()),
        ValueError,
        "placement='before_last' and index",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, index=torch.zeros(2)),
        TypeError,
        "index must be int64 or int32",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, index=torch.zeros(3).long()),
        ValueError,
        r"index must have .*\[2\]; got \[3\]",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, index=torch.tensor([0, 3])),
        IndexError,
        r"index must be in \[0, T\) with T = 3; got 3",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, index=torch.tensor([-1, 0])),
        IndexError,
        r"index must be in \[0, T\) with T = 3; got -1",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, index=torch.zeros(2, device="meta").long()),
        ValueError,
        "index must be on the device of kl",
    ),
    (lambda: lk.token_rewards(U, KL, M, beta=0.1, dense=KL.long()), TypeError, "dense must be float32"),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, dense=KL[:, :2]),
        ValueError,
        r"dense must have .*\[2, 3\]; got \[2, 2\]",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, dense=KL.to("meta")),
        ValueError,
        "dense must be on the device of kl",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, utility_clip=3.0),
        ValueError,
        r"utility_clip must be \(low, high\) or None",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, utility_clip=(1.0, -1.0)),
        ValueError,
        "utility_clip must be .*low <= high",
    ),
    (
        lambda: lk.token_rewards(U, KL, M, beta=0.1, utility_clip=(math.nan, 1.0)),
        ValueError,
        "utility_clip must be .*low <= high",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    if "cuda" in backend and error is IndexError:
        # no host waits for a GPU: the row is NaN
        assert call().isnan().any()
        return
    with pytest.raises(error, match=message):
        call()
