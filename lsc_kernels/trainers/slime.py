"""slime: functions for its options ``--custom-rm-path``, ``--custom-reward-post-process-path``,
``--custom-advantage-function-path`` and ``--custom-loss-function-path``.

::

    --custom-config-path lsc.yaml --reward-key utility
    --custom-rm-path lsc_kernels.trainers.slime.custom_rm
    --custom-reward-post-process-path lsc_kernels.trainers.slime.custom_reward_post_process
    --custom-advantage-function-path lsc_kernels.trainers.slime.custom_advantage
    --loss-type custom_loss --custom-loss-function-path lsc_kernels.trainers.slime.custom_loss

slime puts the entries of ``lsc.yaml`` into its arguments. That of the name ``lsc`` has ``scorers``, the path of a
function for each property, and the options of :func:`lsc_kernels.aggregate_rewards`::

    lsc:
      scorers: {helpful: my_rewards.helpful, harmless: my_rewards.harmless}
      reference_reward: {helpful: 1.2, harmless: 0.3}
      group: dr_grpo
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.ops.discounted_returns import discounted_returns
from lsc_kernels.ops.gae import gae
from lsc_kernels.ops.group_advantages import group_advantages
from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
from lsc_kernels.presets import preset
from lsc_kernels.trainers._kl import trainer_kl
from lsc_kernels.trainers._patch import Patch
from lsc_kernels.trainers._rewards import GroupScalingWarning, PropertyRewards
from lsc_kernels.trainers._versions import UnknownVersion

KNOWN = "0.3"
UTILITY = "utility"
GROUPS = ("dr_grpo", "grpo", "rloo")
# slime compares the samples of a prompt for these; the others take the rewards as they are
PER_SEQUENCE = ("grpo", "gspo", "cispo")
GROUPED = (*PER_SEQUENCE, "reinforce_plus_plus_baseline")
# exp of it is finite: the gradient of what the last clamp of low_var_kl cuts off stays 0, where 0 * inf would be NaN
SMALLEST_LOG_RATIO = -80.0


# ---- rewards ------------------------------------------------------------------------------------------


async def custom_rm(args: Any, samples: Any, **others: Any) -> Any:
    """The reward of a sample, or of each of a list (``--group-rm``), for ``--custom-rm-path``.

    A scorer is called as ``scorer(args, sample)`` and returns a number, None where there is none; it may be a
    coroutine. All are awaited together. A sample with ``reference_reward`` in its ``metadata`` uses that; a table is
    looked up by the prompt, of messages by the last one's text.

    Returns:
        A mapping with the score of each property and ``utility``, log P(good), or a list of them. ``--reward-key
        utility`` makes it the reward.

    Raises:
        ValueError: ``--reward-key`` is another, ``lsc`` is not as described above, a scorer returned too little.
    """
    if getattr(args, "reward_key", None) != UTILITY:
        raise ValueError(
            f"custom_rm returns a mapping: set --reward-key {UTILITY}; got {getattr(args, 'reward_key', None)!r}"
        )
    scorers, combine = _rewards(json.dumps(_options(args)))
    many = list(samples) if isinstance(samples, Sequence) else [samples]
    found = await asyncio.gather(
        *(_scored(scorer, args, sample) for sample in many for scorer in scorers.values())
    )
    rows = [
        dict(zip(scorers, found[begin : begin + len(scorers)], strict=True))
        for begin in range(0, len(found), len(scorers))
    ]
    utility = combine(
        rows,
        prompts=[_prompt(sample.prompt) for sample in many],
        reference_reward=[(sample.metadata or {}).get("reference_reward") for sample in many],
    ).tolist()
    rewards = [{**row, UTILITY: each} for row, each in zip(rows, utility, strict=True)]
    return rewards if isinstance(samples, Sequence) else rewards[0]


def _options(args: Any) -> dict[str, Any]:
    options = getattr(args, "lsc", None) or {}
    if not isinstance(options, dict):
        raise ValueError(f"lsc (--custom-config-path) must be a mapping; got {options!r}")
    return options


@cache
def _rewards(text: str) -> tuple[dict[str, Callable[..., Any]], PropertyRewards]:
    """Scorers by name, and their combination; once for each configuration."""
    options = json.loads(text)
    scorers = options.pop("scorers", None)
    options.pop("group", None)
    if not isinstance(scorers, dict) or not scorers:
        raise ValueError(
            "lsc.scorers (--custom-config-path) must be a mapping from the name of a property to the path of a "
            f"function, as my_rewards.helpful; got {scorers!r}"
        )
    combine = PropertyRewards.from_options(
        {**options, "properties": list(scorers)}, "lsc (--custom-config-path)"
    )
    return {name: _function(path) for name, path in scorers.items()}, combine


def _function(path: str) -> Callable[..., Any]:
    module, _, name = str(path).rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


async def _scored(scorer: Callable[..., Any], args: Any, sample: Any) -> float | None:
    score = scorer(args, sample)
    if inspect.isawaitable(score):
        score = await score
    return None if score is None else float(score)


def _prompt(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def custom_reward_post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Rewards as they are logged and as they are trained on, for ``--custom-reward-post-process-path``.

    The samples of a prompt (of equal ``group_index``; where they have none, ``--n-samples-per-prompt`` in a row) are
    compared with one another, as ``lsc.group`` says: ``dr_grpo``, less the mean; ``rloo``, less the mean of the others;
    ``grpo``, the z-score. Without it, as slime does with the estimator and its options, which may be not at all.

    Warns:
        GroupScalingWarning: of the z-score, which undoes the LSC transform; ``--disable-grpo-std-normalization``.
    """
    raw = [float(sample.get_reward_value(args)) for sample in samples]
    method = _options(args).get("group")
    if method is None and args.advantage_estimator in GROUPED and args.rewards_normalization:
        scaled = args.advantage_estimator in PER_SEQUENCE and args.grpo_std_normalization
        method = "grpo" if scaled else "dr_grpo"
    if method is None:
        return raw, raw
    if method not in GROUPS:
        raise ValueError(f"lsc.group must be one of {', '.join(GROUPS)}; got {method!r}")
    if method == "grpo":
        warnings.warn(
            "the z-score within a group undoes the LSC transform; pass --disable-grpo-std-normalization, or set "
            "lsc.group to dr_grpo or rloo",
            GroupScalingWarning,
            stacklevel=2,
        )
    indices = [sample.group_index for sample in samples]
    group: Tensor | int = args.n_samples_per_prompt
    if all(index is not None for index in indices):
        group = torch.tensor(indices)
    return raw, group_advantages(torch.tensor(raw), group, method=method, eps=1e-6).tolist()


