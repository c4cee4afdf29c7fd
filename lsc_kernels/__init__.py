"""Fused kernels for the reward half of an RLHF step. See ``lsc-kernels info`` and the README."""

from __future__ import annotations

from lsc_kernels.backends import backends, get_backend, set_backend
from lsc_kernels.ops.aggregate_rewards import aggregate_rewards
from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
from lsc_kernels.ops.lsc_transform import lsc_transform
from lsc_kernels.ops.reward_head import reward_head
from lsc_kernels.ops.shaped_rewards import ShapedRewards, shaped_rewards
from lsc_kernels.ops.token_kl import TokenKL, token_kl
from lsc_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs
from lsc_kernels.ops.token_rewards import token_rewards

__version__ = "0.1.0"

__all__ = [
    "ShapedRewards",
    "TokenKL",
    "TokenLogprobs",
    "aggregate_rewards",
    "backends",
    "get_backend",
    "kl_from_logprobs",
    "lsc_transform",
    "reward_head",
    "set_backend",
    "shaped_rewards",
    "token_kl",
    "token_logprobs",
    "token_rewards",
]
