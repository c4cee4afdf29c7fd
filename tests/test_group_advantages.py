"""group_advantages: methods, groups, gradients, what z-scores do to LSC, modes, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from _modes import compile_once, needs_native, on_one_thread
from _reward_side import DTYPES, check_against_fp64, with_gradients
from torch import Generator, Tensor

import lsc_kernels as lk

IDS = [7, -3, 7, 7, 10**12, -3, 7, 5, 5, 5]  # groups of 4, 2, 1 and 3
METHODS = ("grpo", "dr_grpo", "rloo")


def by_hand(utility: Tensor, ids: list[int], method: str, eps: float, leave_one_out: bool = False) -> Tensor:
    values = [float(u) for u in utility]
    result = []
    for value, group in zip(values, ids, strict=True):
        members = [u for u, other in zip(values, ids, strict=True) if other == group]
        if len(members) == 1:
            result.append(0.0)
            continue
        mean = sum(members) / len(members)
        baseline = (sum(members) - value) / (len(members) - 1) if leave_one_out or method == "rloo" else mean
        deviation = math.sqrt(sum((u - mean) ** 2 for u in members) / (len(members) - 1))
        divisor = deviation + eps if method == "grpo" else 1.0
        result.append((value - baseline) / divisor if divisor else 0.0)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("level", [0.0, 1e4])
def test_values(backend: str, generator: Generator, method: str, leave_one_out: bool, level: float) -> None:
    utility = torch.randn(len(IDS), generator=generator) + level
    truth = by_hand(utility, IDS, method, 1e-4, leave_one_out)
    for ids in (torch.tensor(IDS), torch.tensor([i % 1000 for i in IDS], dtype=torch.int32)):
        got = lk.group_advantages(utility, ids, method=method, leave_one_out=leave_one_out)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-7)


def test_a_group_size_is_ids_in_a_row(backend: str, generator: Generator) -> None:
    utility = torch.randn(24, generator=generator)
    for size in (1, 4, 24):
        expected = lk.group_advantages(utility, torch.arange(24) // size)
        for given in (size, np.int64(size)):
            assert torch.equal(lk.group_advantages(utility, given), expected)


@pytest.mark.parametrize("method", [*METHODS, "gdpo"])
def test_where_members_lie_does_not_matter(backend: str, generator: Generator, method: str) -> None:
    """Groups side by side, dealt out in turn, shuffled, with ids near and far: the same bits."""
    size, groups = 11, 5
    shape = (size * groups, 3) if method == "gdpo" else (size * groups,)
    utility, upstream = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    expected, (expected_gradient,) = with_gradients(
        lambda u: lk.group_advantages(u, size, method=method), upstream, [utility]
    )
    side_by_side = torch.arange(size * groups)
    in_turn = side_by_side.view(groups, size).mT.flatten()
    # a group's members keep their order: sums have one
    shuffled = torch.randint(groups, (size * groups,), generator=generator).argsort(stable=True).argsort()
    for order in (side_by_side, in_turn, shuffled):
        for far in (1, -(10**15)):
            ids = order // size * far
            got, (gradient,) = with_gradients(
                lambda u, ids=ids: lk.group_advantages(u, ids, method=method),
                upstream[order],
                [utility[order]],
            )
            assert gradient is not None and expected_gradient is not None
            if method == "gdpo":  # the batch has an order, too
                torch.testing.assert_close(got, expected[order], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(gradient, expected_gradient[order], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(got, expected[order]) and torch.equal(gradient, expected_gradient[order])


def test_a_group_depends_on_nothing_beside_it(backend: str, generator: Generator) -> None:
    utility = torch.randn(40_000 if backend == "native" else 64, generator=generator)
    whole = lk.group_advantages(utility, 8)
    assert torch.equal(whole[16:32], lk.group_advantages(utility[16:32], 8))
    with on_one_thread():
        assert torch.equal(whole, lk.group_advantages(utility, 8))


def trl_sum(rewards: Tensor, size: int, weights: Tensor, normalize_first: bool) -> Tensor:
    """The lines of TRL 1.16: ``sum_then_normalize`` with group scaling, and ``normalize_then_sum``."""
    if not normalize_first:
        total = (rewards * weights).sum(-1)
        grouped = total.view(-1, size)
        mean, std = (x.repeat_interleave(size) for x in (grouped.mean(1), grouped.std(1)))
        return (total - mean) / (std + 1e-4)
    grouped = rewards.view(-1, size, rewards.shape[-1])
    mean, std = grouped.mean(1, keepdim=True), grouped.std(1, keepdim=True)
    total = (((grouped - mean) / (std + 1e-4)).view(rewards.shape) * weights).sum(-1)
    return (total - total.mean()) / (total.std() + 1e-4)


@pytest.mark.parametrize("as_list", [False, True])
def test_trl(backend: str, generator: Generator, as_list: bool) -> None:
    rewards, weights = torch.randn(32, 3, generator=generator), [0.5, 2.0, -1.0]
    given_weights = weights if as_list else torch.tensor(weights)
    ours = lk.group_advantages(rewards, 8, method="gdpo", weights=given_weights)
    theirs = trl_sum(rewards.double(), 8, torch.tensor(weights).double(), True)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)
    plain = lk.group_advantages(rewards, 8, method="gdpo")
    torch.testing.assert_close(plain.double(), trl_sum(rewards.double(), 8, torch.ones(3).double(), True))
    summed = lk.group_advantages(rewards.sum(-1), 8)
    theirs = trl_sum(rewards, 8, torch.ones(3), False)
    torch.testing.assert_close(summed, theirs, rtol=1e-5, atol=1e-5)


def test_leave_one_out_is_rloo_of_trl(backend: str, generator: Generator) -> None:
    """TRL's RLOO trainer: the baseline is (sum - own) / (n - 1)."""
    rewards = torch.randn(6, 4, generator=generator)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / 3
    for method, options in (("rloo", {}), ("dr_grpo", {"leave_one_out": True})):
        got = lk.group_advantages(rewards.flatten(), 4, method=method, **options)
        torch.testing.assert_close(got, (rewards - baseline).flatten(), rtol=1e-5, atol=1e-6)


