"""verl: presets and adapter against verl's own functions. Runs in an environment of scripts/trainer_environment.sh."""

from __future__ import annotations

import asyncio
import importlib
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels.reference import ReferenceTable
from lsc_kernels.trainers import verl as adapter
from lsc_kernels.trainers._rewards import GroupScalingWarning

pytest.importorskip("verl", reason="verl is not installed here; scripts/trainer_environment.sh has it")

import numpy as np  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transfer_queue import KVBatchMeta  # noqa: E402
from verl import DataProto  # noqa: E402
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager  # noqa: E402
from verl.trainer.ppo import core_algos, ray_trainer  # noqa: E402
from verl.trainer.ppo.reward import load_reward_manager  # noqa: E402
from verl.trainer.ppo.v1 import PPOTrainerSync, trainer_base  # noqa: E402

from lsc_kernels.trainers import _verl_plugin as plugin  # noqa: E402

KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")
ROOT = Path(__file__).parents[1]
THEIRS = {
    "kl_penalty": core_algos.kl_penalty,
    "gae": core_algos.compute_gae_advantage_return,
    "apply_kl_penalty": ray_trainer.apply_kl_penalty,
}


def logprobs(generator: Generator, size: int = 2000) -> tuple[Tensor, Tensor]:
    """Differences from 1e-4, near the reference, to 60, where every clamp acts."""
    logp = -20 * torch.rand(size, generator=generator)
    scale = torch.tensor([1e-4, 0.01, 1.0, 5.0, 60.0]).repeat(size // 5)
    return logp, logp - scale * torch.randn(size, generator=generator)


def value_and_gradient(function: Any, logp: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = logp.clone().requires_grad_()
    value = function(leaf, *rest)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().double(), gradient.double()


# ---- the estimators of KL ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind + plus for kind in KINDS for plus in ("", "+")])
def test_kl_penalty(generator: Generator, kind: str) -> None:
    """Values and gradients, also where verl clamps. Of 'mse+' and 'k2+' verl's value has a '+' too."""
    logp, ref = logprobs(generator)
    theirs = value_and_gradient(core_algos.kl_penalty, logp.double(), ref.double(), kind)
    ours = value_and_gradient(adapter.kl_penalty, logp, ref, kind)
    for mine, verls in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, verls, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_preset(generator: Generator, kind: str) -> None:
    logp, ref = logprobs(generator)
    ours = value_and_gradient(
        lambda leaf: lk.kl_from_logprobs(leaf, ref, **lk.preset("verl", kl=kind).token_kl), logp
    )
    theirs = value_and_gradient(core_algos.kl_penalty, logp.double(), ref.double(), kind)
    for mine, verls in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, verls, rtol=2e-6, atol=1e-12)


def test_near_the_reference_verl_is_noise(generator: Generator) -> None:
    """verl's k3 in fp32 rounds exp(-d) at 1: with d about 1e-4 much of what is left is error, some of it negative."""
    logp = -5 * torch.rand(2000, generator=generator)
    ref = logp - 1e-4 * torch.randn(2000, generator=generator)
    truth = core_algos.kl_penalty(logp.double(), ref.double(), "k3")
    theirs = core_algos.kl_penalty(logp, ref, "k3").double()
    assert ((theirs - truth).abs().mean() > 0.1 * truth.mean()) and (theirs < 0).any()
    torch.testing.assert_close(adapter.kl_penalty(logp, ref, "k3").double(), truth, rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_infinities(kind: str) -> None:
    """A token that one model forbids. Values are verl's; of '+' verl makes NaN (inf - inf), we keep the value."""
    logp, ref = torch.tensor([-1.0, -torch.inf]), torch.tensor([-torch.inf, -1.0])
    value = core_algos.kl_penalty(logp, ref, kind)
    assert not value.isnan().any()
    torch.testing.assert_close(adapter.kl_penalty(logp, ref, kind), value)
    leaf = logp.clone().requires_grad_()
    torch.testing.assert_close(adapter.kl_penalty(leaf, ref, kind + "+").detach(), value)
    if kind != "k2":
        assert core_algos.kl_penalty(leaf, ref, kind + "+").isnan().all()


@pytest.mark.parametrize("kind", ["full", "k4", ""])
def test_an_estimator_that_is_not_there(kind: str) -> None:
    with pytest.raises(NotImplementedError):
        core_algos.kl_penalty(torch.zeros(1), torch.zeros(1), kind)
    with pytest.raises(ValueError, match="kl must be one of k1, k2, k3, abs, kl, mse, low_var_kl"):
        adapter.kl_penalty(torch.zeros(1), torch.zeros(1), kind)


# ---- advantages ---------------------------------------------------------------------------------------


def step(generator: Generator, batch: int = 12, length: int = 40) -> dict[str, Tensor]:
    """A batch as verl's driver has it: padded to the right, holes where a tool has spoken."""
    lengths = torch.randint(3, length + 1, (batch, 1), generator=generator)
    attention = (torch.arange(length) < lengths).long()
    response = attention * (torch.rand(batch, length, generator=generator) < 0.8)
    response[:, 0] = 1
    logp = -3 * torch.rand(batch, length, generator=generator)
    scores = torch.zeros(batch, length).scatter_(1, lengths - 1, torch.randn(batch, 1, generator=generator))
    return {
        "response_mask": response,
        "token_level_scores": scores,
        "token_level_rewards": scores - 0.1 * torch.rand(batch, length, generator=generator) * response,
        "old_log_probs": logp,
        "ref_log_prob": logp - 0.3 * torch.randn(batch, length, generator=generator),
        "values": torch.randn(batch, length, generator=generator),
    }


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9)])
def test_gae(generator: Generator, gamma: float, lam: float) -> None:
    """Adapter and preset. Outside the mask verl has what it carries through, and its losses leave it out."""
    data = step(generator)
    rewards, values, mask = data["token_level_rewards"], data["values"], data["response_mask"]
    whitened, returns = core_algos.compute_gae_advantage_return(
        rewards.double(), values.double(), mask, gamma, lam
    )
    ours = adapter.compute_gae_advantage_return(rewards, values, mask, gamma, lam)
    for mine, theirs in zip(ours, (whitened, returns), strict=True):
        torch.testing.assert_close(mine.double(), theirs * mask, rtol=1e-5, atol=1e-5)
    options = lk.preset("verl").gae | {"gamma": gamma, "lam": lam}
    torch.testing.assert_close(lk.gae(rewards, values, mask, **options)[1], ours[1])


