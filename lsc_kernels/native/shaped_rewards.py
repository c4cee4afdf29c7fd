"""shaped_rewards through the compiled kernels: one parallel region on the CPU, one launch on CUDA; backward through its
parts' kernels.

What the op reads in its one pass goes to it as it is: a conversion here would be a pass, or a launch, of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.shaped_rewards import Outputs, PolicySide, RewardSide
from lsc_kernels.eager.token_rewards import RewardOptions
from lsc_kernels.native import aggregate_rewards, kl_from_logprobs, reward_head, token_kl, token_rewards
from lsc_kernels.native.kl_from_logprobs import arguments, float_or_none
from lsc_kernels.native.lsc_transform import operand
from lsc_kernels.native.token_logprobs import SAVED, split_temperature
from lsc_kernels.native.token_rewards import PLACEMENTS

__all__ = ["aggregate_rewards", "forward", "kl_from_logprobs", "reward_head", "token_kl", "token_rewards"]

_ops = torch.ops.lsc_kernels


def forward(
    reward: RewardSide, policy: PolicySide, kl_options: KLOptions, reward_options: RewardOptions
) -> Outputs:
    beta, placement, low, high = reward_options
    rewards, utility, scores, *rest = _ops.shaped_rewards_forward.default(
        *reward[:7],
        *(*operand(reward.reference_reward), *operand(reward.scale), *operand(reward.floor)),
        *(float_or_none(reward.weights), reward.ignore_missing, reward.program),
        *(policy.policy, policy.ref, policy.actions, policy.mask, policy.old_logprobs),
        *split_temperature(policy.temperature),
        *arguments(kl_options),
        *(policy.place, policy.dense, beta, PLACEMENTS.index(placement), low, high),
    )
    return Outputs(rewards, utility, scores if reward.scores is None else reward.scores, *rest)


@torch.library.register_fake("lsc_kernels::shaped_rewards_forward")
def _(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    head_index: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor | None,
    *rest: object,
) -> tuple[Tensor, ...]:
    policy, actions = rest[9], rest[11]
    assert isinstance(policy, Tensor)
    batch, length = policy.shape[:2]

    def new(*shape: int) -> Tensor:
        return policy.new_empty(shape, dtype=torch.float32)

    properties = 0 if weight is None else weight.shape[0]
    own_scores = new(0) if hidden is None else new(batch, properties)
    entropy = new(0) if actions is None else new(batch, length)
    state = new(0) if actions is None else new(batch * length, SAVED)
    per_token = [new(batch, length) for _ in range(3)]
    return new(batch, length), new(batch), own_scores, *per_token, entropy, state
