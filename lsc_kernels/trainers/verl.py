"""verl: a reward manager, advantage estimators, trainers with a fused GAE, and drop-ins for its functions.

verl loads them by itself, from the entry point ``verl.plugins``, in every process that imports it:

===================================  ==============================================================================
``reward.reward_manager.name=lsc``   one reward from the scores of several properties, :class:`LSCRewardManager`
``algorithm.adv_estimator=lsc_...``  :data:`ESTIMATORS`
``trainer.v1.trainer_mode=lsc_...``  verl's trainers, with GAE and KL in the reward computed here: ``lsc_sync``,
                                     ``lsc_colocate_async``, ``lsc_separate_async``
===================================  ==============================================================================

verl says nothing when a plugin fails to load. ``python -m lsc_kernels.trainers.verl --check`` says whether it did.

:func:`kl_penalty`, :func:`compute_gae_advantage_return` and :func:`apply_kl_penalty` have the names and arguments of
verl's functions; :func:`patch` puts them in their place in a process, ``VERL_USE_EXTERNAL_MODULES=
lsc_kernels.trainers.verl_patch`` in all of them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lsc_kernels.ops.discounted_returns import discounted_returns
from lsc_kernels.ops.gae import gae
from lsc_kernels.ops.group_advantages import group_advantages
from lsc_kernels.ops.masked_whiten import masked_whiten
from lsc_kernels.presets import preset
from lsc_kernels.trainers._kl import trainer_kl
from lsc_kernels.trainers._patch import Patch
from lsc_kernels.trainers._versions import require

if TYPE_CHECKING:
    from lsc_kernels.trainers._verl_plugin import LSCRewardManager as LSCRewardManager

KNOWN = ">=0.9,<0.10"
ENTRY_POINT = "lsc_kernels.trainers._verl_plugin"
REWARD_MANAGER = "lsc"
TRAINER_MODES = ("sync", "colocate_async", "separate_async")
PREFIX = "lsc_"


# verl calls the third argument by the function's own name
def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """KL per token from log-probabilities: ``verl.trainer.ppo.core_algos.kl_penalty``.

    Args:
        logprob: of the policy, [...].
        ref_logprob: of the reference, [...].
        kl_penalty: ``kl`` or ``k1``, ``abs``, ``mse`` or ``k2``, ``low_var_kl`` or ``k3``; with a ``+`` at its end the
            gradient is that of k2.

    Returns:
        [...], fp32 (verl's: the dtype of the arguments). k3 keeps its digits near the reference, where exp(-d) - 1 + d
        in fp32 is noise.

    Raises:
        ValueError: another estimator. ``full`` is not in verl either; it needs logits: :func:`lsc_kernels.token_kl`.

    Example:
        >>> import torch
        >>> kl_penalty(torch.tensor([-1.0, -9.0]), torch.tensor([-1.001, -1.0]), "low_var_kl")
        tensor([4.9988e-07, 1.0000e+01])
    """
    return trainer_kl("verl", kl_penalty, logprob, ref_logprob)


@torch.no_grad()
def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Whitened advantages and returns: ``verl.trainer.ppo.core_algos.compute_gae_advantage_return``.

    Args:
        token_level_rewards, values: [B, R].
        response_mask: [B, R]; what it leaves out is stepped over.
        gamma, lam: discount and trace.

    Returns:
        ``(advantages, returns)`` [B, R], 0 where the mask leaves out (verl has what it carries past there, and the loss
        leaves it out). NaN in a masked place stays there; in verl it spreads over the batch. Where no more than one
        token counts the advantages are 0; verl raises.
    """
    options = preset("verl").gae | {"gamma": float(gamma), "lam": float(lam)}
    counted = response_mask != 0  # verl's is int64, eight bytes a token, and it is read three times
    advantages, returns = gae(token_level_rewards, values, counted, **options)
    return masked_whiten(advantages, counted), returns


@torch.no_grad()
def apply_kl_penalty(data: Any, kl_ctrl: Any, kl_penalty: str = "kl") -> tuple[Any, dict[str, float]]:
    """Take the price of KL from the rewards: ``verl.trainer.ppo.ray_trainer.apply_kl_penalty``.

    Args:
        data: a ``DataProto`` with ``response_mask``, ``token_level_scores``, ``old_log_probs`` and ``ref_log_prob``.
        kl_ctrl: verl's controller of beta.
        kl_penalty: as in :func:`kl_penalty`.

    Returns:
        ``data`` with ``token_level_rewards``, and verl's metrics. What the mask leaves out has no KL, even where a
        log-probability is NaN or -inf; in verl it is then NaN.
    """
    batch = data.batch
    mask, beta = batch["response_mask"], kl_ctrl.value
    kl = trainer_kl("verl", kl_penalty, batch["old_log_probs"], batch["ref_log_prob"], mask=mask)
    current = (kl.sum(-1) / (mask.sum(-1) + 1e-8)).mean().item()
    kl_ctrl.update(current_kl=current, n_steps=len(kl))
    batch["token_level_rewards"] = torch.sub(batch["token_level_scores"], kl, alpha=beta)
    return data, {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": beta}


PATCH = Patch(
    "verl",
    {
        "verl.trainer.ppo.core_algos:kl_penalty": kl_penalty,
        "verl.trainer.ppo.core_algos:compute_gae_advantage_return": compute_gae_advantage_return,
        "verl.trainer.ppo.ray_trainer:apply_kl_penalty": apply_kl_penalty,
    },
)


def patch() -> list[str]:
    """Put the three functions above in the place of verl's, in every module of it that has them or will import them.

    Returns:
        What was replaced, as ``module.function``; nothing where it has been before.

    Raises:
        MissingExtra: verl is not installed.
        UnknownVersion: a version that is not in :data:`KNOWN`; nothing is replaced.
    """
    require("verl", KNOWN)
    return PATCH.apply()


def unpatch() -> list[str]:
    """Put verl's functions back; returns what was."""
    return PATCH.undo()


Estimator = Callable[..., tuple[Tensor, Tensor]]


def _grouped(method: str, doc: str, *, over_the_batch: bool = False) -> Estimator:
    @torch.no_grad()
    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: np.ndarray,
        config: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        groups = torch.from_numpy(np.unique(np.asarray(index), return_inverse=True)[1].reshape(-1))
        scores = token_level_rewards.sum(-1)
        advantages = group_advantages(scores, groups.to(scores.device), method=method, eps=1e-6)
        if over_the_batch:
            advantages = masked_whiten(advantages, None)
        spread = torch.where(response_mask != 0, advantages.unsqueeze(-1), 0.0)
        return spread, spread

    estimator.__doc__ = doc
    return estimator


@torch.no_grad()
def _reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any, index: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """verl's ``reinforce_plus_plus``: discounted returns per token, whitened over the batch."""
    counted = response_mask != 0
    returns = discounted_returns(token_level_rewards, counted, gamma=float(config.gamma))
    return masked_whiten(returns, counted), returns


ESTIMATORS: dict[str, Estimator] = {
    "lsc_grpo": _grouped("grpo", "verl's ``grpo``: the z-score in the group. It undoes the LSC transform."),
    "lsc_dr_grpo": _grouped("dr_grpo", "Less the group's mean, not scaled."),
    "lsc_dr_grpo_batch": _grouped(
        "dr_grpo",
        "Less the group's mean, over the standard deviation of the whole batch: scaled, and LSC stays.",
        over_the_batch=True,
    ),
    "lsc_rloo": _grouped("rloo", "verl's ``rloo``: less the mean of the others."),
    "lsc_reinforce_plus_plus": _reinforce_plus_plus,
}
"""What the plugin registers, by name. The first four give each token of a response the advantage of its reward's sum. A
response that is alone in its group has 0; in verl its own score."""


def __getattr__(name: str) -> Any:
    """The reward manager, whose base class is verl's."""
    if name == "LSCRewardManager":
        return getattr(importlib.import_module(ENTRY_POINT), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _registered() -> list[tuple[str, str, bool]]:
    """What the plugin registers in verl: kind, name, and whether it is there."""
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER as MANAGERS
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    wanted = [("reward manager", REWARD_MANAGER, MANAGERS)]
    wanted += [("advantage estimator", name, ADV_ESTIMATOR_REGISTRY) for name in ESTIMATORS]
    wanted += [("trainer mode", PREFIX + mode, TRAINER_REGISTRY) for mode in TRAINER_MODES]
    return [
        (kind, name, getattr(registry.get(name), "__module__", "").startswith("lsc_kernels."))
        for kind, name, registry in wanted
    ]


def _why_not() -> str:
    """Why verl has not loaded the plugin."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    allowed = {name.strip() for name in policy.split(",")}
    if policy != "auto" and "lsc" not in allowed:
        return f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps it out; set it to auto, or add lsc to it"
    entries = [each for each in metadata.entry_points(group="verl.plugins") if each.value == ENTRY_POINT]
    if not entries:
        return (
            "the installed lsc-kernels has no entry point verl.plugins: install it into this environment (pip install "
            "lsc-kernels; a folder on PYTHONPATH is not enough)"
        )
    try:
        entries[0].load()
    except Exception as problem:
        return f"loading it fails with {type(problem).__name__}: {problem}"
    return "it loads now, but did not while verl was imported: something on the way imports verl in a circle"


def check() -> int:
    """Say whether verl has loaded the plugin; 0 if all of it."""
    try:
        version = require("verl", KNOWN)
    except ImportError as problem:
        print(f"FAILED  {problem}")
        return 1
    print(f"ok      verl {version}")
    importlib.import_module("verl")
    registered = _registered()
    for kind, name, there in registered:
        print(f"{'ok    ' if there else 'FAILED'}  {kind} {name}")
    if all(there for _, _, there in registered):
        return 0
    print(f"verl has not loaded the plugin of lsc-kernels: {_why_not()}")
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lsc_kernels.trainers.verl", description="the adapter of lsc-kernels for verl"
    )
    parser.add_argument("--check", action="store_true", required=True, help="say whether verl has loaded it")
    parser.parse_args(arguments)
    return check()


if __name__ == "__main__":
    sys.exit(main())
