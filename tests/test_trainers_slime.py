"""slime: the custom functions on what slime 0.3.1 passes, against its formulas written out.

No package index has it, and its modules import Megatron: what it defines is told again here."""

from __future__ import annotations

import asyncio
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_presets import slime as slime_kl
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels.reference import ReferenceTable
from lsc_kernels.trainers import slime as adapter
from lsc_kernels.trainers._rewards import GroupScalingWarning
from lsc_kernels.trainers._versions import UnknownVersion


@dataclass
class Sample:
    """What of ``slime.utils.types.Sample`` these functions touch."""

    prompt: str | list[dict[str, str]] = ""
    response: str = ""
    group_index: int | None = None
    reward: float | dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args: Namespace) -> Any:
        return self.reward if not args.reward_key else self.reward[args.reward_key]  # type: ignore[index]


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    module = ModuleType("scorers_of_a_test")

    async def helpful(args: Namespace, sample: Sample) -> float:
        await asyncio.sleep(0)
        return float(len(sample.response))

    def harmless(args: Namespace, sample: Sample) -> float | None:
        return None if sample.response == "?" else -1.0

    module.helpful, module.harmless = helpful, harmless  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield {"helpful": f"{module.__name__}.helpful", "harmless": f"{module.__name__}.harmless"}
    adapter._rewards.cache_clear()


def arguments(scorers: dict[str, str], *, reward_key: str | None = "utility", **options: Any) -> Namespace:
    return Namespace(reward_key=reward_key, lsc={"scorers": scorers, **options})


def test_custom_rm(scorers: dict[str, str]) -> None:
    """One sample; the samples of a group; a sample's own reference; a score that is missing."""
    args = arguments(scorers, reference_reward={"helpful": 3.0, "harmless": 0.0}, missing="ignore")
    samples = [
        Sample("Why?", "No."),
        Sample("Why?", "Because.", metadata={"reference_reward": [8.0, -1.0]}),
        Sample("Why?", "?"),
    ]
    wanted = lk.aggregate_rewards(
        torch.tensor([[3.0, -1.0], [8.0, -1.0], [1.0, torch.nan]]),
        torch.tensor([[3.0, 0.0], [8.0, -1.0], [3.0, 0.0]]),
        missing="ignore",
    )
    together = asyncio.run(adapter.custom_rm(args, samples))
    for sample, reward, utility in zip(samples, together, wanted.tolist(), strict=True):
        assert reward == asyncio.run(adapter.custom_rm(args, sample))
        sample.reward = reward
        assert sample.get_reward_value(args) == pytest.approx(utility)
    assert together[2]["harmless"] is None and together[1]["helpful"] == 8.0


def test_custom_rm_with_a_table(scorers: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "table.parquet")
    rows = [(p, k, r) for p, r in (("Why?", 1.0), ("How?", 5.0)) for k in ("harmless", "helpful")]
    ReferenceTable.fit(rows).save(path)
    args = arguments(scorers, reference_reward=path)
    chat = [{"role": "system", "content": "x"}, {"role": "user", "content": "How?"}]
    found = asyncio.run(adapter.custom_rm(args, [Sample("Why?", "No."), Sample(chat, "No.")]))
    wanted = lk.aggregate_rewards(torch.tensor([3.0, -1.0]), torch.tensor([[1.0], [5.0]]))
    assert [each["utility"] for each in found] == pytest.approx(wanted.tolist())