# ---- advantages ---------------------------------------------------------------------------------------


@torch.no_grad()
def custom_advantage(args: Any, rollout_data: dict[str, Any]) -> None:
    """Advantages and returns as ``--advantage-estimator`` says, for ``--custom-advantage-function-path``.

    Args:
        args: slime's.
        rollout_data: ``kl``, ``rewards``, ``loss_masks`` and, with ``ppo``, ``values``, a tensor or number for each
            response; gets ``advantages`` and ``returns``, which slime then whitens if it is told to.

    The responses are computed packed, one behind another, not padded. As in slime, ``ppo`` knows no loss mask: every
    token of a response is a step and pays for its KL; ``reinforce_plus_plus`` takes the KL of the tokens that count,
    and puts the reward at the last of them. A response of which none counts has returns of 0 there (slime raises).

    Raises:
        NotImplementedError: with context parallelism, where each process has a part of a response.
        ValueError: another estimator.
    """
    parts = getattr(args, "context_parallel_size", 1)
    if parts > 1:
        raise NotImplementedError(
            f"custom_advantage wants whole responses; got context_parallel_size={parts}. Leave out "
            "--custom-advantage-function-path"
        )
    kl = [each.float() for each in rollout_data["kl"]]
    lengths = [len(each) for each in kl]
    device = kl[0].device if kl else torch.device("cpu")
    rewards = torch.tensor([float(each) for each in rollout_data["rewards"]], device=device)
    counts = torch.tensor(lengths, device=device)
    estimator = args.advantage_estimator
    if estimator in PER_SEQUENCE:
        returns = rewards.repeat_interleave(counts)
        advantages = returns.clone()
    elif estimator == "reinforce_plus_plus_baseline":
        advantages = returns = rewards.repeat_interleave(counts) - args.kl_coef * _packed(kl, device)
    elif estimator == "ppo":
        ends = counts.cumsum(0)
        priced = -args.kl_coef * _packed(kl, device)
        there = counts > 0
        priced[ends[there] - 1] += rewards[there]
        advantages, returns = gae(
            priced,
            _packed([each.float() for each in rollout_data["values"]], device),
            None,
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)),
            **preset("slime").gae | {"gamma": args.gamma, "lam": args.lambd},
        )
    elif estimator == "reinforce_plus_plus":
        mask = _packed([each.to(device) for each in rollout_data["loss_masks"]], device) != 0
        priced = torch.where(mask, -args.kl_coef * _packed(kl, device), 0.0)
        last = _last_counted(mask, counts)
        there = last >= 0
        priced[last[there]] += rewards[there]
        returns = discounted_returns(
            priced, None, gamma=args.gamma, cu_seqlens=torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        )
        advantages = returns
    else:
        raise ValueError(
            f"advantage_estimator must be one of {', '.join((*GROUPED, 'ppo', 'reinforce_plus_plus'))}; "
            f"got {estimator!r}"
        )
    rollout_data["advantages"] = list(advantages.split(lengths))
    rollout_data["returns"] = list(returns.split(lengths))


