"""Argument checks that several ops share. Every message names the argument, what it got and what it wants."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import SupportsIndex, TypeGuard

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

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


def has_values(value: Tensor) -> bool:
    """Whether there are values to look at: on the CPU, where nobody waits for them, while nothing is traced."""
    return (
        value.is_cpu
        and type(value) in (Tensor, torch.nn.Parameter)  # a FakeTensor has none
        and value.numel() > 0
        and not torch.compiler.is_compiling()
        and not is_functorch_wrapped_tensor(value)
    )


def on(name: str, value: Tensor, device: torch.device) -> None:
    """A tensor on a device."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}; got {value.device}")


def same_device(name: str, value: Tensor, other_name: str, device: torch.device) -> None:
    """A tensor on the device of another."""
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {other_name}, {device}; got {value.device}")


def like(
    name: str, value: Tensor, wanted: Sequence[int], meaning: str, other_name: str, device: torch.device
) -> None:
    """A tensor of the wanted shape, on the device of another."""
    if value.shape != wanted:
        shape(name, value, wanted, meaning)
    if value.device != device:
        same_device(name, value, other_name, device)


def rows_of(name: str, logits: Tensor) -> torch.Size:
    """The shape of logits [..., V] without V, which is not 0."""
    sizes = logits.shape
    if len(sizes) == 0 or sizes[-1] == 0:
        raise ValueError(f"{name} must be [..., V] with V > 0; got {list(sizes)}")
    return sizes[:-1]


def mask(name: str, value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor:
    """A mask of any kind, as it is."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a tensor (bool, int or float; nonzero counts); got {type(value).__name__}"
        )
    if value.is_complex():
        raise TypeError(f"{name} must be bool, int or float (nonzero counts); got {value.dtype}")
    if value.shape != wanted:
        shape(name, value, wanted, meaning)
    on(name, value, device)
    return value


def counted(name: str, value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor:
    """A mask as bool: nonzero counts."""
    checked = mask(name, value, wanted, meaning, device)
    return checked if checked.dtype is torch.bool else checked != 0


def no_grad(name: str, value: Tensor) -> None:
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} has no gradient here, but requires grad; pass {name}.detach()")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number, of Python or another library (NumPy's scalars); neither a bool nor a tensor is."""
    return isinstance(value, (int, float, Real)) and not isinstance(value, bool)


def whole(value: object) -> int | None:
    """An integer of Python or another library (NumPy's scalars) as Python's; None if it is none. A bool is not."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several numbers
        return None


def number(name: str, value: object) -> float:
    """A finite float."""
    if not is_number(value):
        raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    # torch.compile traces a comparison of a symbolic float, not isfinite
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite; got {value}")
    return float(value)


def fraction(name: str, value: object) -> float:
    """A float in [0, 1]."""
    checked = number(name, value)
    if not 0.0 <= checked <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]; got {checked}")
    return checked


def interval(name: str, value: object) -> tuple[float, float]:
    """``(low, high)`` with low <= high; None is no limit on either side."""
    if value is None:
        return -math.inf, math.inf
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be (low, high) or None; got {value!r}")
    for limit in value:
        if limit is not None and not is_number(limit):
            raise TypeError(f"{name} must be (low, high), two numbers; got {value!r}")
    low = -math.inf if value[0] is None else float(value[0])
    high = math.inf if value[1] is None else float(value[1])
    if not low <= high:
        raise ValueError(f"{name} must be (low, high) with low <= high; got {value!r}")
    return low, high


def temperature(value: object, actions: Tensor, mask: Tensor | None, device: torch.device) -> float | Tensor:
    """A float > 0, or a tensor of such, one per action. A tensor's values are checked on the CPU only: no host wait."""
    if isinstance(value, float) and 0 < value < math.inf:
        return value
    if isinstance(value, Tensor):
        floating("temperature", value)
        if value.dim() != 0:
            shape("temperature", value, actions.shape, "actions")
        on("temperature", value, device)
        no_grad("temperature", value)
        per_row = value.expand(actions.shape)
        if has_values(per_row):
            _check_temperatures(per_row, actions, mask)
        return per_row
    if not is_number(value):
        raise TypeError(f"temperature must be a float or a tensor; got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be finite and > 0; got {value}")
    return float(value)


def _check_temperatures(per_row: Tensor, actions: Tensor, mask: Tensor | None) -> None:
    wrong = ~((per_row > 0) & (per_row < math.inf))
    if not wrong.any():
        return
    wrong &= actions != -100 if mask is None else (actions != -100) & (mask != 0)
    if wrong.any():
        raise ValueError(f"temperature must be finite and > 0; got {per_row[wrong].flatten()[0].item()}")


def old_logprobs(value: object, wanted: Sequence[int], meaning: str, device: torch.device) -> Tensor:
    """The log-probabilities an importance ratio is taken against; a constant."""
    tensor = floating("old_logprobs", value)
    shape("old_logprobs", tensor, wanted, meaning)
    on("old_logprobs", tensor, device)
    return tensor.detach()


def no_process_group(value: object) -> None:
    if value is not None:
        raise ValueError(
            "process_group: this version has no vocabulary-parallel kernels; gather the logits, pass None"
        )
