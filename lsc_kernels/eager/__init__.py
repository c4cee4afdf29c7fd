"""The definitions in plain PyTorch, one module per op, computed in fp64: truth for the tests, fallback everywhere."""

from __future__ import annotations

from types import ModuleType

from lsc_kernels.eager import kl_from_logprobs, token_kl, token_logprobs

OPS: dict[str, ModuleType] = {
    "kl_from_logprobs": kl_from_logprobs,
    "token_kl": token_kl,
    "token_logprobs": token_logprobs,
}
