"""Which implementation serves an op on a device.

A backend is a package with one module per op, and every module offers the same ``forward`` and ``backward``. They
compute values and know nothing of autograd. ``select`` is called once per public call.

=========  ==========================================================  ==========================
backend    what it is                                                  serves
=========  ==========================================================  ==========================
native     C++ kernels, compiled into ``lsc_kernels._C``               CPU: fp32, bf16, fp16
eager      the definitions in plain PyTorch, computed in fp64          every device, every dtype
=========  ==========================================================  ==========================

fp64 input is always served by ``eager``: that is the documented path for it, not a fallback.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import Final

import torch

from lsc_kernels import eager, native

CHOICES: Final = ("auto", "native", "triton", "eager")

_TRITON_MISSING: Final = "this version has no Triton kernels"


def _native_reason(device_type: str) -> str | None:
    """Why ``native`` cannot serve a device; None when it can."""
    if device_type != "cpu":
        return f"this version has native kernels for the CPU only, not for {device_type}"
    return native.UNAVAILABLE


def backends() -> dict[str, dict[str, str]]:
    """What is available for each device, and why the rest is not.

    Returns ``{device: {backend: "available" or the reason why not}}`` for ``cpu`` and ``cuda``. The backend that
    ``set_backend("auto")`` uses on a device is the first available one.

    Example:
        >>> import lsc_kernels as lk
        >>> lk.backends()["cpu"]["eager"]
        'available'
    """
    no_cuda = None if torch.cuda.is_available() else "torch sees no CUDA device"
    table: dict[str, dict[str, str]] = {}
    for device, missing in (("cpu", None), ("cuda", no_cuda)):
        table[device] = {
            "native": missing or _native_reason(device) or "available",
            "triton": missing or _TRITON_MISSING,
            "eager": missing or "available",
        }
    return table


def set_backend(name: str) -> None:
    """Choose the backend for every later call in this process.

    ``auto`` takes the fastest that is available on the tensor's device; a name insists on that one. The environment
    variable ``LSC_KERNELS_BACKEND`` sets the first value.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not available on any device of this machine; the message says why.

    Example:
        >>> import lsc_kernels as lk
        >>> lk.set_backend("eager")
        >>> lk.set_backend("auto")
    """
    global _choice, _environment_error
    if name not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}; got {name!r}")
    if name != "auto":
        available = backends()
        if all(available[device][name] != "available" for device in available):
            reasons = "; ".join(f"{device}: {available[device][name]}" for device in available)
            raise RuntimeError(
                f"backend {name!r} is not available here ({reasons}). `lsc-kernels info` says how to get it."
            )
    _choice, _environment_error = name, native.MISCONFIGURED


def get_backend() -> str:
    """The name last given to :func:`set_backend`.

    Raises:
        ValueError: ``LSC_KERNELS_BACKEND`` or ``LSC_KERNELS_CPU`` asks for what is not there.
    """
    _check_environment()
    return _choice


def _check_environment() -> None:
    """Report a bad environment variable at the first use: importing a package should not fail for it."""
    if _environment_error is not None:
        raise ValueError(_environment_error)


def select(op: str, *tensors: torch.Tensor | None) -> ModuleType:
    """The module that serves ``op`` for these tensors (all on one device, which the op has checked)."""
    if _environment_error is not None:
        _check_environment()
    on_cpu = True
    for tensor in tensors:
        if tensor is not None:
            if tensor.dtype is torch.float64:
                return eager.OPS[op]
            on_cpu = tensor.is_cpu
    if on_cpu and _choice in ("auto", "native") and op in native.OPS:
        return native.OPS[op]
    if _choice == "eager":
        return eager.OPS[op]
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if _choice == "auto":
        if not torch.compiler.is_compiling():
            _warn_fallback(op, device_type)
        return eager.OPS[op]
    reason = _native_reason(device_type) if _choice == "native" else _TRITON_MISSING
    raise RuntimeError(
        f"{op}: backend {_choice!r} does not serve {device_type} tensors: {reason}. "
        "lk.set_backend('auto') lets the op choose."
    )


_warned: set[tuple[str, str]] = set()


def _warn_fallback(op: str, device_type: str) -> None:
    if (op, device_type) in _warned:
        return
    _warned.add((op, device_type))
    warnings.warn(
        f"lsc_kernels.{op}: no compiled kernel for {device_type} tensors ({_native_reason(device_type)}); "
        "using eager PyTorch, which is slower and needs more memory. `lsc-kernels info` says how to get the kernels.",
        RuntimeWarning,
        stacklevel=4,
    )


_choice = "auto"
_environment_error = native.MISCONFIGURED
try:
    set_backend(os.environ.get("LSC_KERNELS_BACKEND", "auto"))
except (ValueError, RuntimeError) as error:
    _environment_error = f"LSC_KERNELS_BACKEND: {error}"
