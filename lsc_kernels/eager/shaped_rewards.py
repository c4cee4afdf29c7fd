"""The whole chain from hidden states and logits to per-token rewards: the definition is its parts, one after another.

A backend's module of this name offers ``forward``, and its modules of the parts for the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager import (
    aggregate_rewards,
    kl_from_logprobs,
    reward_head,
    token_kl,
    token_logprobs,
    token_rewards,
)
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.token_rewards import RewardOptions

__all__ = ["aggregate_rewards", "forward", "kl_from_logprobs", "reward_head", "token_kl", "token_rewards"]


class RewardSide(NamedTuple):
    """Scores, or the hidden states they come from, and what turns them into a utility."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    attention_mask: Tensor | None
    head_index: Tensor | None
    cu_seqlens: Tensor | None
    scores: Tensor | None
    reference_reward: float | Tensor
    scale: float | Tensor
    floor: float | Tensor
    weights: Tensor | None
    ignore_missing: bool
    program: tuple[int, ...] | None


class PolicySide(NamedTuple):
    """Two models' logits [B, T, V], or without ``actions`` their log-probabilities [B, T], and where rewards go.

    ``mask`` is the caller's, of any dtype, so that a backend can read it in its one pass: see :func:`with_counted`.
    """

    policy: Tensor
    ref: Tensor
    actions: Tensor | None
    mask: Tensor | None
    old_logprobs: Tensor | None
    temperature: float | Tensor
    place: Tensor | None
    dense: Tensor | None


def with_counted(policy: PolicySide) -> PolicySide:
    """With the positions that the mask and the actions leave in, as bool: what an action leaves out has no reward."""
    mask = policy.mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask != 0
    if policy.actions is not None:
        mask = token_logprobs.counted(policy.actions, mask)
    return policy._replace(mask=mask)


def left_in(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """0 where the mask (bool) leaves out."""
    return per_token if mask is None else torch.where(mask, per_token, 0)


class Outputs(NamedTuple):
    """``entropy`` and ``state`` are empty where the log-probabilities were given."""

    rewards: Tensor
    utility: Tensor
    scores: Tensor
    kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    state: Tensor


def forward(
    reward: RewardSide, policy: PolicySide, kl_options: KLOptions, reward_options: RewardOptions
) -> Outputs:
    policy = with_counted(policy)
    scores = reward.scores
    if scores is None:
        assert reward.hidden is not None and reward.weight is not None
        scores = reward_head.forward(reward.hidden, reward.weight, *reward[2:6], every=False)
    utility = aggregate_rewards.forward(scores, *reward[7:])
    if policy.actions is None:
        kl = kl_from_logprobs.forward(policy.policy, policy.ref, policy.mask, policy.old_logprobs, kl_options)
        logprobs, ref_logprobs = (
            left_in(given, policy.mask).to(kl.dtype, copy=True) for given in (policy.policy, policy.ref)
        )
        entropy, state = kl.new_empty(0), kl.new_empty(0)
    else:
        kl, logprobs, ref_logprobs, entropy, state = token_kl.forward(
            *(
                policy.policy,
                policy.ref,
                policy.actions,
                policy.mask,
                policy.old_logprobs,
                policy.temperature,
            ),
            kl_options,
        )
    try:
        rewards = token_rewards.forward(utility, kl, policy.mask, policy.place, policy.dense, reward_options)
    except IndexError as error:
        raise IndexError(f"placement_{error}") from None
    return Outputs(rewards, utility, scores, kl, logprobs, ref_logprobs, entropy, state)
