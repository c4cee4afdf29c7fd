"""The CUDA kernels on this machine's processor: their own source, compiled against the threads of tests/emulation.

The library registers its ops for CPU tensors under a name of its own. While :func:`serving` is entered they take the
place of the native CPU kernels, so that everything above them, wrappers, autograd and tests, is what CUDA tensors meet.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lsc_kernels import native

ROOT = Path(__file__).parents[1]
NAMESPACE = "lsc_kernels_emulated"


def build() -> Path:
    """Compile what has changed into ``build/emulation`` and return the library."""
    from filelock import FileLock

    folder = ROOT / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    torch_folder = Path(torch.__file__).parent
    configure = ["cmake", "-G", "Ninja", "-S", str(ROOT / "tests/emulation"), "-B", str(folder)]
    with FileLock(folder / "lock"):
        for command in (
            [*configure, f"-DLSC_TORCH={torch_folder}"],
            ["cmake", "--build", str(folder), "-j2"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(
                    f"{' '.join(command)} failed with\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
                )
    return folder / "liblsc_kernels_emulated.so"


@functools.cache
def library() -> ctypes.CDLL:
    """The built library, its ops registered."""
    path = build()
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lsc_kernels::")]
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for op in ops:
        schema = str(torch._C._get_schema(op, ""))
        definitions.define(schema.removeprefix("lsc_kernels::"))
    loaded = ctypes.CDLL(str(path))
    loaded.lsc_emulation_launches.restype = ctypes.c_int64
    # a library's ops live as long as the object
    loaded.definitions = definitions  # type: ignore[attr-defined]
    return loaded


def ops() -> list[str]:
    """The ops that have a CUDA kernel."""
    library()
    names = (
        name.removeprefix(f"{NAMESPACE}::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(NAMESPACE)
    )
    return [
        name
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
    ]


@contextmanager
def serving() -> Iterator[ctypes.CDLL]:
    """CPU tensors meet the emulated CUDA kernels, through the native wrappers."""
    if native.UNAVAILABLE:
        raise RuntimeError(native.UNAVAILABLE)
    loaded = library()
    overrides = torch.library.Library("lsc_kernels", "IMPL")
    for name in ops():
        overrides.impl(name, getattr(getattr(torch.ops, NAMESPACE), name), "CPU", allow_override=True)
    try:
        yield loaded
    finally:
        overrides._destroy()


@contextmanager
def schedule(seed: int = 0, multiprocessors: int = 4) -> Iterator[None]:
    """The order in which emulated threads and blocks take turns (0: ascending), and how many blocks are wanted."""
    loaded = library()
    loaded.lsc_emulation_set_seed(seed)
    loaded.lsc_emulation_set_multiprocessors(multiprocessors)
    try:
        yield
    finally:
        loaded.lsc_emulation_set_seed(0)
        loaded.lsc_emulation_set_multiprocessors(4)


def launches() -> int:
    """Kernels launched so far."""
    return int(library().lsc_emulation_launches())
