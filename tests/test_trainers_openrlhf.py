"""OpenRLHF: presets and adapter against its own modules. Runs in an environment of scripts/trainer_environment.sh.

The functions that are compared are plain PyTorch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import _openrlhf
import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels.reference import ReferenceTable
from lsc_kernels.trainers import openrlhf as adapter

needs_openrlhf = pytest.mark.skipif(
    importlib.util.find_spec("openrlhf") is None,
    reason="OpenRLHF is not here; scripts/trainer_environment.sh has it",
)
UTILS, MAKER, ACTOR = _openrlhf.UTILS, _openrlhf.MAKER, _openrlhf.ACTOR


@pytest.fixture(scope="module")
def theirs() -> SimpleNamespace:
    return _openrlhf.load()


def value_and_gradient(function: Any, logp: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    value = function(leaf, *rest, **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def in_double(function: Any) -> Any:
    """A copy of theirs that does not round to fp32 on the way: the truth."""

    class Double(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return op(*args, **kwargs)

    def call(*given: Any, **options: Any) -> Any:
        with Double():
            return function(*given, **options)

    return call


def logprobs(generator: Generator, size: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    logp = -20 * torch.rand(size, generator=generator)
    scale = torch.tensor([1e-4, 0.01, 1.0, 5.0, 60.0]).repeat(size // 5)
    ref = logp - scale * torch.randn(size, generator=generator)
    return logp, ref, logp - 2 * torch.randn(size, generator=generator)


# ---- parity -------------------------------------------------------------------------------------------


@needs_openrlhf
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("gradient", ["plain", "unbiased", "weighted"])
def test_compute_approx_kl(theirs: SimpleNamespace, generator: Generator, kl: str, gradient: str) -> None:
    """Values and gradients, also where they clamp: value at 10, k3's log ratio at -10, the weight at 10."""
    logp, ref, old = logprobs(generator)
    options = {"kl_estimator": kl, "unbiased_gradient": gradient != "plain"}
    olds = [old] if gradient == "weighted" else []
    wanted = value_and_gradient(
        in_double(theirs.kl), logp.double(), ref.double(), *[each.double() for each in olds], **options
    )
    assert wanted[0].dtype is torch.float64
    ours = value_and_gradient(adapter.compute_approx_kl, logp, ref, *olds, **options)
    for mine, true in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=3e-6, atol=1e-12)


@needs_openrlhf
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_preset(theirs: SimpleNamespace, generator: Generator, kl: str) -> None:
    logp, ref, _ = logprobs(generator)
    wanted = value_and_gradient(in_double(theirs.kl), logp.double(), ref.double(), kl_estimator=kl)
    ours = value_and_gradient(
        lambda leaf: lk.kl_from_logprobs(leaf, ref, **lk.preset("openrlhf", kl=kl).token_kl), logp
    )
    for mine, true in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=3e-6, atol=1e-12)


@needs_openrlhf
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_infinities(theirs: SimpleNamespace, kl: str) -> None:
    """A token that one model forbids. The values are theirs; with the unbiased gradient theirs are NaN (inf - inf)."""
    logp, ref = torch.tensor([-1.0, -torch.inf]), torch.tensor([-torch.inf, -1.0])
    value = theirs.kl(logp, ref, kl_estimator=kl)
    assert value.abs().le(10).all() or kl == "k3"
    torch.testing.assert_close(adapter.compute_approx_kl(logp, ref, kl_estimator=kl), value, equal_nan=True)
    leaf = logp.clone().requires_grad_()
    assert theirs.kl(leaf, ref, kl_estimator=kl, unbiased_gradient=True).isnan().all()
    ours = adapter.compute_approx_kl(leaf, ref, kl_estimator=kl, unbiased_gradient=True)
    torch.testing.assert_close(ours.detach(), value, equal_nan=True)


