"""The CUDA kernels' own promises: launches, rows shared by blocks, barriers. The emulation runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import _emulated
import pytest
import torch
from _cases import logit_pair, normal, sampled_actions
from _modes import TorchLaunches
from _sequences import packed_gae
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels import native

pytestmark = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    before = lk.get_backend()
    with _emulated.serving():
        lk.set_backend("native")
        yield
        lk.set_backend(before)


def forward_and_backward(policy: Tensor, ref: Tensor, actions: Tensor, kl: str) -> tuple[Tensor, ...]:
    x, y = policy.clone().requires_grad_(), ref.clone().requires_grad_()
    out = lk.token_kl(x, y, actions, kl=kl)
    return *out, *torch.autograd.grad([each.sum() for each in out], (x, y))


@pytest.mark.parametrize("kl", ["k3", "full", "full_reverse"])
@pytest.mark.parametrize("regime", ["near_1e-2", "independent", "ramp_up", "outlier_at_largest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bits_however_many_blocks_share_it(
    generator: Generator, kl: str, regime: str, dtype: torch.dtype
) -> None:
    policy, ref = logit_pair(generator, regime, (2, 140001), dtype)
    actions = sampled_actions(generator, policy)
    alone = None
    for multiprocessors in (0, 1, 40):
        with _emulated.schedule(multiprocessors=multiprocessors):
            got = forward_and_backward(policy, ref, actions, kl)
        alone = alone or got
        for a, b in zip(alone, got, strict=True):
            assert torch.equal(a, b)


def test_a_launch_leaves_its_counters_for_the_next(generator: Generator) -> None:
    """Rows, chunks and blocks that share a row differ from launch to launch; nothing else sets the counters to 0."""
    for rows, vocabulary, multiprocessors in ((3, 70001, 5), (7, 140001, 40), (2, 140001, 2), (7, 33000, 40)):
        policy, ref = logit_pair(generator, "near_1e-1", (rows, vocabulary))
        actions = sampled_actions(generator, policy)
        actions[rows // 2] = -100
        expected = lk.token_kl(policy, ref, actions)
        with _emulated.schedule(seed=rows, multiprocessors=multiprocessors):
            got = lk.token_kl(policy, ref, actions)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("kl", ["k3", "full_reverse"])
def test_no_result_depends_on_the_order_of_threads_and_blocks(generator: Generator, kl: str) -> None:
    """A barrier that is missing shows as a difference, or as the NaN that shared memory is filled with."""
    policy, ref = logit_pair(generator, "steps", (3, 70001))
    actions = sampled_actions(generator, policy)
    expected = forward_and_backward(policy, ref, actions, kl)
    for seed in (1, 2, 3):
        with _emulated.schedule(seed=seed, multiprocessors=2 * seed):
            got = forward_and_backward(policy, ref, actions, kl)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocabulary", [1031, 4099, 4105, 33801])
def test_a_row_is_the_same_bits_wherever_it_lies(
    generator: Generator, vocabulary: int, dtype: torch.dtype
) -> None:
    """Rows of an odd vocabulary begin at every alignment: the models' at the same one, and each at its own."""
    policy, ref = logit_pair(generator, "near_1e-1", (1, vocabulary), dtype)
    actions = sampled_actions(generator, policy)
    expected: tuple[Tensor, ...] | None = None
    for before, behind in ((0, 0), (1, 2), (3, 1)):
        x = policy.repeat(9, 1).requires_grad_()
        y = torch.full((9, before + vocabulary + behind), torch.nan, dtype=dtype)
        y[:, before : before + vocabulary] = ref
        y = y[:, before : before + vocabulary].requires_grad_()
        out = lk.token_kl(x, y, actions.repeat(9), kl="full")
        alone = lk.token_logprobs(y, actions.repeat(9))
        gradients = torch.autograd.grad(out.kl.sum() + out.logprobs.sum(), (x, y))
        of_policy = torch.autograd.grad(lk.token_kl(x, y.detach(), actions.repeat(9), kl="k3").kl.sum(), x)
        of_alone = torch.autograd.grad(alone.entropy.sum(), y)
        got = *out, alone.logprobs, alone.entropy, *gradients, *of_policy, *of_alone
        expected = expected or tuple(output[:1] for output in got)
        for output, first in zip(got, expected, strict=True):
            assert torch.equal(output, first.expand_as(output))


def test_one_launch_forward_and_one_backward(generator: Generator) -> None:
    policy, ref = logit_pair(generator, "near_1e-1", (5, 1000))
    actions = sampled_actions(generator, policy)
    x, y = policy.requires_grad_(), ref.requires_grad_()
    before = _emulated.launches()
    out = lk.token_kl(x, y, actions, kl="full")
    assert _emulated.launches() - before == 1
    torch.autograd.grad(out.kl.sum() + out.entropy.sum(), (x, y))
    assert _emulated.launches() - before == 2
    lk.token_logprobs(policy.detach(), actions)
    assert _emulated.launches() - before == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_an_action_outside_makes_its_row_nan(generator: Generator, dtype: torch.dtype) -> None:
    policy, ref = logit_pair(generator, "near_1e-1", (4, 100))
    actions = torch.tensor([3, 100, -1, -100], dtype=dtype)
    policy.requires_grad_()
    out = lk.token_kl(policy, ref, actions)
    (gradient,) = torch.autograd.grad(out.kl.nan_to_num().sum() + out.logprobs.sum(), policy)
    for each in (*out, gradient):
        assert each[0].isfinite().all() and each[1].isnan().all() and each[2].isnan().all()
        assert (each[3] == 0).all()