def test_equal_and_lonely_members_have_none(backend: str) -> None:
    # in fp64 the sum of the first three, over three, is none of them
    for method, dtype in itertools.product(METHODS, (torch.float32, torch.float64)):
        utility = torch.tensor([0.1, 0.1, 0.1, 1.7], dtype=dtype)
        for eps in (0.0, 1e-4):
            got, (gradient,) = with_gradients(
                lambda u, m=method, e=eps: lk.group_advantages(
                    u, torch.tensor([0, 0, 0, 1]), method=m, eps=e
                ),
                torch.ones(4, dtype=dtype),
                [utility],
            )
            assert got.tolist() == [0.0] * 4
            assert gradient is not None and gradient.isfinite().all() and gradient[3] == 0
    alone = lk.group_advantages(torch.tensor([[1.0, 2.0]]), 1, method="gdpo")
    assert alone.tolist() == [0.0]


def test_nan_spoils_its_group_only(backend: str, generator: Generator) -> None:
    utility = torch.randn(6, generator=generator)
    expected = lk.group_advantages(utility, 3)
    utility[4] = torch.nan
    got = lk.group_advantages(utility, 3)
    assert torch.equal(got[:3], expected[:3]) and got[3:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", [*METHODS, "gdpo"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gradients(
    backend: str, generator: Generator, dtype: torch.dtype, method: str, leave_one_out: bool
) -> None:
    shape = (len(IDS), 3) if method == "gdpo" else (len(IDS),)
    utility = torch.randn(shape, generator=generator).to(dtype)
    # with gdpo the score of one that is alone is what rounding leaves of the batch's mean
    ids = torch.tensor([5 if method == "gdpo" and i == 10**12 else i for i in IDS])
    upstream = torch.randn(len(IDS), generator=generator)
    options: dict[str, Any] = {"weights": [1.0, 0.5, 2.0]} if method == "gdpo" else {}
    check_against_fp64(
        lambda u: lk.group_advantages(u, ids, method=method, leave_one_out=leave_one_out, **options),
        upstream,
        [utility],
        1e-6,
    )


@pytest.mark.parametrize("method", [*METHODS, "gdpo"])
def test_gradcheck(generator: Generator, method: str) -> None:
    shape = (len(IDS), 3) if method == "gdpo" else (len(IDS),)
    utility = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    for leave_one_out in (False, True):
        assert torch.autograd.gradcheck(
            lambda u, without=leave_one_out: lk.group_advantages(
                u, torch.tensor(IDS), method=method, leave_one_out=without
            ),
            utility,
        )


def test_group_z_scores_undo_lsc(backend: str, generator: Generator) -> None:
    """What the docstring warns of, over 4000 groups of eight samples: docs/numerics.md, part 4."""
    noise = torch.randn(4000, 8, generator=generator)

    def z_scores(level: float) -> tuple[Tensor, Tensor, Tensor]:
        reward = level + noise
        utility = lk.lsc_transform(reward, 0.0)
        z, raw_z = (lk.group_advantages(x.flatten(), 8).reshape(-1, 8) for x in (utility, reward))
        correlation = torch.nn.functional.cosine_similarity(z, raw_z)  # both are centred
        return utility.std(-1).median(), correlation.median(), z.std(-1).median()

    spread, correlation, scale = z_scores(6.0)
    assert 2.8e-3 < spread < 3.6e-3 and 0.92 < correlation < 0.945 and 0.95 < scale < 0.98
    # the 1e-4 decides: the same differences, scaled far below 1
    spread, correlation, scale = z_scores(12.0)
    assert spread < 1e-5 and 0.92 < correlation < 0.945 and 0.06 < scale < 0.09
    # without the division what is good enough earns little
    plain, raw = (
        lk.group_advantages(x.flatten(), 8, method="dr_grpo")
        for x in (lk.lsc_transform(6 + noise, 0.0), noise)
    )
    assert plain.abs().median() < raw.abs().median() / 100


