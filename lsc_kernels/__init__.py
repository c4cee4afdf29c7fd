"""Fused kernels for the reward half of an RLHF step. See ``lsc-kernels info`` and the README."""

from __future__ import annotations

from lsc_kernels.backends import backends, get_backend, set_backend
from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
from lsc_kernels.ops.token_kl import TokenKL, token_kl
from lsc_kernels.ops.token_logprobs import TokenLogprobs, token_logprobs

__version__ = "0.1.0"

__all__ = [
    "TokenKL",
    "TokenLogprobs",
    "backends",
    "get_backend",
    "kl_from_logprobs",
    "set_backend",
    "token_kl",
    "token_logprobs",
]