def chain(generator: Generator, batch: int, length: int, vocabulary: int, **changes: Any) -> dict[str, Any]:
    """shaped_rewards in bf16, from everything that has a gradient."""
    dtype = torch.bfloat16
    policy, ref = logit_pair(generator, "near_1e-1", (batch, length, vocabulary), dtype)
    return {
        "hidden": normal(generator, batch, length, 16).to(dtype).requires_grad_(),
        "weight": normal(generator, 5, 16).to(dtype).requires_grad_(),
        "reference_reward": normal(generator, batch, 5).requires_grad_(),
        "policy": policy.requires_grad_(),
        "ref": ref,
        "actions": sampled_actions(generator, policy.detach()),
        "mask": torch.ones(batch, length, dtype=torch.int64),
        "beta": 0.1,
        "bias": normal(generator, 5).to(dtype).requires_grad_(),
        "attention_mask": torch.ones(batch, length),
    } | changes


FORMULA = "at_least(2, 0, ~1, 2) | (3 & 4)"


@pytest.mark.parametrize("formula", [None, FORMULA])
@pytest.mark.parametrize("placement", ["last", "before_last"])
def test_shaped_rewards_is_one_launch(generator: Generator, placement: str, formula: str | None) -> None:
    """PyTorch launches nothing either, whatever the dtypes of mask, weight and bias."""
    arguments = chain(generator, 3, 4, 50, placement=placement, formula=formula)
    before = _emulated.launches()
    with TorchLaunches() as launched:
        out = lk.shaped_rewards(**arguments)
    assert _emulated.launches() - before == 1 and launched.torch == []

    logprobs = {"policy_logprobs": out.logprobs.detach(), "ref_logprobs": out.ref_logprobs.detach()}
    given = arguments | logprobs | {"policy": None, "ref": None, "actions": None}
    before = _emulated.launches()
    with TorchLaunches() as launched:
        lk.shaped_rewards(**given)
    assert _emulated.launches() - before == 1 and launched.torch == []


@pytest.mark.parametrize("formula", [None, FORMULA])
def test_launches_of_shaped_rewards_backward(generator: Generator, formula: str | None) -> None:
    """Placement and token rows; with the reward side also aggregation, and three of the head: where it read, hidden
    states, weights."""
    arguments = chain(generator, 3, 4, 50, formula=formula)
    names = ("hidden", "weight", "bias", "reference_reward", "policy")
    for wanted, launches in ((names, 6), (("policy",), 2)):
        detached = {name: arguments[name].detach().requires_grad_(name in wanted) for name in names}
        rewards = lk.shaped_rewards(**(arguments | detached)).rewards
        before = _emulated.launches()
        torch.autograd.grad(rewards, [detached[name] for name in wanted], torch.ones_like(rewards))
        assert _emulated.launches() - before == launches


@pytest.mark.parametrize("kl", ["k3", "full_reverse"])
def test_shaped_rewards_are_the_same_bits_however_blocks_share_rows(generator: Generator, kl: str) -> None:
    arguments = chain(generator, 2, 2, 70001, kl=kl, formula=FORMULA)
    expected = None
    for seed, multiprocessors in ((0, 0), (0, 1), (1, 8), (2, 40)):
        with _emulated.schedule(seed=seed, multiprocessors=multiprocessors):
            got = lk.shaped_rewards(**arguments)
        expected = expected or got
        for a, b in zip(expected, got, strict=True):
            assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize("name", ["actions", "placement_index"])
def test_an_index_outside_makes_its_rewards_nan(generator: Generator, name: str) -> None:
    """Nobody waits for a GPU, so nobody raises."""
    arguments = chain(generator, 3, 4, 50, placement_index=torch.tensor([1, 0, 3]), placement="index")
    expected = lk.shaped_rewards(**arguments)
    wrong = arguments[name].clone()
    wrong[1] = 10**6
    got = lk.shaped_rewards(**(arguments | {name: wrong}))
    assert got.rewards[1].isnan().all() and torch.equal(got.rewards[::2], expected.rewards[::2])
    assert torch.equal(got.utility, expected.utility)
    if name == "placement_index":
        assert torch.equal(got.kl, expected.kl)


@pytest.mark.parametrize("holes", ["skip", "zero", "cut"])
def test_a_sequence_is_the_same_bits_however_many_blocks_share_it(generator: Generator, holes: str) -> None:
    both, check_last = packed_gae(generator, [5000, 0, 1, 2048, 6001], holes)
    # with 0 multiprocessors a block takes a sequence, with 40 a tile
    alone = None
    for multiprocessors, launches, seed in ((0, 2, 0), (40, 4, 0), (0, 2, 1), (40, 4, 2)):
        before = _emulated.launches()
        with _emulated.schedule(seed=seed, multiprocessors=multiprocessors):
            got = both()
        assert _emulated.launches() - before == launches
        alone = alone or got
        assert all(torch.equal(a, b) for a, b in zip(alone, got, strict=True))
    check_last(got)


def test_groups_and_moments_do_not_depend_on_the_order_of_threads_and_blocks(generator: Generator) -> None:
    utility, ids = torch.randn(300, 2, generator=generator), torch.randint(20, (300,), generator=generator)
    x = torch.randn(9, 1001, generator=generator)
    expected = None
    for seed in range(3):
        with _emulated.schedule(seed=seed):
            leaves = utility.clone().requires_grad_(), x.clone().requires_grad_()
            outputs = lk.group_advantages(leaves[0], ids, method="gdpo"), lk.masked_whiten(leaves[1], x > -1)
            gradients = torch.autograd.grad([each.square().sum() for each in outputs], leaves)
        got = [*outputs, *gradients]
        expected = expected or got
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
