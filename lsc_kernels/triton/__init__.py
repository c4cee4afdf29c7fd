"""The ops in Triton, one module per op. Importing this package does not import triton: ``ops`` does."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Final

import torch

NAMES: Final = (
    "aggregate_rewards",
    "bradley_terry_loss",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_from_logprobs",
    "lsc_transform",
    "masked_whiten",
    "reward_head",
    "shaped_rewards",
    "token_kl",
    "token_logprobs",
    "token_rewards",
)

OLDEST_NVIDIA: Final = (8, 0)
OLDEST_AMD: Final = "gfx90a"
_AMD: Final = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET=1`` has kernels run as Python on CPU tensors, which is for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device_type: str) -> str | None:
    """Why the Triton kernels cannot serve a device; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'lsc-kernels[triton]'"
    if device_type == "cpu":
        return (
            None
            if interpreted()
            else "Triton kernels run on a GPU (on the CPU only under TRITON_INTERPRET=1, for tests)"
        )
    if device_type != "cuda":
        return f"there are no Triton kernels for {device_type}"
    if interpreted():
        return "TRITON_INTERPRET=1 has the kernels interpreted, on CPU tensors only"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        architecture = properties.gcnArchName.split(":")[0]
        supported = architecture.startswith(_AMD)
        return (
            None
            if supported
            else f"{architecture} is older than {OLDEST_AMD}, the oldest that the kernels are for"
        )
    capability = (properties.major, properties.minor)
    if capability < OLDEST_NVIDIA:
        return f"{properties.name} is sm_{capability[0]}{capability[1]}; the kernels are for sm_80 (A100) and newer"
    return None


# Not functools.cache, which torch.compile traces through and warns of.
_OPS: dict[str, ModuleType] = {}


def ops() -> dict[str, ModuleType]:
    """The modules by op; imports triton."""
    if not _OPS:
        _OPS.update((name, importlib.import_module(f"lsc_kernels.triton.{name}")) for name in NAMES)
    return _OPS