def test_gae_beside_nan(generator: Generator) -> None:
    """What a critic says of padding is nobody's: verl multiplies it by 0, and NaN spreads over the whole batch."""
    data = step(generator)
    mask = data["response_mask"]
    spoiled = torch.where(mask == 0, torch.nan, data["values"])
    arguments = (data["token_level_rewards"], spoiled, mask, 1.0, 0.95)
    assert (mask == 0).any() and core_algos.compute_gae_advantage_return(*arguments)[0].isnan().all()
    clean = adapter.compute_gae_advantage_return(arguments[0], data["values"], *arguments[2:])
    for mine, wanted in zip(adapter.compute_gae_advantage_return(*arguments), clean, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("counted", [0, 1])
def test_gae_of_hardly_any_token(counted: int) -> None:
    """verl raises where there is nothing to whiten; here such advantages are 0."""
    mask = torch.zeros(2, 3, dtype=torch.long)
    mask[0, :counted] = 1
    arguments = (torch.ones(2, 3), torch.zeros(2, 3), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match="mask"):
        core_algos.compute_gae_advantage_return(*arguments)
    advantages, returns = adapter.compute_gae_advantage_return(*arguments)
    assert torch.equal(advantages, torch.zeros(2, 3)) and torch.equal(returns, mask.float())


NAMESAKES = {"lsc_grpo": "grpo", "lsc_rloo": "rloo", "lsc_reinforce_plus_plus": "reinforce_plus_plus"}


@pytest.mark.parametrize("name", [*NAMESAKES, "lsc_dr_grpo"])
def test_estimators(generator: Generator, name: str) -> None:
    data = step(generator)
    uid = np.array(["a", "b", "c"], dtype=object)[torch.randint(3, (12,), generator=generator).numpy()]
    config = OmegaConf.create({"gamma": 0.97})
    theirs_of = core_algos.get_adv_estimator_fn(NAMESAKES.get(name, "grpo"))
    also = {"norm_adv_by_std_in_grpo": False} if name == "lsc_dr_grpo" else {}
    mask, rewards = data["response_mask"], data["token_level_rewards"]
    uid[:3] = "a", "b", "c"
    uid[3:6] = "a", "b", "c"  # nobody is alone
    theirs = theirs_of(
        token_level_rewards=rewards.double(), response_mask=mask, index=uid, config=config, **also
    )
    ours = core_algos.get_adv_estimator_fn(name)(
        token_level_rewards=rewards, response_mask=mask, index=uid, config=config
    )
    for mine, verls in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), verls, rtol=1e-5, atol=1e-5)