def _packed(rows: Iterable[Tensor], device: torch.device) -> Tensor:
    listed = list(rows)
    return torch.cat(listed) if listed else torch.zeros(0, device=device)


def _last_counted(mask: Tensor, counts: Tensor) -> Tensor:
    """The packed position of the last counted token of each response; -1 where none is."""
    position = torch.where(mask, torch.arange(len(mask), device=mask.device), -1)
    owner = torch.arange(len(counts), device=mask.device).repeat_interleave(counts)
    last = torch.full((len(counts),), -1, device=mask.device)
    return last.scatter_reduce(0, owner, position, "amax")


# ---- the loss -----------------------------------------------------------------------------------------


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, kl_loss_type: str, importance_ratio: Tensor | None = None
) -> Tensor:
    """KL per token from log-probabilities: ``slime.utils.ppo_utils.compute_approx_kl``.

    Args:
        log_probs, log_probs_base: of the policy and its reference, [...].
        kl_loss_type: ``k1``, ``k2``, ``k3`` or ``low_var_kl``, k3 clamped to 10.
        importance_ratio: [...], pi / pi_old, which multiplies the estimate before that clamp.

    Returns:
        [...], fp32. k3 keeps its digits near the reference. Where the clamp acts the gradient is 0, also where exp
        overflows (NaN in slime).

    Example:
        >>> import torch
        >>> compute_approx_kl(torch.tensor([-1.0, -200.0]), torch.tensor([-1.001, -1.0]), "low_var_kl")
        tensor([4.9988e-07, 1.0000e+01])
    """
    if importance_ratio is None:
        return trainer_kl("slime", kl_loss_type, log_probs, log_probs_base)
    clamped = kl_loss_type == "low_var_kl"
    options = preset("slime", kl="k3" if clamped else kl_loss_type).token_kl
    if not clamped:
        return importance_ratio * kl_from_logprobs(log_probs, log_probs_base, **options)
    kl = kl_from_logprobs(
        log_probs, log_probs_base, log_ratio_clamp=(SMALLEST_LOG_RATIO, torch.inf), **options
    )
    return (importance_ratio * kl).clamp(*preset("slime", kl=kl_loss_type).token_kl["kl_clamp"])


PATCH = Patch("slime", {"slime.utils.ppo_utils:compute_approx_kl": compute_approx_kl})


def custom_loss(args: Any, batch: dict[str, Any], logits: Tensor, sum_of_sample_mean: Any) -> Any:
    """slime's policy loss with the KL computed by :func:`compute_approx_kl`, for ``--custom-loss-function-path``.

    Takes and returns what ``slime.backends.megatron_utils.loss.policy_loss_function`` does, which computes the rest: it
    needs no more of parallelism than slime's.

    Raises:
        UnknownVersion: another slime than this was written for.
    """
    _check_version()
    loss = importlib.import_module("slime.backends.megatron_utils.loss")
    with PATCH.applied():
        return loss.policy_loss_function(args, batch, logits, sum_of_sample_mean)


@cache
def _check_version() -> None:
    # not by pip's name: slime is installed from its repository, and PyPI has another package of that name
    try:
        found = metadata.version("slime")
    except metadata.PackageNotFoundError:
        return  # on PYTHONPATH, as slime's own scripts have it; the function's parameters are checked in any case
    if not found.startswith(KNOWN + "."):
        raise UnknownVersion(
            f"slime {found} is installed, and this adapter knows {KNOWN}.* only; nothing was hooked. Leave out "
            "--custom-loss-function-path, or check out a slime of that version",
            name="slime",
        )
