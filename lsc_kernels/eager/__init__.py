"""The definitions in plain PyTorch, one module per op, computed in fp64: truth for the tests, fallback everywhere."""

from __future__ import annotations

from types import ModuleType

from lsc_kernels.eager import (
    aggregate_rewards,
    bradley_terry_loss,
    discounted_returns,
    gae,
    group_advantages,
    kl_from_logprobs,
    lsc_transform,
    masked_whiten,
    reward_head,
    shaped_rewards,
    token_kl,
    token_logprobs,
    token_rewards,
)

OPS: dict[str, ModuleType] = {
    "aggregate_rewards": aggregate_rewards,
    "bradley_terry_loss": bradley_terry_loss,
    "discounted_returns": discounted_returns,
    "gae": gae,
    "group_advantages": group_advantages,
    "kl_from_logprobs": kl_from_logprobs,
    "lsc_transform": lsc_transform,
    "masked_whiten": masked_whiten,
    "reward_head": reward_head,
    "shaped_rewards": shaped_rewards,
    "token_kl": token_kl,
    "token_logprobs": token_logprobs,
    "token_rewards": token_rewards,
}