@pytest.mark.parametrize(
    "args, message",
    [
        (Namespace(reward_key=None, lsc={}), "set --reward-key utility; got None"),
        (Namespace(reward_key="utility"), "lsc.scorers .* must be a mapping .*; got None"),
        (Namespace(reward_key="utility", lsc=["helpful"]), "lsc .* must be a mapping; got"),
        (Namespace(reward_key="utility", lsc={"scorers": {"a": "math.sqrt"}, "scal": 1}), "no option 'scal'"),
        (Namespace(reward_key="utility", lsc={"scorers": {"a": "math.prod"}}), "reference_reward must be"),
    ],
)
def test_custom_rm_told_nonsense(args: Namespace, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("math.prod", lambda args, sample: 1.0)
    with pytest.raises(ValueError, match=message):
        asyncio.run(adapter.custom_rm(args, Sample("Why?", "No.")))


def post_process_args(**options: Any) -> Namespace:
    given = dict(
        reward_key="utility",
        advantage_estimator="grpo",
        rewards_normalization=True,
        grpo_std_normalization=True,
        n_samples_per_prompt=4,
        rollout_batch_size=3,
    )
    return Namespace(**given | options)


def slimes_own(args: Namespace, raw: Tensor) -> Tensor:
    rewards = raw.reshape(-1, args.n_samples_per_prompt)
    rewards = rewards - rewards.mean(-1, keepdim=True)
    if args.advantage_estimator in ("grpo", "gspo", "cispo") and args.grpo_std_normalization:
        rewards = rewards / (rewards.std(-1, keepdim=True) + 1e-6)
    return rewards.flatten()


@pytest.mark.parametrize("by_index", [False, True])
@pytest.mark.parametrize(
    "estimator, scaled", [("grpo", True), ("grpo", False), ("reinforce_plus_plus_baseline", True)]
)
def test_post_process(generator: Generator, estimator: str, scaled: bool, by_index: bool) -> None:
    """As slime; with the samples' own indices also where the groups are mixed."""
    raw = torch.randn(12, generator=generator)
    args = post_process_args(advantage_estimator=estimator, grpo_std_normalization=scaled)
    order = torch.randperm(12, generator=generator) if by_index else torch.arange(12)
    samples = [
        Sample(group_index=i // 4 if by_index else None, reward={"utility": raw[i].item()})
        for i in order.tolist()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GroupScalingWarning)
        logged, rewards = adapter.custom_reward_post_process(args, samples)
    assert logged == raw[order].tolist()
    wanted = slimes_own(args, raw.double())[order]
    torch.testing.assert_close(torch.tensor(rewards).double(), wanted, rtol=1e-5, atol=1e-6)


def test_post_process_by_other_options() -> None:
    samples = [Sample(reward={"utility": each}) for each in (0.0, -1.0, -2.0, -5.0)]
    raw = [0.0, -1.0, -2.0, -5.0]
    assert adapter.custom_reward_post_process(post_process_args(advantage_estimator="ppo"), samples) == (
        raw,
        raw,
    )
    assert adapter.custom_reward_post_process(post_process_args(rewards_normalization=False), samples) == (
        raw,
        raw,
    )
    with pytest.warns(GroupScalingWarning, match="--disable-grpo-std-normalization"):
        adapter.custom_reward_post_process(post_process_args(), samples)
    _, rewards = adapter.custom_reward_post_process(post_process_args(lsc={"group": "rloo"}), samples)
    assert rewards == pytest.approx([8 / 3, 4 / 3, 0.0, -4.0])
    with pytest.raises(ValueError, match="lsc.group must be one of dr_grpo, grpo, rloo; got 'gdpo'"):
        adapter.custom_reward_post_process(post_process_args(lsc={"group": "gdpo"}), samples)


# ---- advantages ---------------------------------------------------------------------------------------


def rollout(generator: Generator, lengths: tuple[int, ...] = (5, 1, 12, 7)) -> dict[str, Any]:
    """As slime has it: a tensor for each response, rewards as numbers, loss masks with holes."""
    masks = [(torch.rand(n, generator=generator) < 0.7).int() for n in lengths]
    for mask in masks:
        mask[0] = 1
    return {
        "kl": [torch.randn(n, generator=generator) for n in lengths],
        "values": [torch.randn(n, generator=generator) for n in lengths],
        "rewards": torch.randn(len(lengths), generator=generator).tolist(),
        "loss_masks": masks,
        "response_lengths": list(lengths),
        "total_lengths": [n + 3 for n in lengths],
    }


def slimes_advantages(args: Namespace, data: dict[str, Any], row: int) -> tuple[Tensor, Tensor]:
    """The formulas of ``compute_advantages_and_returns``, one response at a time, in fp64."""
    kl, reward = data["kl"][row].double(), data["rewards"][row]
    if args.advantage_estimator in ("grpo", "gspo", "cispo"):
        both = torch.ones_like(kl) * reward
        return both, both
    if args.advantage_estimator == "reinforce_plus_plus_baseline":
        both = torch.ones_like(kl) * reward - args.kl_coef * kl
        return both, both
    values = data["values"][row].double()
    mask = data["loss_masks"][row]
    rewards = -args.kl_coef * (kl if args.advantage_estimator == "ppo" else kl * mask)
    at = -1 if args.advantage_estimator == "ppo" else mask.nonzero()[-1, 0]
    rewards[at] += reward
    last, advantages = torch.zeros(()).double(), []
    for t in reversed(range(len(kl))):
        if args.advantage_estimator == "reinforce_plus_plus":
            last = rewards[t] + args.gamma * last
        else:
            following = values[t + 1] if t + 1 < len(kl) else 0.0
            last = rewards[t] + args.gamma * following - values[t] + args.gamma * args.lambd * last
        advantages.append(last)
    found = torch.stack(advantages[::-1])
    return (found, found) if args.advantage_estimator == "reinforce_plus_plus" else (found, found + values)


@pytest.mark.parametrize("gamma, lambd", [(1.0, 1.0), (0.98, 0.9)])
@pytest.mark.parametrize(
    "estimator", ["grpo", "gspo", "cispo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]
)
def test_custom_advantage(generator: Generator, estimator: str, gamma: float, lambd: float) -> None:
    args = Namespace(advantage_estimator=estimator, kl_coef=0.1, gamma=gamma, lambd=lambd)
    data = rollout(generator)
    before = [each.clone() for each in data["kl"]]
    adapter.custom_advantage(args, data)
    for row, length in enumerate(data["response_lengths"]):
        for name, wanted in zip(("advantages", "returns"), slimes_advantages(args, data, row), strict=True):
            assert data[name][row].shape == (length,)
            torch.testing.assert_close(data[name][row].double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(data["kl"][row], before[row])


def test_custom_advantage_on_hard_input(generator: Generator) -> None:
    """Nothing that counts, an empty response, NaN under the loss mask; slime raises or makes the response NaN."""
    args = Namespace(advantage_estimator="reinforce_plus_plus", kl_coef=0.1, gamma=1.0, lambd=1.0)
    data = rollout(generator, (3, 1, 4))
    data["loss_masks"][1] = torch.zeros(1)
    data["loss_masks"][2] = torch.tensor([1, 0, 1, 0])
    data["kl"][2] = torch.tensor([1.0, torch.nan, 2.0, torch.inf])
    adapter.custom_advantage(args, data)
    assert not data["returns"][1].any()
    wanted = data["rewards"][2] - 0.1 * torch.tensor([3.0, 2.0, 2.0, 0.0])
    torch.testing.assert_close(data["returns"][2][:3], wanted[:3])
    assert data["returns"][2][3] == 0
    ppo = Namespace(advantage_estimator="ppo", kl_coef=0.0, gamma=1.0, lambd=1.0)
    empty = {
        "kl": [torch.zeros(2), torch.zeros(0)],
        "values": [torch.zeros(2), torch.zeros(0)],
        "rewards": [1.0, 5.0],
    }
    adapter.custom_advantage(ppo, empty)
    assert empty["returns"][0].tolist() == [1.0, 1.0] and empty["returns"][1].shape == (0,)


def test_custom_advantage_refuses() -> None:
    data: dict[str, Any] = {"kl": [torch.zeros(2)], "rewards": [1.0], "loss_masks": [torch.ones(2)]}
    args = Namespace(advantage_estimator="grpo", kl_coef=0.0, gamma=1.0, lambd=1.0, context_parallel_size=2)
    with pytest.raises(NotImplementedError, match="got context_parallel_size=2"):
        adapter.custom_advantage(args, data)
    args = Namespace(advantage_estimator="vtrace", kl_coef=0.0)
    with pytest.raises(ValueError, match="advantage_estimator must be one of grpo, .*; got 'vtrace'"):
        adapter.custom_advantage(args, data)


# ---- the loss -----------------------------------------------------------------------------------------


def slimes_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    plain = "k3" if kl_loss_type == "low_var_kl" and importance_ratio is not None else kl_loss_type
    value = slime_kl(log_probs, log_probs_base, plain)
    if importance_ratio is None:
        return value
    value = importance_ratio * value
    return value.clamp(min=-10, max=10) if kl_loss_type == "low_var_kl" else value


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "low_var_kl"])
@pytest.mark.parametrize("weighted", [False, True])
def test_compute_approx_kl(generator: Generator, kl: str, weighted: bool) -> None:
    """Values and gradients, through the importance ratio too; from d = 1e-4 to where the clamp acts."""
    logp = -10 * torch.rand(900, generator=generator)
    scale = torch.tensor([1e-4, 0.1, 4.0]).repeat(300)
    ref = logp - scale * torch.randn(900, generator=generator)
    old = logp - 0.5 * torch.randn(900, generator=generator)
    found = []
    for function, dtype in ((adapter.compute_approx_kl, torch.float32), (slimes_kl, torch.float64)):
        leaf = logp.to(dtype).requires_grad_()
        ratio = torch.exp(leaf - old.to(dtype)) if weighted else None
        value = function(leaf, ref.to(dtype), kl, ratio)
        found.append((value.detach().double(), torch.autograd.grad(value.sum(), leaf)[0].double()))
    (value, gradient), (true_value, true_gradient) = found
    torch.testing.assert_close(value, true_value, rtol=1e-5, atol=1e-9)
    # the ratio's own gradient and the estimate's nearly cancel: what is left cannot be better than they are
    allowed = 1e-9 + 1e-5 * (true_gradient.abs() + (2 * true_value.abs() if weighted else 0.0))
    assert ((gradient - true_gradient).abs() <= allowed).all()


def test_where_exp_overflows() -> None:
    """A token far off: slime's clamp after exp gives 0 * inf, a NaN gradient; here the clamped element has none."""
    for ratio in (None, torch.ones(2)):
        leaf = torch.tensor([-200.0, -1.0], requires_grad=True)
        base = torch.tensor([-1.0, -1.5])
        (theirs,) = torch.autograd.grad(slimes_kl(leaf, base, "low_var_kl", ratio).sum(), leaf)
        assert theirs[0].isnan()
        value = adapter.compute_approx_kl(leaf, base, "low_var_kl", ratio)
        (ours,) = torch.autograd.grad(value.sum(), leaf)
        assert value[0] == 10 and ours[0] == 0 and ours[1] == pytest.approx(theirs[1].item())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """slime's modules as they import one another, with a policy loss that shows which function it calls."""
    utils, loss = ModuleType("slime.utils.ppo_utils"), ModuleType("slime.backends.megatron_utils.loss")
    utils.compute_approx_kl = loss.compute_approx_kl = slimes_kl  # type: ignore[attr-defined]

    def policy_loss_function(args: Any, batch: Any, logits: Any, sum_of_sample_mean: Any) -> Any:
        kl = loss.compute_approx_kl(
            batch["log_probs"], batch["ref_log_probs"], kl_loss_type=args.kl_loss_type
        )
        return sum_of_sample_mean(kl), {"function": loss.compute_approx_kl}

    loss.policy_loss_function = policy_loss_function  # type: ignore[attr-defined]
    for name in ("slime", "slime.utils", "slime.backends", "slime.backends.megatron_utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for module in (utils, loss):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    adapter._check_version.cache_clear()
    yield loss
    adapter._check_version.cache_clear()


def test_custom_loss(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"log_probs": torch.tensor([-1.0, -2.0]), "ref_log_probs": torch.tensor([-1.5, -2.0])}
    given = (Namespace(kl_loss_type="k3"), batch, torch.zeros(1, 2, 5), torch.sum)
    monkeypatch.setattr(adapter.metadata, "version", lambda package: "0.3.1")
    loss, log = adapter.custom_loss(*given)
    assert log["function"] is adapter.compute_approx_kl
    assert stand_in.compute_approx_kl is slimes_kl  # type: ignore[attr-defined]
    torch.testing.assert_close(loss, stand_in.policy_loss_function(*given)[0])  # type: ignore[attr-defined]
    adapter._check_version.cache_clear()
    monkeypatch.setattr(adapter.metadata, "version", lambda package: "0.4.0")
    with pytest.raises(UnknownVersion, match="slime 0.4.0 is installed, and this adapter knows 0.3"):
        adapter.custom_loss(*given)
