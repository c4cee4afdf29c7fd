"""Argument checks that several ops share. Every message names the argument, what it got and what it wants."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)


def floating(name: str, value: object) -> Tensor:
    """A floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64; got {value.dtype}")
    return value


def integer(name: str, value: object) -> Tensor:
    """An index tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in INTEGER:
        raise TypeError(f"{name} must be int64 or int32; got {value.dtype}")
    return value


def shape(name: str, value: Tensor, wanted: Sequence[int], meaning: str) -> None:
    if value.shape != wanted:
        raise ValueError(f"{name} must have the shape of {meaning}, {list(wanted)}; got {list(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}; got {value.device}")


def mask(name: str, value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor | None:
    """A mask of any kind, as it is. None stays None."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor (bool, int or float; nonzero counts); got {type(value).__name__}")
    shape(name, value, wanted, meaning)
    if value.device != device:
        raise ValueError(f"{name} must be on {device}; got {value.device}")
    return value


def counted(name: str, value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor | None:
    """A mask as bool: nonzero counts. None stays None."""
    checked = mask(name, value, wanted, meaning, device)
    return checked if checked is None or checked.dtype is torch.bool else checked != 0


def no_grad(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} has no gradient here, but requires grad; pass {name}.detach()")


def number(name: str, value: object) -> float:
    """A finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)


def interval(name: str, value: object) -> tuple[float, float]:
    """``(low, high)`` with low <= high; None is no limit on either side."""
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (low, high) or None; got {value!r}")
    low = -math.inf if value[0] is None else float(value[0])
    high = math.inf if value[1] is None else float(value[1])
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high; got {value!r}")
    return low, high


def temperature(value: object, wanted: Sequence[int], device: torch.device) -> float | Tensor:
    """A float > 0, or a tensor [...] of such. Values of a tensor are checked on the CPU only: no host wait."""
    if isinstance(value, Tensor):
        floating("temperature", value)
        if value.dim() != 0:
            shape("temperature", value, wanted, "actions")
        if value.device != device:
            raise ValueError(f"temperature must be on {device}; got {value.device}")
        no_grad("temperature", value)
        if device.type == "cpu" and not torch.compiler.is_compiling():
            if not bool(((value > 0) & (value < math.inf)).all()):
                raise ValueError(f"temperature must be finite and > 0; got {value.min().item()} ... {value.max().item()}")
        return value.expand(wanted)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"temperature must be a float or a tensor; got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be finite and > 0; got {value}")
    return float(value)


def old_logprobs(value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor | None:
    """The log-probabilities an importance ratio is taken against; a constant."""
    if value is None:
        return None
    tensor = floating("old_logprobs", value)
    shape("old_logprobs", tensor, wanted, meaning)
    if tensor.device != device:
        raise ValueError(f"old_logprobs must be on {device}; got {tensor.device}")
    return tensor.detach()


def no_process_group(value: object) -> None:
    if value is not None:
        raise ValueError("process_group: this version has no vocabulary-parallel kernels; gather the logits, pass None")
