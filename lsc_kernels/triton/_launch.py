"""How kernels are started, and how tensors are handed to them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.triton import interpreted

library = torch.library.Library("lsc_kernels_triton", "DEF")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as ``torch.ops.lsc_kernels_triton.<name>``, so that torch.compile takes it as a whole."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema[: schema.index("(")]
        library.define(schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lsc_kernels_triton::{name}", fake, lib=library)
        return function

    return register


def block(elements: int) -> int:
    """So many elements a program, where no sum depends on it; more in the interpreter, which pays for programs."""
    return 32 * elements if interpreted() else elements


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **meta: Any) -> None:
    """Start ``grid`` programs on the current stream of ``device``.

    Products and sums are never contracted: the exact differences would not survive it.
    """
    if 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, enable_fp_fusion=False, **meta)
    else:
        kernel[grid](*arguments, enable_fp_fusion=False, **meta)


def kept(make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a tensor that is there for good.

    It is made in a thread of its own: a memory pool that is in use, such as that of the graphs which torch.compile
    records, takes what its thread allocates, and counts on getting it back.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make).result()


_counters: dict[torch.cuda.Stream | None, Tensor] = {}


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """``count`` counters that are 0, for a kernel that counts its programs and leaves them at 0.

    They are the current stream's, whose kernels follow one another: nothing has to set them to 0 again. (A kernel that
    is aborted takes the whole CUDA context with it.) A graph may run beside other work of the stream that it was
    captured from, so while one is captured they are new, and the graph sets them to 0 itself.
    """

    def new() -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=device)

    def new_on_stream() -> Tensor:
        with torch.cuda.stream(stream):
            return new()

    stream = None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return new()
    counters = _counters.get(stream)
    if counters is None or counters.numel() < count:
        counters = _counters[stream] = kept(new_on_stream)
    return counters


def per_row(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor with one number per row, and the stride between them: 0 for one number that was expanded."""
    if tensor is None:
        return None, 0
    if not any(tensor.stride()) and tensor.numel():
        return tensor, 0
    return tensor.contiguous(), 1


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
