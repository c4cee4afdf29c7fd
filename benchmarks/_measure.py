"""How one operation is compared: correct first, then all ways of computing it timed in turn.

A *way* is "eager" (the textbook in PyTorch, as a trainer writes it), "torch.compile" (the same, compiled)
or "native" (this library). In each round every way runs once, so that a busy moment of the machine meets
them all; the read floor, ``x.sum()`` over the same bytes, runs in the same rounds. Medians are kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

EAGER, COMPILED, NATIVE, FLOOR = "eager", "torch.compile", "native", "read floor"

Outputs = dict[str, Tensor]
Function = Callable[..., Outputs]


@dataclass
class Way:
    """One way: median and fastest time, error against fp64, and the memory it took beyond its inputs."""

    median_ms: float
    min_ms: float
    error: dict[str, float] = field(default_factory=dict)
    extra_mb: float | None = None


@dataclass
class Record:
    """One comparison, as it is written to the results file."""

    op: str
    case: str
    step: str
    dtype: str
    shape: dict[str, int]
    rounds: int
    ways: dict[str, Way]
    floor_ms: float | None
    read_gb: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def errors(got: Outputs, truth: Outputs) -> dict[str, float]:
    """The worst error of each output over the mean size of the truth; of a gradient, over the largest."""
    result = {}
    for name, true in truth.items():
        finite = true.isfinite() & (true.abs() < torch.finfo(torch.float32).max)
        sizes = torch.where(finite, true.abs(), 0.0)
        scale = (sizes.max() if name == "gradient" else sizes.mean()).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        difference = torch.where(finite, got[name].double() - true, 0.0).abs()
        result[name] = (difference.max() / scale).item() if true.numel() else 0.0
    return result


def forward(function: Function, inputs: Sequence[Any]) -> Callable[[], Outputs]:
    def step() -> Outputs:
        with torch.no_grad():
            return function(*inputs)

    return step


def forward_backward(function: Function, inputs: Sequence[Any], leaf: int) -> Callable[[], Outputs]:
    """The step of a trainer: the outputs summed, and the gradient of one input."""
    inputs = list(inputs)
    inputs[leaf] = inputs[leaf].detach().requires_grad_()

    def step() -> Outputs:
        outputs = function(*inputs)
        loss = sum((output.sum() for output in outputs.values()), torch.zeros(()))
        (gradient,) = torch.autograd.grad(loss, inputs[leaf])
        return {name: output.detach() for name, output in outputs.items()} | {"gradient": gradient}

    return step


def read_floor(tensors: Sequence[Tensor]) -> Callable[[], object]:
    """Sum the bytes of the tensors, as fp32 whatever they hold: the fastest they can be read."""
    views = [tensor.detach().reshape(-1).view(torch.float32) for tensor in tensors]
    return lambda: [view.sum() for view in views]


def once(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - started)


class Alternating:
    """Times of several steps, run in turn: ``others``, then the one that pytest-benchmark times itself."""

    def __init__(self, steps: dict[str, Callable[[], object]], timed_elsewhere: str) -> None:
        self.steps = steps
        self.timed_elsewhere = timed_elsewhere
        self.times: dict[str, list[float]] = {name: [] for name in steps}

    def others(self) -> None:
        for name, step in self.steps.items():
            if name != self.timed_elsewhere:
                self.times[name].append(once(step))

    def timed(self) -> None:
        self.times[self.timed_elsewhere].append(once(self.steps[self.timed_elsewhere]))

    def median(self, name: str) -> float:
        return statistics.median(self.times[name])

    def fastest(self, name: str) -> float:
        return min(self.times[name])


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Memory allocated inside goes back to the system when it is freed.

    Else glibc keeps the gigabytes of an fp64 truth, freed, and serves tensors of hundreds of megabytes from pages that
    are already there, for whoever is timed afterwards. Outside, it does what it does by default once a program has
    worked for a while: what is larger than 32 MB comes fresh from the system each time.
    """
    mmap_threshold = -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(mmap_threshold, 64 << 10)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 << 20)


def rounds_for(steps: dict[str, Callable[[], object]], seconds: float) -> int:
    """As many rounds as fit, between 5 and 50; also warms everything up."""
    for step in steps.values():
        step()
    one_round = sum(once(step) for step in steps.values()) / 1e3
    return int(min(50, max(5, seconds / one_round)))


def extra_memory(step: Callable[[], object]) -> float:
    """Peak MB that torch's allocator hands out during ``step``, inputs not counted."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def commit() -> str:
    """The commit of this checkout, and whether its code differs from it; LSC_COMMIT where there is no git."""

    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        try:
            done = subprocess.run(["git", *arguments], cwd=where, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    changed = (
        " with changes"
        if git("status", "--porcelain", "--untracked-files=no", "--", "../csrc", "../lsc_kernels")
        else ""
    )
    return (git("rev-parse", "--short", "HEAD") or os.environ.get("LSC_COMMIT", "unknown")) + changed
