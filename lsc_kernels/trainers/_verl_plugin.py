"""What verl loads from the entry point ``verl.plugins``: importing it registers the adapter."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.ops.token_rewards import token_rewards
from lsc_kernels.trainers import verl as adapter
from lsc_kernels.trainers._rewards import GroupScalingWarning, PropertyRewards
from lsc_kernels.trainers._versions import require

try:
    require("verl", adapter.KNOWN)
except ImportError as problem:
    # verl drops the exceptions of its plugins
    warnings.warn(f"the verl plugin of lsc-kernels is not loaded: {problem}", stacklevel=1)
    raise

from omegaconf import OmegaConf, open_dict  # noqa: E402  (a version that is not known must be told first)
from verl.experimental.reward_loop.reward_manager import NaiveRewardManager, register  # noqa: E402
from verl.trainer.ppo.core_algos import register_adv_est  # noqa: E402
from verl.trainer.ppo.v1 import register_trainer  # noqa: E402
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync  # noqa: E402
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync  # noqa: E402
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync  # noqa: E402

WHERE = "reward.reward_kwargs.lsc"


@register(adapter.REWARD_MANAGER)
class LSCRewardManager(NaiveRewardManager):
    """One reward from the scores of several properties: the log-probability that the response is good.

    ``compute_score`` (``reward.custom_reward_function.path``) returns a mapping with the score of each property, None
    for one that is missing; a coroutine may do so too. What is wanted of them stands in the configuration, under
    ``+reward.reward_kwargs.lsc``: ``properties``, and as wanted ``reference_reward`` (a number, a number for each
    property or the path of a table), ``formula``, ``weights``, ``scale``, ``floor``, ``missing``.

    A row whose ``extra_info`` has ``reference_reward`` uses that. A table is looked up by ``extra_info["prompt"]``,
    else by the text of ``raw_prompt``, of messages the last one's.

    ``reward_extra_info`` has the scores, and ``score``, the utility. The reward goes to the last token of the
    response; a response without tokens has none (in verl it wraps around to the last position).
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Callable[..., Any],
        reward_router_address: Any = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        options = config.reward.get("reward_kwargs", {}).get("lsc", None)
        plain = OmegaConf.to_container(options, resolve=True) if OmegaConf.is_config(options) else options
        self.rewards = PropertyRewards.from_options(plain, WHERE)
        _warn_of_scaling(config.get("algorithm", {}))
        super().__init__(
            config, tokenizer, _named(compute_score), reward_router_address, reward_model_tokenizer
        )

    async def run_single(self, data: Any) -> dict[str, Any]:
        result: dict[str, Any] = await super().run_single(data)
        scores, row = result["reward_extra_info"], data[-1].non_tensor_batch
        extra = row.get("extra_info", None) or {}
        utility = self.rewards(
            [scores],
            prompts=[_prompt(row, extra)] if self.rewards.table is not None else None,
            reference_reward=[extra.get("reference_reward")],
        ).item()
        # arrays of objects would keep None, and metrics are means of numbers
        numbers = {
            name: math.nan if scores[name] is None else float(scores[name])
            for name in self.rewards.properties
        }
        return {"reward_score": utility, "reward_extra_info": {**scores, **numbers, "score": utility}}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: list[float]) -> Tensor:
        mask = data.batch["attention_mask"][:, data.batch["prompts"].size(1) :]
        return token_rewards(
            torch.tensor(scores, dtype=torch.float32, device=mask.device),
            torch.zeros(mask.shape, device=mask.device),
            mask,
            beta=0.0,
        )


def _warn_of_scaling(algorithm: Any) -> None:
    estimator = algorithm.get("adv_estimator", None)
    by_std = estimator in ("grpo", "grpo_vectorized") and algorithm.get("norm_adv_by_std_in_grpo", True)
    if by_std or estimator == "lsc_grpo":
        warnings.warn(
            f"algorithm.adv_estimator={estimator} divides by the spread within a group, which undoes the LSC "
            "transform; set algorithm.norm_adv_by_std_in_grpo=False, or take lsc_dr_grpo_batch or lsc_rloo",
            GroupScalingWarning,
            stacklevel=3,
        )


def _named(compute_score: Callable[..., Any]) -> Callable[..., Any]:
    """verl's manager wants a score of the name ``score``, which is known only when the others are."""

    def checked(result: Any) -> dict[str, Any]:
        if not isinstance(result, Mapping):
            raise TypeError(
                "with reward.reward_manager.name=lsc, compute_score must return a mapping with the score of each "
                f"property; got {type(result).__name__}: set reward.custom_reward_function.path"
            )
        return {"score": math.nan, **result}

    if inspect.iscoroutinefunction(compute_score):

        async def waited(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return checked(await compute_score(*args, **kwargs))

        return waited
    return lambda *args, **kwargs: checked(compute_score(*args, **kwargs))


def _prompt(row: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    if "prompt" in extra:
        return str(extra["prompt"])
    raw = row.get("raw_prompt", None)
    if raw is None:
        raise ValueError(
            "the references are a table, which is looked up by prompt; the row has neither extra_info.prompt nor "
            "raw_prompt"
        )
    return raw if isinstance(raw, str) else str(list(raw)[-1]["content"])


for _name, _estimator in adapter.ESTIMATORS.items():
    register_adv_est(_name)(_estimator)


class _FusedAdvantages:
    """KL in the reward and GAE by our functions; all else is the trainer's that stands behind it."""

    def __init__(self, config: Any) -> None:
        # verl chooses its replay buffer and the mode's options by this name
        with open_dict(config):
            config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode.removeprefix(adapter.PREFIX)
        super().__init__(config)  # type: ignore[call-arg]

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        with adapter.PATCH.applied():
            return super()._compute_advantage(batch, metrics)  # type: ignore[misc]


@register_trainer(adapter.PREFIX + "sync")
class LSCTrainerSync(_FusedAdvantages, PPOTrainerSync):
    """``trainer.v1.trainer_mode=lsc_sync``."""


@register_trainer(adapter.PREFIX + "colocate_async")
class LSCTrainerColocateAsync(_FusedAdvantages, PPOTrainerColocateAsync):
    """``trainer.v1.trainer_mode=lsc_colocate_async``."""


@register_trainer(adapter.PREFIX + "separate_async")
class LSCTrainerSeparateAsync(_FusedAdvantages, PPOTrainerSeparateAsync):
    """``trainer.v1.trainer_mode=lsc_separate_async``."""
