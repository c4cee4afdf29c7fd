"""The compiled kernels, one module per op. Importing this package loads ``lsc_kernels._C`` if it was built."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Final

import torch

UNAVAILABLE: str | None = None
"""Why the compiled kernels cannot be used; None when they can."""

MISCONFIGURED: str | None = None
"""Why LSC_KERNELS_CPU cannot be followed: the first use of the library says it."""

OPS: dict[str, ModuleType] = {}

KERNEL_OF: Final = {"discounted_returns": "gae"}
"""Whose kernels serve an op that has none of its own name."""


def unavailable(device_type: str) -> str | None:
    """Why the compiled kernels cannot serve a device; None when they can."""
    if UNAVAILABLE is not None or device_type == "cpu":
        return UNAVAILABLE
    if device_type != "cuda":
        return f"the compiled kernels are for CPU and CUDA, not for {device_type}"
    if skipped := _C.cuda_skipped():
        return f"lsc_kernels._C was built without CUDA kernels: {skipped}"
    return _uncovered()


def _uncovered() -> str | None:
    """Why a CUDA device that torch sees cannot run the kernels in this binary; None when all can."""
    built = _C.cuda_architectures()
    machine_code = [int(name.removeprefix("sm_")) for name in built if name.startswith("sm_")]
    ptx = [int(name.removeprefix("compute_")) for name in built if name.startswith("compute_")]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip or not (
            any(10 * major + minor >= each for each in ptx)
            or any(each // 10 == major and each % 10 <= minor for each in machine_code)
        ):
            name = torch.cuda.get_device_name(device)
            return f"{name} is none of the architectures it was built for ({', '.join(built)})"
    return None


@functools.cache
def ops(device_type: str) -> dict[str, ModuleType]:
    """The ops that have a compiled kernel for a device. The dispatcher takes milliseconds to list its own."""
    if device_type == "cpu":
        return OPS
    key, registered = device_type.upper(), set(torch._C._dispatch_get_all_op_names())

    def has_kernel(op: str) -> bool:
        name = f"lsc_kernels::{KERNEL_OF.get(op, op)}_forward"
        return name in registered and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)

    return {op: module for op, module in OPS.items() if has_kernel(op)}


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

    OPS = {
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