def step(generator: Generator, batch: int = 8, length: int = 30) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards of sequences, KL, values and mask: prompts before, padding behind, holes between."""
    begin = torch.randint(0, 5, (batch, 1), generator=generator)
    end = torch.randint(10, length + 1, (batch, 1), generator=generator)
    position = torch.arange(length)
    mask = (
        (position >= begin) & (position < end) & (torch.rand(batch, length, generator=generator) < 0.8)
    ).long()
    mask[:, 7] = 1
    kl, values = torch.randn(2, batch, length, generator=generator)
    return torch.randn(batch, generator=generator), kl, values, mask


@needs_openrlhf
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("beta", [0.1, 0.0, -1.0])
def test_compute_reward(theirs: SimpleNamespace, generator: Generator, beta: float, clip: Any) -> None:
    reward, kl, _, mask = step(generator)
    wanted = theirs.reward(reward, beta, kl, action_mask=mask, reward_clip_range=clip)
    ours = adapter.compute_reward(reward, beta, kl, action_mask=mask, reward_clip_range=clip)
    torch.testing.assert_close(ours, wanted * mask, rtol=1e-6, atol=1e-6)
    if clip is None and beta > 0:
        by_preset = lk.token_rewards(reward, kl, mask, beta=beta, **lk.preset("openrlhf").token_rewards)
        assert torch.equal(ours, by_preset)


@needs_openrlhf
def test_compute_reward_on_hard_input(theirs: SimpleNamespace, generator: Generator) -> None:
    """Where theirs is NaN, or a reward where nobody acted."""
    reward, kl, values, mask = step(generator)
    hidden = mask == 0
    spoiled = kl.masked_fill(hidden, torch.nan)
    left = theirs.reward(reward, 0.1, spoiled, action_mask=mask)
    assert theirs.gae(None, values, left, mask, 1.0, 0.95)[0].isnan().any()  # NaN * 0
    assert torch.equal(
        adapter.compute_reward(reward, 0.1, spoiled, action_mask=mask),
        adapter.compute_reward(reward, 0.1, kl, action_mask=mask),
    )
    free = theirs.reward(reward, 0.0, torch.full_like(kl, torch.inf), action_mask=mask)
    assert free.isnan().all()  # 0 * inf
    ours = adapter.compute_reward(reward, 0.0, torch.full_like(kl, torch.inf), action_mask=mask)
    torch.testing.assert_close(ours.sum(-1), reward)
    nobody = torch.zeros_like(mask)
    assert (theirs.reward(reward, 0.0, kl, action_mask=nobody)[:, -1] == reward).all()
    assert not adapter.compute_reward(reward, 0.0, kl, action_mask=nobody).any()


@needs_openrlhf
@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.98, 0.9)])
def test_advantages(theirs: SimpleNamespace, generator: Generator, gamma: float, lam: float) -> None:
    """Adapter and preset: a hole costs a step, as in OpenRLHF."""
    _, rewards, values, mask = step(generator)
    wanted = theirs.gae(None, values.double(), rewards.double(), mask, gamma, lam)
    ours = adapter.get_advantages_and_returns(None, values, rewards, mask, gamma, lam)
    for mine, true in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true * mask, rtol=1e-5, atol=1e-5)
    options = lk.preset("openrlhf").gae | {"gamma": gamma, "lam": lam}
    assert torch.equal(lk.gae(rewards, values, mask, **options)[0], ours[0])
    sums = theirs.returns(None, rewards, mask, gamma) * mask
    torch.testing.assert_close(
        adapter.get_cumulative_returns(None, rewards, mask, gamma), sums, rtol=1e-5, atol=1e-5
    )


# ---- in its place -------------------------------------------------------------------------------------


@pytest.fixture
def patched(theirs: SimpleNamespace) -> Iterator[list[str]]:
    yield adapter.patch()
    adapter.unpatch()


@needs_openrlhf
def test_patch(theirs: SimpleNamespace, patched: list[str]) -> None:
    assert {f"{module}.compute_approx_kl" for module in (UTILS, MAKER, ACTOR)} <= set(patched)
    assert theirs.maker.compute_reward is theirs.utils.compute_reward is adapter.compute_reward
    assert theirs.actor.compute_approx_kl is adapter.compute_approx_kl
    assert adapter.patch() == []
    assert set(adapter.unpatch()) == set(patched) and adapter.unpatch() == []
    assert theirs.actor.compute_approx_kl is theirs.maker.compute_approx_kl is theirs.kl
    assert theirs.maker.compute_reward is theirs.reward
    assert theirs.maker.RemoteExperienceMaker.get_advantages_and_returns is theirs.gae


@needs_openrlhf
def test_patch_before_its_modules_are_imported(
    theirs: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray's setup hook meets: the module that trains comes later, and leaves with theirs all the same."""
    monkeypatch.delitem(sys.modules, ACTOR)
    try:
        assert f"{ACTOR}.compute_approx_kl" not in adapter.patch()
        later = SimpleNamespace(__name__=ACTOR, compute_approx_kl=theirs.utils.compute_approx_kl)
        assert later.compute_approx_kl is adapter.compute_approx_kl
        monkeypatch.setitem(sys.modules, ACTOR, later)
    finally:
        adapter.unpatch()
    assert later.compute_approx_kl is theirs.kl


@needs_openrlhf
def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("openrlhf").startswith("0.11.")
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.12.0")
    with pytest.raises(ImportError, match="openrlhf 0.12.0 is installed, and this adapter knows"):
        adapter.patch()