def test_any_strides_and_no_samples(backend: str, generator: Generator) -> None:
    table = torch.randn(12, 4, generator=generator)
    ids = torch.randint(3, (24,), generator=generator)
    assert torch.equal(
        lk.group_advantages(table[:, 1], ids[::2]),
        lk.group_advantages(table[:, 1].contiguous(), ids[::2].contiguous()),
    )
    expected = lk.group_advantages(table.mT.contiguous().mT, 3, method="gdpo")
    assert torch.equal(lk.group_advantages(table, 3, method="gdpo"), expected)
    none = torch.zeros(0, dtype=torch.int64)
    for shape, method, group in itertools.product(((0,), (0, 3)), ("grpo", "gdpo"), (4, none, none.int())):
        if (method == "gdpo") is (shape == (0, 3)):
            _, (gradient,) = with_gradients(
                lambda u, m=method, g=group: lk.group_advantages(u, g, method=m),
                torch.zeros(0),
                [torch.zeros(shape)],
            )
            assert gradient is not None and gradient.shape == shape


def test_modes(backend: str, generator: Generator) -> None:
    utility = torch.randn(8, generator=generator).requires_grad_()
    expected = lk.group_advantages(utility, 4)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(lk.group_advantages(utility, 4), expected)
    leaf = torch.ones(8, requires_grad=True)
    (first,) = torch.autograd.grad(expected, utility, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="group_advantages has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    calls = [
        (torch.randn(n, 3, generator=generator).requires_grad_(), torch.randint(3, (n,), generator=generator))
        for n in (6, 9, 14)
    ]
    compile_once(lambda u, g: [lk.group_advantages(u, g, method="gdpo")], calls)
    compile_once(lambda u, g: [lk.group_advantages(u[:, 0], g, method="rloo")], calls)


@needs_native
def test_opcheck(generator: Generator) -> None:
    ops, ids = torch.ops.lsc_kernels, torch.tensor(IDS)
    utility = torch.randn(len(IDS), 3, generator=generator)
    for groups, weights in (((ids, 0), None), ((None, 5), torch.ones(3).double())):
        arguments = (utility, *groups, weights, True, False, True, 1e-4)
        torch.library.opcheck(ops.group_advantages_forward, arguments)
        torch.library.opcheck(ops.group_advantages_backward, (torch.ones(len(IDS)), *arguments))


U, UK = torch.zeros(6), torch.zeros(6, 2)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.group_advantages([0.0], 1), TypeError, "utility must be a tensor; got list"),
    (lambda: lk.group_advantages(U.long(), 3), TypeError, "utility must be float32.*got torch.int64"),
    (
        lambda: lk.group_advantages(UK, 3),
        ValueError,
        r"utility must be \[B\] with method='grpo'; got \[6, 2\]",
    ),
    (
        lambda: lk.group_advantages(U, 3, method="gdpo"),
        ValueError,
        r"utility must be \[B, K\] with method='gdpo'; got \[6\]",
    ),
    (lambda: lk.group_advantages(U, 4), ValueError, r"group must be a size >= 1 that divides B = 6.*got 4"),
    (lambda: lk.group_advantages(U, 0), ValueError, "group must be a size >= 1"),
    (
        lambda: lk.group_advantages(U, True),
        TypeError,
        "group must be a tensor of ids or a group size; got bool",
    ),
    (
        lambda: lk.group_advantages(U, 3.0),
        TypeError,
        "group must be a tensor of ids or a group size; got float",
    ),
    (
        lambda: lk.group_advantages(U, [0] * 6),
        TypeError,
        "group must be a tensor of ids or a group size; got list",
    ),
    (lambda: lk.group_advantages(U, U), TypeError, "group must be int64 or int32"),
    (lambda: lk.group_advantages(U, np.arange(6) // 3), TypeError, "group must be a tensor.*got ndarray"),
    (
        lambda: lk.group_advantages(U, torch.zeros(5).long()),
        ValueError,
        r"group must have .*\[6\]; got \[5\]",
    ),
    (
        lambda: lk.group_advantages(U, U.long().to("meta")),
        ValueError,
        "group must be on the device of utility",
    ),
    (
        lambda: lk.group_advantages(U, 3, method="ppo"),
        ValueError,
        "method must be one of grpo, .*; got 'ppo'",
    ),
    (lambda: lk.group_advantages(U, 3, eps=-1.0), ValueError, "eps must be >= 0; got -1.0"),
    (lambda: lk.group_advantages(U, 3, eps=math.nan), ValueError, "eps must be finite; got nan"),
    (lambda: lk.group_advantages(U, 3, leave_one_out=1), TypeError, "leave_one_out must be a bool; got int"),
    (
        lambda: lk.group_advantages(U, 3, weights=[1.0]),
        ValueError,
        "weights are those of the properties in method",
    ),
    (
        lambda: lk.group_advantages(UK, 3, method="gdpo", weights=[1.0]),
        ValueError,
        r"weights must have .*\[2\]; got \[1\]",
    ),
    (
        lambda: lk.group_advantages(UK, 3, method="gdpo", weights=torch.ones(2, requires_grad=True)),
        ValueError,
        "weights has no gradient here",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
