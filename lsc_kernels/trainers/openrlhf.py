"""OpenRLHF: a reward function from several properties, and drop-ins for its KL, rewards and advantages.

OpenRLHF loads a file, ``--reward.remote_url rewards.py``, and calls its ``reward_func(queries, prompts, labels)``::

    from lsc_kernels.trainers.openrlhf import make_reward_func

    reward_func = make_reward_func({"helpful": helpful, "harmless": harmless}, reference_reward=[1.2, 0.3])

:func:`patch` replaces functions of OpenRLHF in a process; as ``worker_process_setup_hook`` of Ray's runtime
environment, in all of them. Nothing is replaced unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.ops.discounted_returns import discounted_returns
from lsc_kernels.ops.gae import gae
from lsc_kernels.ops.token_rewards import token_rewards
from lsc_kernels.presets import preset
from lsc_kernels.trainers._kl import trainer_kl
from lsc_kernels.trainers._patch import Patch
from lsc_kernels.trainers._rewards import PropertyRewards
from lsc_kernels.trainers._versions import require

KNOWN = ">=0.11,<0.12"
# the importance weight of its unbiased gradient is at most this
WEIGHT_CLIP = 10.0

Scorer = Callable[[list[str], list[str], list[Any]], Sequence[Any]]


def make_reward_func(
    scorers: Mapping[str, Scorer], *, reference_reward: Any, **options: Any
) -> Callable[[list[str], list[str], list[Any]], dict[str, Any]]:
    """A ``reward_func`` for ``--reward.remote_url``: the log-probability that a response is good.

    Args:
        scorers: by the name of a property, a function of queries (prompt and response, as text), prompts and labels
            that returns a score for each query; None or NaN where there is none.
        reference_reward: what is good enough: a number, a number for each property, or the path of a table of
            references (:class:`lsc_kernels.reference.ReferenceTable`), looked up by prompt.
        options: ``formula``, ``weights``, ``scale``, ``floor``, ``missing``, as in
            :func:`lsc_kernels.aggregate_rewards`.

    Returns:
        ``reward_func(queries, prompts, labels)``, which returns ``rewards`` [B], the utilities; ``scores`` [B], the
        probabilities of being good in [0, 1], as OpenRLHF's dynamic filtering wants them; and ``extra_logs`` with the
        scores [B] of each property.

    Example:
        >>> def helpful(queries, prompts, labels):
        ...     return [2.0 for _ in queries]
        >>> def short(queries, prompts, labels):
        ...     return [5.0 - len(query) + len(prompt) for query, prompt in zip(queries, prompts)]
        >>> reward_func = make_reward_func({"helpful": helpful, "short": short}, reference_reward=0.0)
        >>> reward_func(["Why? No."], ["Why?"], [None])["rewards"]
        tensor([-0.4402])
    """
    rewards = PropertyRewards(list(scorers), reference_reward=reference_reward, **options)

    def reward_func(queries: list[str], prompts: list[str], labels: list[Any]) -> dict[str, Any]:
        by_name = {}
        for name, scorer in scorers.items():
            given = scorer(queries, prompts, labels)
            by_name[name] = [None if each is None else float(each) for each in given]
            if len(by_name[name]) != len(queries):
                raise ValueError(
                    f"the scorer of {name!r} must return one score per query, {len(queries)}; got {len(by_name[name])}"
                )
        rows = [{name: values[row] for name, values in by_name.items()} for row in range(len(queries))]
        utility = rewards(rows, prompts=prompts)
        logs = {
            name: torch.tensor([float("nan") if each is None else each for each in values])
            for name, values in by_name.items()
        }
        return {"rewards": utility, "scores": utility.exp(), "extra_logs": logs}

    return reward_func


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """KL per token from log-probabilities: ``openrlhf.models.utils.compute_approx_kl``.

    Args:
        log_probs, log_probs_base: of the policy and its reference, [...].
        log_probs_old: of the policy that wrote the response, [...]; weighs the unbiased gradient.
        kl_estimator: ``k1``, ``k2`` or ``k3``.
        unbiased_gradient: keep the value, take the gradient of k2, times min(pi / pi_old, 10).

    Returns:
        [...], fp32. k3 keeps its digits near the reference. A clamped value has its gradient as in OpenRLHF: with the
        unbiased one that of k2, else 0.

    Example:
        >>> import torch
        >>> compute_approx_kl(torch.tensor([-1.0, -40.0]), torch.tensor([-1.001, -1.0]), kl_estimator="k3")
        tensor([4.9988e-07, 1.0000e+01])
    """
    if not unbiased_gradient:
        return trainer_kl("openrlhf", kl_estimator, log_probs, log_probs_base)
    weight = None
    if log_probs_old is not None:
        weight = (log_probs.detach().float() - log_probs_old.detach().float()).exp().clamp(max=WEIGHT_CLIP)
    return trainer_kl("openrlhf", kl_estimator + "+", log_probs, log_probs_base, weight=weight)


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """Rewards per token: ``openrlhf.models.utils.compute_reward``.

    Args:
        r: [B], of the sequence; goes to the last action.
        kl_coef: beta; what is not positive is 0.
        kl: [B, T].
        action_mask: [B, T]; None counts all (an error in OpenRLHF).
        reward_clip_range: of ``r``.

    Returns:
        [B, T], fp32; 0 outside the mask, even where the KL is NaN there (OpenRLHF leaves -beta * KL, which its
        advantages multiply by the mask). A sequence without an action gets zeros (there its reward goes to the last
        position). With beta 0 an infinite KL plays no part (there it makes NaN).

    Example:
        >>> import torch
        >>> compute_reward(torch.tensor([2.0]), 0.1, torch.tensor([[0.5, 1.0, 7.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[-0.0500,  1.9000,  0.0000]])
    """
    return token_rewards(
        *(r, kl, action_mask),
        beta=max(float(kl_coef), 0.0),
        utility_clip=(reward_clip_range[0], reward_clip_range[1]) if reward_clip_range else None,
        **preset("openrlhf").token_rewards,
    )


@torch.no_grad()
def get_advantages_and_returns(
    self: Any, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """``RemoteExperienceMaker.get_advantages_and_returns``: advantages (not whitened) and returns, [B, T].

    0 outside the mask, where OpenRLHF has what follows, discounted; its losses leave it out.
    """
    options = preset("openrlhf").gae | {"gamma": float(gamma), "lam": float(lambd)}
    return gae(rewards, values, action_mask, **options)


@torch.no_grad()
def get_cumulative_returns(self: Any, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
    """``RemoteExperienceMaker.get_cumulative_returns``: discounted sums of what comes [B, T]; 0 outside the mask."""
    return discounted_returns(rewards, action_mask, gamma=float(gamma), holes=preset("openrlhf").gae["holes"])


_MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
PATCH = Patch(
    "openrlhf",
    {
        "openrlhf.models.utils:compute_approx_kl": compute_approx_kl,
        "openrlhf.models.utils:compute_reward": compute_reward,
        f"{_MAKER}.get_advantages_and_returns": get_advantages_and_returns,
        f"{_MAKER}.get_cumulative_returns": get_cumulative_returns,
    },
)


def patch() -> list[str]:
    """Put the four functions above in the place of OpenRLHF's.

    ``compute_approx_kl`` and ``compute_reward`` are imported by value: they are replaced in every module of OpenRLHF
    that has them, and those imported later get ours. This holds for one process, and OpenRLHF trains in processes of
    Ray: name this function as their ``worker_process_setup_hook`` (docs/trainers-openrlhf.md).

    Returns:
        What was replaced, as ``module.function``; nothing where it has been before.

    Raises:
        MissingExtra: OpenRLHF is not installed.
        UnknownVersion: a version that is not in :data:`KNOWN`; nothing is replaced.
    """
    require("openrlhf", KNOWN)
    return PATCH.apply()


def unpatch() -> list[str]:
    """Put OpenRLHF's functions back; returns what was."""
    return PATCH.undo()
