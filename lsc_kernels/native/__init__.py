"""The compiled kernels, one module per op. Importing this package loads ``lsc_kernels._C`` if it was built."""

from __future__ import annotations

from types import ModuleType

UNAVAILABLE: str | None = None
"""Why the compiled kernels cannot be used; None when they can."""

MISCONFIGURED: str | None = None
"""Why LSC_KERNELS_CPU cannot be followed: the first use of the library says it."""

OPS: dict[str, ModuleType] = {}

try:
    from lsc_kernels import _C
except ImportError as error:
    try:
        from lsc_kernels._build_info import SKIPPED
    except ImportError:
        SKIPPED = None
    UNAVAILABLE = (
        f"lsc_kernels._C was not built: {SKIPPED}" if SKIPPED else f"lsc_kernels._C does not load: {error}"
    )
else:
    try:
        _C.isa()
    except ValueError as error:
        UNAVAILABLE = MISCONFIGURED = str(error)

if UNAVAILABLE is None:
    from lsc_kernels.native import (
        aggregate_rewards,
        kl_from_logprobs,
        lsc_transform,
        reward_head,
        shaped_rewards,
        token_kl,
        token_logprobs,
        token_rewards,
    )

    OPS = {
        "aggregate_rewards": aggregate_rewards,
        "kl_from_logprobs": kl_from_logprobs,
        "lsc_transform": lsc_transform,
        "reward_head": reward_head,
        "shaped_rewards": shaped_rewards,
        "token_kl": token_kl,
        "token_logprobs": token_logprobs,
        "token_rewards": token_rewards,
    }