@needs_openrlhf
@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
def test_a_step_of_its_experience_maker(
    theirs: SimpleNamespace, generator: Generator, estimator: str
) -> None:
    """Its ``compute_advantages_and_returns`` on two micro-batches, before and after: what is not masked is the same."""
    algo = SimpleNamespace(
        advantage=SimpleNamespace(estimator=estimator, gamma=0.99, lambd=0.95, no_std_norm=False)
    )
    args = SimpleNamespace(
        algo=algo,
        rollout=SimpleNamespace(n_samples_per_prompt=4, max_new_tokens=30),
        reward=SimpleNamespace(
            clip_range=(-1.0, 1.0),
            overlong_buffer_len=None,
            overlong_penalty_factor=1.0,
            stop_properly_penalty_coef=None,
        ),
    )
    maker = object.__new__(theirs.maker.RemoteExperienceMaker)
    maker.args, maker.strategy, maker.kl_ctl = args, SimpleNamespace(args=args), SimpleNamespace(value=0.1)
    maker.advantage_estimator = estimator
    batches = [step(generator) for _ in range(2)]

    def experiences() -> list[Any]:
        return [
            SimpleNamespace(
                rewards=reward.clone(),
                kl=kl.clone(),
                values=values.clone(),
                action_mask=mask,
                index=list(range(8 * number, 8 * number + 8)),
                info={},
            )
            for number, (reward, kl, values, mask) in enumerate(batches)
        ]

    before = maker.compute_advantages_and_returns(experiences())
    adapter.patch()
    try:
        after = maker.compute_advantages_and_returns(experiences())
    finally:
        adapter.unpatch()
    for old, new in zip(before, after, strict=True):
        mask = old.action_mask
        torch.testing.assert_close(new.advantages * mask, old.advantages * mask, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(new.returns * mask, old.returns * mask, rtol=1e-5, atol=1e-5)


# ---- rewards ------------------------------------------------------------------------------------------


def helpful(queries: list[str], prompts: list[str], labels: list[Any]) -> list[float]:
    return [float(len(query)) for query in queries]


def harmless(queries: list[str], prompts: list[str], labels: list[Any]) -> Tensor:
    return torch.tensor([-1.0 if label == "bad" else 2.0 for label in labels])


def test_reward_func() -> None:
    """As its agent calls it, one query at a time or many; what it reads of the result."""
    function = adapter.make_reward_func(
        {"helpful": helpful, "harmless": harmless}, reference_reward={"helpful": 6.0, "harmless": 0.0}
    )
    queries, prompts, labels = ["Why? No.", "Why? Because."], ["Why?", "Why?"], ["bad", None]
    both = function(queries, prompts, labels)
    wanted = lk.aggregate_rewards(torch.tensor([[8.0, -1.0], [13.0, 2.0]]), torch.tensor([6.0, 0.0]))
    torch.testing.assert_close(both["rewards"], wanted)
    torch.testing.assert_close(both["scores"], wanted.exp())
    assert set(both) == {"rewards", "scores", "extra_logs"} and set(both["extra_logs"]) == {
        "helpful",
        "harmless",
    }
    for row in range(2):
        one = function(queries[row : row + 1], prompts[row : row + 1], labels[row : row + 1])
        assert torch.tensor([one["rewards"]]).item() == wanted[row]  # as its samples generator does
        assert one["extra_logs"]["harmless"].flatten()[0].item() == (-1.0, 2.0)[row]


def test_reward_func_with_a_table(tmp_path: Any) -> None:
    path = str(tmp_path / "table.parquet")
    ReferenceTable.fit([("Why?", "helpful", 6.0), ("How?", "helpful", 1.0)]).save(path)
    function = adapter.make_reward_func({"helpful": helpful}, reference_reward=path)
    rewards = function(["Why? No.", "How? So."], ["Why?", "How?"], [None, None])["rewards"]
    torch.testing.assert_close(rewards, lk.lsc_transform(torch.tensor([8.0, 8.0]), torch.tensor([6.0, 1.0])))


def test_reward_func_told_nonsense() -> None:
    with pytest.raises(ValueError, match="properties must be a list of names"):
        adapter.make_reward_func({}, reference_reward=0.0)
    with pytest.raises(
        ValueError, match="reference_reward names 'harmful', which is none of the properties helpful"
    ):
        adapter.make_reward_func({"helpful": helpful}, reference_reward={"harmful": 1.0})
    function = adapter.make_reward_func({"helpful": lambda *given: [1.0, 2.0]}, reference_reward=0.0)
    with pytest.raises(ValueError, match="the scorer of 'helpful' must return one score per query, 1; got 2"):
        function(["Why?"], ["Why?"], [None])
