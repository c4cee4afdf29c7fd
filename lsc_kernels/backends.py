"""Which implementation serves an op on a device.

A backend is a package with one module per op, and every module offers the same ``forward`` and ``backward``. They
compute values and know nothing of autograd. ``select`` is called once per public call.

=========  ==========================================================  ============================================
backend    what it is                                                  serves
=========  ==========================================================  ============================================
native     C++ and CUDA kernels, compiled into ``lsc_kernels._C``      CPU and CUDA: fp32, bf16, fp16
triton     kernels that Triton compiles when they are first used       CUDA (sm_80 and newer, AMD gfx90a and newer)
eager      the definitions in plain PyTorch, computed in fp64          every device, every dtype
=========  ==========================================================  ============================================

fp64 input is always served by ``eager``: that is the documented path for it, not a fallback. Triton's interpreter
(``TRITON_INTERPRET=1``) serves CPU tensors where it is asked for by name: it is for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType
from typing import Final

import torch
from torch.autograd import forward_ad

from lsc_kernels import eager, native, triton

CHOICES: Final = ("auto", "native", "triton", "eager")

PREFERENCE: Final = {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")}
"""What ``auto`` tries on a device, in order. Neither ``triton`` nor ``native`` was measured on a GPU yet."""


def _reason(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve a device; None when it can."""
    if backend == "native":
        return native.unavailable(device_type)
    if backend == "triton":
        return triton.unavailable(device_type)
    return None


def _modules(backend: str) -> dict[str, ModuleType]:
    if backend == "native":
        return native.OPS
    return triton.ops() if backend == "triton" else eager.OPS


def backends() -> dict[str, dict[str, str]]:
    """What is available for each device, and why the rest is not.

    Returns ``{device: {backend: "available" or the reason why not}}`` for ``cpu`` and ``cuda``. The backend that
    ``set_backend("auto")`` uses on a device is the first available one.

    Example:
        >>> import lsc_kernels as lk
        >>> lk.backends()["cpu"]["eager"]
        'available'
    """
    missing = {"cpu": None, "cuda": None if torch.cuda.is_available() else "torch sees no CUDA device"}
    return {
        device: {
            backend: missing[device] or _reason(backend, device) or "available"
            for backend in dict.fromkeys((*order, *CHOICES[1:]))
        }
        for device, order in PREFERENCE.items()
    }


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
    _decide.cache_clear()


def get_backend() -> str:
    """The name last given to :func:`set_backend`, else that in ``LSC_KERNELS_BACKEND``, else ``auto``.

    Returns:
        ``auto``, ``native``, ``triton`` or ``eager``. ``auto`` stays ``auto``: what it takes on a device is the first
        that :func:`backends` calls available there.

    Raises:
        ValueError: ``LSC_KERNELS_BACKEND`` or ``LSC_KERNELS_CPU`` asks for what is not there.

    Example:
        >>> import lsc_kernels as lk
        >>> lk.get_backend() in ("auto", "native", "triton", "eager")
        True
    """
    _check_environment()
    return _choice


def _check_environment() -> None:
    """Report a bad environment variable at the first use: importing a package should not fail for it."""
    if _environment_error is not None:
        raise ValueError(_environment_error)


def select(op: str, tensor: torch.Tensor, *operands: object) -> ModuleType:
    """The module that serves ``op`` for a tensor and those among the other operands (one device: checked)."""
    if _environment_error is not None:
        _check_environment()
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, tensor, *operands)
    if tensor.dtype is torch.float64:
        return eager.OPS[op]
    for operand in operands:
        if isinstance(operand, torch.Tensor) and operand.dtype is torch.float64:
            return eager.OPS[op]
    device_type = "cpu" if tensor.is_cpu else tensor.device.type
    backend = _serving(op, device_type, _choice)
    if backend is not None:
        return _modules(backend)[op]
    if not torch.compiler.is_compiling():
        _warn_fallback(op, device_type)
    return eager.OPS[op]


def _refuse_tangents(op: str, *operands: object) -> None:
    """Kernels would drop the tangents of forward-mode differentiation, and eager has its derivatives written out."""
    for operand in operands:
        if isinstance(operand, torch.Tensor) and forward_ad.unpack_dual(operand).tangent is not None:
            raise NotImplementedError(
                f"lsc_kernels.{op} has no forward-mode derivative; differentiate backwards"
            )


def _serving(op: str, device_type: str, choice: str) -> str | None:
    return _decide(op, device_type, choice)


# torch.compile takes the answer and does not trace how it is found, which asks the driver and imports triton.
_serving._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _decide(op: str, device_type: str, choice: str) -> str | None:
    """The backend that serves an op on a device; None where that is eager, in place of kernels that are not there.

    A name that was asked for and does not serve the device is an error.
    """
    kernels = [backend for backend in PREFERENCE.get(device_type, ()) if backend != "eager"]
    for backend in kernels if choice == "auto" else [choice]:
        reason = _reason(backend, device_type)
        if reason is None:
            served = native.ops(device_type) if backend == "native" else _modules(backend)
            return backend if op in served else None
        if choice != "auto":
            raise RuntimeError(
                f"backend {choice!r} does not serve {device_type} tensors: {reason}. "
                "lk.set_backend('auto') lets the op choose."
            )
    return None


_warned: set[tuple[str, str]] = set()


def _warn_fallback(op: str, device_type: str) -> None:
    if (op, device_type) in _warned:
        return
    _warned.add((op, device_type))
    reasons = [
        f"{backend}: {_reason(backend, device_type) or 'has no kernel for this op'}"
        for backend in PREFERENCE.get(device_type, ("native", "triton"))
        if backend != "eager"
    ]
    warnings.warn(
        f"lsc_kernels.{op}: no compiled kernel for {device_type} tensors ({'; '.join(reasons)}); "
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
