"""Stands in for Triton's driver where no GPU is: a launch is Triton's own up to there, and starts nothing.

What Triton does at a launch on a GPU is done: the arguments decide what is compiled, for a target that is named, and
the globals that a kernel has read are compared with those of now (a NaN is never the same). For processes that do not
interpret.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Compiled:
    """Stands in for what Triton compiles, where nothing is compiled."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: Any) -> None:
        pass

    def run(self, *arguments: Any) -> None:
        pass


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class Driver:
    launcher_cls = _Launcher

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 48 * 1024}  # what every GPU has without being asked for more

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """module, function, registers, spills, threads"""
        return 0, 0, 0, 0, 1024


def use(target: str) -> None:
    triton.runtime.driver.set_active(Driver(target))
    if TARGETS[target].backend == "hip":
        torch.version.hip = "7"  # what the wrappers ask