def test_alone_in_a_group() -> None:
    """With nobody to compare with verl takes the raw score as the advantage; here it is 0."""
    arguments = dict(
        token_level_rewards=torch.tensor([[0.0, 7.0]]), response_mask=torch.ones(1, 2), index=np.array(["a"])
    )
    assert core_algos.get_adv_estimator_fn("grpo")(**arguments)[0].max() > 6
    for name in ("lsc_grpo", "lsc_dr_grpo", "lsc_dr_grpo_batch", "lsc_rloo"):
        assert torch.equal(core_algos.get_adv_estimator_fn(name)(**arguments)[0], torch.zeros(1, 2))


def test_scaled_over_the_batch(generator: Generator) -> None:
    """Groups keep their spreads: what is bent keeps its bend."""
    utility = torch.tensor([-0.01, -0.03, -2.0, -4.0])
    advantages, _ = core_algos.get_adv_estimator_fn("lsc_dr_grpo_batch")(
        token_level_rewards=utility.unsqueeze(1), response_mask=torch.ones(4, 1), index=np.array([0, 0, 1, 1])
    )
    centred = torch.tensor([0.01, -0.01, 1.0, -1.0])
    torch.testing.assert_close(advantages.squeeze(1), centred / centred.std(), rtol=1e-5, atol=1e-7)


# ---- rewards ------------------------------------------------------------------------------------------


def proto(tensors: dict[str, Tensor]) -> DataProto:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return DataProto(batch=TensorDict(copies, batch_size=len(tensors["response_mask"])))


