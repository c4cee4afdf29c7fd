"""What every op is put through around its values: compilation, launches, and the memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from lsc_kernels import native

NO_LAUNCH = {
    "aten.empty",
    "aten.new_empty",
    "aten.expand",
    "aten.view",
    "aten.unsqueeze",
    "aten.detach",
    "aten.alias",
}


@contextmanager
def on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class TorchLaunches(TorchDispatchMode):
    """The kernels that a GPU would be given by PyTorch itself, beside those of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if name not in NO_LAUNCH and not name.startswith("lsc_kernels"):
            self.torch.append(name)
        return func(*args, **(kwargs or {}))


needs_native = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))


def compile_once(
    function: Callable[..., Sequence[Tensor]], calls: Iterable[tuple[Tensor, ...]], backend: str = "aot_eager"
) -> None:
    """Compiled whole, ``function`` gives the same values and gradients; a new length compiles nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    graphs = None
    for tensors in calls:
        plain, traced = ([_leaf(tensor) for tensor in tensors] for _ in range(2))
        expected, got = function(*plain), compiled(*traced)
        for a, b in zip(expected, got, strict=True):
            assert a.dtype is b.dtype and a.requires_grad == b.requires_grad
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-7, equal_nan=True)
        if any(output.requires_grad for output in got):
            for outputs in (expected, got):
                torch.autograd.backward([output.sum() for output in outputs])
            for a, b in zip(plain, traced, strict=True):
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None and b.grad is not None:
                    assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)
        graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, (
            f"compiled again for {[list(tensor.shape) for tensor in tensors]}"
        )
    assert graphs, "nothing was compiled"
    torch._dynamo.reset()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def peak_memory(setup: str, statement: str) -> int:
    """Bytes of memory that ``statement`` needs at its peak beyond what ``setup`` left, in its own process."""
    program = f"""
import re
import torch
import lsc_kernels as lk

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

torch.set_num_threads(2)
{textwrap.dedent(setup)}
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{textwrap.dedent(statement)}
print(status("VmHWM") - before)
"""
    # every block of its own mapping: what setup freed does not hide what the statement takes
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    return int(result.stdout)