@pytest.mark.parametrize("kind", ["kl", "k3"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_apply_kl_penalty(generator: Generator, kind: str, adaptive: bool) -> None:
    tensors = step(generator)
    controllers = [
        core_algos.AdaptiveKLController(0.2, target_kl=0.05, horizon=100)
        if adaptive
        else core_algos.FixedKLController(0.2)
        for _ in range(2)
    ]
    theirs, their_metrics = ray_trainer.apply_kl_penalty(proto(tensors), controllers[0], kind)
    ours, metrics = adapter.apply_kl_penalty(proto(tensors), controllers[1], kind)
    torch.testing.assert_close(
        ours.batch["token_level_rewards"], theirs.batch["token_level_rewards"], rtol=1e-6, atol=1e-6
    )
    assert metrics == pytest.approx(their_metrics, rel=1e-5)
    assert controllers[1].value == pytest.approx(controllers[0].value, rel=1e-5)
    # as the preset does it: the score stands where the response ends
    utility, mask = tensors["token_level_scores"].sum(-1), tensors["response_mask"]
    kl = lk.kl_from_logprobs(
        tensors["old_log_probs"],
        tensors["ref_log_prob"],
        mask=mask,
        **lk.preset("verl", kl=kind).token_kl,
    )
    ends = tensors["token_level_scores"].abs().argmax(-1)
    by_preset = lk.token_rewards(utility, kl, mask, beta=0.2, index=ends)
    torch.testing.assert_close(by_preset, ours.batch["token_level_rewards"])


def test_apply_kl_penalty_beside_nan(generator: Generator) -> None:
    """Log-probabilities of padding: verl multiplies their KL by 0, so the rewards there are NaN, and their sums."""
    tensors = step(generator)
    hidden = tensors["response_mask"] == 0
    spoiled = tensors | {
        "old_log_probs": tensors["old_log_probs"].masked_fill(hidden, torch.nan),
        "ref_log_prob": tensors["ref_log_prob"].masked_fill(hidden, -torch.inf),
    }
    theirs, _ = ray_trainer.apply_kl_penalty(proto(spoiled), core_algos.FixedKLController(0.2))
    assert torch.equal(theirs.batch["token_level_rewards"].isnan(), hidden)
    clean, spoilt = (
        adapter.apply_kl_penalty(proto(each), core_algos.FixedKLController(0.2))
        for each in (tensors, spoiled)
    )
    assert torch.equal(clean[0].batch["token_level_rewards"], spoilt[0].batch["token_level_rewards"])
    assert clean[1] == spoilt[1]


class Tokenizer:
    def decode(self, ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(str(each) for each in ids.tolist())


def manager(compute_score: Any, **options: Any) -> Any:
    config = OmegaConf.create(
        {"reward": {"reward_kwargs": {"lsc": {"properties": ["helpful", "harmless"], **options}}}}
    )
    return plugin.LSCRewardManager(config, Tokenizer(), compute_score)


def row(**extra: Any) -> DataProto:
    """One response of three tokens after a prompt of two, padded to four."""
    batch = {
        "prompts": torch.tensor([[1, 2]]),
        "responses": torch.tensor([[5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    }
    objects = {
        "data_source": "x",
        "reward_model": {"ground_truth": "42"},
        "extra_info": extra,
        "raw_prompt": [{"role": "user", "content": "Why?"}],
    }
    arrays = {}
    for name, value in objects.items():
        arrays[name] = np.empty(1, dtype=object)
        arrays[name][0] = value
    return DataProto(batch=TensorDict(batch, batch_size=1), non_tensor_batch=arrays)


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any) -> dict[str, Any]:
    assert (data_source, solution_str, ground_truth) == ("x", "5 6 7", "42")
    return {"helpful": 2.0, "harmless": -1.0, "remark": 3}


async def compute_score_later(**given: Any) -> dict[str, Any]:
    await asyncio.sleep(0)
    return compute_score(**given)


def scored(made: Any, data: DataProto) -> dict[str, Any]:
    result: dict[str, Any] = made.loop.run_until_complete(made.run_single(data))
    return result


@pytest.mark.parametrize("function", [compute_score, compute_score_later])
def test_reward_manager(function: Any) -> None:
    made = manager(
        function, reference_reward={"helpful": 1.0, "harmless": 0.5}, formula="helpful & ~harmless"
    )
    result = scored(made, row())
    wanted = lk.aggregate_rewards(
        torch.tensor([2.0, -1.0]),
        torch.tensor([1.0, 0.5]),
        formula="helpful & ~harmless",
        names=["helpful", "harmless"],
    ).item()
    assert result["reward_score"] == pytest.approx(wanted)
    info = result["reward_extra_info"]
    assert info == {"helpful": 2.0, "harmless": -1.0, "remark": 3, "score": result["reward_score"]}


def test_reward_manager_references(tmp_path: Path) -> None:
    """A row's own; a table, by the prompt's text; and a score that is missing."""
    own = manager(compute_score, reference_reward=9.0)
    utility = scored(own, row(reference_reward={"helpful": 1.0, "harmless": 0.5}))["reward_score"]
    ReferenceTable.fit(
        [
            ("Why?", "harmless", 0.5),
            ("Why?", "helpful", 1.0),
            ("How?", "helpful", 8.0),
            ("How?", "harmless", 8.0),
        ]
    ).save(tmp_path / "table.parquet")
    table = manager(compute_score, reference_reward=str(tmp_path / "table.parquet"))
    assert scored(table, row())["reward_score"] == utility
    assert scored(table, row(prompt="How?"))["reward_score"] < utility - 5
    half = manager(lambda **given: {"helpful": 2.0, "harmless": None}, reference_reward=1.0, missing="ignore")
    result = scored(half, row())
    assert result["reward_score"] == pytest.approx(lk.lsc_transform(torch.tensor(2.0), 1.0).item())
    assert np.isnan(result["reward_extra_info"]["harmless"])


@pytest.mark.parametrize(
    "function, options, error, message",
    [
        (lambda **given: 1.0, {"reference_reward": 0.0}, TypeError, "compute_score must return a mapping"),
        (lambda **given: {"helpful": 1.0}, {"reference_reward": 0.0}, ValueError, "'harmless' is not among"),
        (compute_score, {}, ValueError, "reference_reward must be a number"),
    ],
)
def test_reward_manager_told_nonsense(function: Any, options: Any, error: type, message: str) -> None:
    made = manager(function, **options)
    with pytest.raises(error, match=message):
        scored(made, row())


def test_reward_manager_without_options() -> None:
    with pytest.raises(ValueError, match="reward.reward_kwargs.lsc must be a mapping with properties"):
        plugin.LSCRewardManager(OmegaConf.create({"reward": {}}), Tokenizer(), compute_score)
    with pytest.raises(ValueError, match="reward.reward_kwargs.lsc has no option 'formulas'"):
        manager(compute_score, formulas="helpful")


def test_the_reward_s_token(generator: Generator) -> None:
    """Where verl puts it, except that a response without tokens gets none: verl's index wraps to the last position."""
    lengths = torch.tensor([4, 1, 0, 3])
    attention = torch.cat([torch.ones(4, 2), (torch.arange(4) < lengths.unsqueeze(1)).float()], 1).long()
    batch = {
        "prompts": torch.zeros(4, 2).long(),
        "responses": torch.zeros(4, 4).long(),
        "attention_mask": attention,
    }
    data = DataProto(batch=TensorDict(batch, batch_size=4))
    scores = torch.randn(4, generator=generator).tolist()
    ours = plugin.LSCRewardManager.assemble_rm_scores(data, scores)
    theirs = NaiveRewardManager.assemble_rm_scores(data, scores)
    assert theirs[2, 3] == pytest.approx(scores[2]) and not ours[2].any()
    kept = [0, 1, 3]
    assert torch.equal(ours[kept], theirs[kept])


def documented_overrides() -> list[str]:
    """Those of the complete command in docs/trainers-verl.md."""
    page = (ROOT / "docs" / "trainers-verl.md").read_text(encoding="utf-8")
    command = page.partition("$ python -m verl.trainer.main_ppo")[2].partition("```")[0]
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="only in the repository")
def test_the_documented_command(tmp_path: Path) -> None:
    """Its overrides in verl's own configuration choose manager and trainer, and score with such a file."""
    folder = Path(ray_trainer.__file__).parents[1] / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", overrides=documented_overrides())
    scores = tmp_path / "my_rewards.py"
    scores.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, **others):\n"
        '    return {"helpful": 2.5, "harmless": 1.0}\n'
    )
    config.reward.custom_reward_function.path = str(scores)
    made = load_reward_manager(config, Tokenizer())
    assert type(made) is plugin.LSCRewardManager
    wanted = lk.aggregate_rewards(torch.tensor([2.5, 1.0]), torch.tensor([1.2, 0.3])).item()
    assert scored(made, row())["reward_score"] == pytest.approx(wanted)
    assert trainer_base.get_trainer_cls(config.trainer.v1.trainer_mode) is plugin.LSCTrainerSync
    assert config.algorithm.kl_ctrl.kl_coef == 0.05 and config.algorithm.adv_estimator == "gae"


@pytest.mark.parametrize(
    "estimator, by_std, warns", [("grpo", True, 1), ("grpo", False, 0), ("lsc_rloo", True, 0)]
)
def test_scaling_by_the_group_is_told(estimator: str, by_std: bool, warns: int) -> None:
    config = {
        "reward": {"reward_kwargs": {"lsc": {"properties": ["helpful"], "reference_reward": 0.0}}},
        "algorithm": {"adv_estimator": estimator, "norm_adv_by_std_in_grpo": by_std},
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", GroupScalingWarning)
        plugin.LSCRewardManager(OmegaConf.create(config), Tokenizer(), compute_score)
    assert sum(issubclass(each.category, GroupScalingWarning) for each in told) == warns


# ---- the trainers -------------------------------------------------------------------------------------


def nested(tensor: Tensor, lengths: list[int]) -> Tensor:
    rows = [each[:length] for each, length in zip(tensor, lengths, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("estimator", ["gae", "grpo", "lsc_dr_grpo_batch"])
@pytest.mark.parametrize("kl_in_reward", [False, True])
def test_trainer(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, estimator: str, kl_in_reward: bool
) -> None:
    """verl's own ``_compute_advantage`` on a batch as its queue has it, with its functions and with ours."""
    tensors = step(generator)
    lengths = [int(each) for each in (tensors["token_level_scores"] != 0).long().argmax(1) + 1]
    fields = {
        name: nested(tensors[name], lengths)
        for name in ("response_mask", "old_log_probs", "ref_log_prob", "values")
    }
    fields["rm_scores"] = nested(tensors["token_level_scores"], lengths)
    config = OmegaConf.create(
        {
            "algorithm": {
                "use_kl_in_reward": kl_in_reward,
                "kl_penalty": "low_var_kl",
                "adv_estimator": estimator,
                "gamma": 0.99,
                "lam": 0.95,
            },
            "actor_rollout_ref": {"rollout": {"n": 4}},
        }
    )
    keys = [f"{row // 4}_{row % 4}_0" for row in range(12)]
    written: list[TensorDict] = []

    class Queue:
        @staticmethod
        def kv_batch_get(**given: Any) -> TensorDict:
            uid = torch.arange(12) // 4
            return TensorDict(fields | {"uid": uid}, batch_size=12)

        @staticmethod
        def kv_batch_put(**given: Any) -> None:
            written.append(given["fields"])

    monkeypatch.setattr(trainer_base, "tq", Queue)
    metrics: list[dict[str, float]] = []
    used: list[str] = []
    for base in (PPOTrainerSync, plugin.LSCTrainerSync):
        trainer = object.__new__(base)
        trainer.config = config
        trainer.kl_ctrl_in_reward = core_algos.FixedKLController(0.3)
        metrics.append({})
        before = core_algos.compute_gae_advantage_return
        monkeypatch.setattr(
            adapter, "gae", lambda *given, **options: used.append("gae") or lk.gae(*given, **options)
        )
        trainer._compute_advantage(KVBatchMeta(keys=keys, partition_id="train", tags=[{}] * 12), metrics[-1])
        assert core_algos.compute_gae_advantage_return is before
    assert used == (["gae"] if estimator == "gae" else [])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)
    theirs, ours = written
    assert set(ours.keys()) == set(theirs.keys())
    mask = fields["response_mask"].values()
    for name in ours.keys():
        torch.testing.assert_close(
            ours[name].values() * mask, theirs[name].values() * mask, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("mode", adapter.TRAINER_MODES)
def test_a_trainer_has_its_mode_s_options(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """verl chooses the replay buffer by the mode's name, which must not be ours."""
    made, theirs = trainer_base.get_trainer_cls(f"lsc_{mode}"), trainer_base.get_trainer_cls(mode)
    assert issubclass(made, theirs)
    seen = []
    monkeypatch.setattr(theirs, "__init__", lambda self, config: seen.append(config.trainer.v1.trainer_mode))
    config = OmegaConf.create({"trainer": {"v1": {"trainer_mode": f"lsc_{mode}"}}})
    OmegaConf.set_struct(config, True)
    made(config=config)
    assert seen == [mode]


# ---- loading and patching -----------------------------------------------------------------------------


@pytest.fixture
def patched() -> Iterator[list[str]]:
    losses = importlib.import_module("verl.workers.utils.losses")  # has kl_penalty by value
    assert losses.kl_penalty is THEIRS["kl_penalty"]
    yield adapter.patch()
    adapter.unpatch()


def test_patch(patched: list[str]) -> None:
    losses = sys.modules["verl.workers.utils.losses"]
    assert "verl.workers.utils.losses.kl_penalty" in patched
    assert losses.kl_penalty is core_algos.kl_penalty is adapter.kl_penalty
    assert trainer_base.apply_kl_penalty is adapter.apply_kl_penalty
    assert adapter.patch() == []
    with adapter.PATCH.applied():
        pass
    assert core_algos.kl_penalty is adapter.kl_penalty  # the end of a block is not the end of a patch
    later = SimpleNamespace(__name__="verl.imported_later", kl_penalty=core_algos.kl_penalty)
    sys.modules["verl.imported_later"] = later  # type: ignore[assignment]
    try:
        adapter.unpatch()
    finally:
        del sys.modules["verl.imported_later"]
    assert later.kl_penalty is losses.kl_penalty is core_algos.kl_penalty is THEIRS["kl_penalty"]
    assert trainer_base.apply_kl_penalty is THEIRS["apply_kl_penalty"]
    assert adapter.unpatch() == []


def test_patch_of_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "kl_penalty", lambda logprob, ref_logprob: logprob)
    with pytest.raises(TypeError, match=r"takes \(logprob, ref_logprob\); what would replace it takes"):
        adapter.patch()
    assert core_algos.compute_gae_advantage_return is THEIRS["gae"]


def metadata_of_the_sources(folder: Path) -> dict[str, str]:
    """The environment of a process in which this checkout counts as installed, where it is not."""
    if any(each.value == adapter.ENTRY_POINT for each in metadata.entry_points(group="verl.plugins")):
        return {}
    info = folder / f"lsc_kernels-{lk.__version__}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lsc-kernels\nVersion: {lk.__version__}\n")
    section = '[project.entry-points."verl.plugins"]\n'
    entry = (ROOT / "pyproject.toml").read_text().partition(section)[2].splitlines()[0].replace('"', "")
    (info / "entry_points.txt").write_text(f"[verl.plugins]\n{entry}\n")
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}


def test_verl_loads_the_plugin(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lsc_kernels.trainers.verl", "--check"],
        capture_output=True,
        text=True,
        env=os.environ | metadata_of_the_sources(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trainer mode lsc_sync" in done.stdout and "FAILED" not in done.stdout


def test_check_says_why_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(adapter, "ESTIMATORS", {"lsc_none": adapter.ESTIMATORS["lsc_grpo"]})
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    assert adapter.main(["--check"]) == 1
    said = capsys.readouterr().out
    assert "FAILED  advantage estimator lsc_none" in said and "VERL_USE_EXTERNAL_PLUGINS=other" in said
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "auto")

    class Broken:
        value = adapter.ENTRY_POINT

        def load(self) -> None:
            raise RuntimeError("no luck")

    monkeypatch.setattr(adapter.metadata, "entry_points", lambda group: [Broken()])
    assert adapter.check() == 1 and "RuntimeError: no luck" in capsys.readouterr().out
    monkeypatch.setattr(adapter.metadata, "entry_points", lambda group: [])
    assert adapter.check() == 1 and "has no entry point verl.plugins" in capsys.readouterr().out


def test_an_unknown_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: "0.10.1")
    assert adapter.check() == 1
    assert "verl 0.10.1 is installed, and this adapter knows verl>=0.9,<0.10 only" in capsys.readouterr().out
    with pytest.raises(ImportError, match="nothing was hooked"):
        adapter.patch()
    with pytest.warns(UserWarning, match="the verl plugin of lsc-kernels is not loaded: verl 0.10.1"):
        with pytest.raises(ImportError):
            importlib.reload(plugin)
