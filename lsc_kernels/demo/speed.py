"""The speed table: token_kl against the textbook formula in eager PyTorch and under torch.compile.

Policy and reference nearly agree, as they do at the start of every run: there the textbook formula loses
its digits, so an error stands beside every time. It is the largest error of a row against fp64, relative to
the mean KL.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

import lsc_kernels as lk

KINDS = ("k3", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EAGER, COMPILED, OURS = "eager PyTorch", "torch.compile", "lsc_kernels"
DISTANCE = 1e-3  # standard deviation of the difference between the two models' logits

KL: TypeAlias = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # policy logits, ref logits, actions -> KL of each row


@dataclass(frozen=True)
class Cell:
    """One way to compute one KL: seconds, error and extra memory, or why there is no number."""

    device: str
    kind: str
    dtype: str
    way: str
    mean_kl: float
    forward: float = float("nan")
    forward_backward: float = float("nan")
    error: float = float("nan")
    extra_bytes: int | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Shape:
    """Rows, vocabulary and how often each thing is timed."""

    rows: int
    vocab: int
    repeats: int
    compiled: bool


FULL, QUICK = Shape(64, 128256, 7, True), Shape(16, 16032, 3, False)


def textbook_k3(policy_logits: Tensor, ref_logits: Tensor, actions: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log pi(a) - log pi_ref(a), as trainers write it."""
    logprobs = torch.log_softmax(policy_logits.float(), -1).gather(-1, actions[:, None])[:, 0]
    ref_logprobs = torch.log_softmax(ref_logits.float(), -1).gather(-1, actions[:, None])[:, 0]
    d = logprobs - ref_logprobs
    return torch.exp(-d) - 1 + d


def textbook_full(policy_logits: Tensor, ref_logits: Tensor, actions: Tensor) -> Tensor:
    """sum p (log p - log q), as trainers write it."""
    logprobs = torch.log_softmax(policy_logits.float(), -1)
    ref_logprobs = torch.log_softmax(ref_logits.float(), -1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)


TEXTBOOK: dict[str, KL] = {"k3": textbook_k3, "full": textbook_full}


def measure(shape: Shape, seed: int, say: Callable[[str], None] = lambda text: None) -> list[Cell]:
    """Time every kind, dtype and way on every device of this machine."""
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    return [
        cell
        for device in devices
        for kind in KINDS
        for dtype in DTYPES
        for cell in _compare(shape, device, kind, dtype, seed, say)
    ]


def truth(kind: str, policy_logits: Tensor, ref_logits: Tensor, actions: Tensor) -> Tensor:
    """The same KL in fp64 from the same, already rounded, logits; k3 by expm1, which cancels nothing."""
    logprobs = torch.log_softmax(policy_logits.double(), -1)
    log_ratio = logprobs - torch.log_softmax(ref_logits.double(), -1)
    if kind == "full":
        return (logprobs.exp() * log_ratio).sum(-1)
    d = log_ratio.gather(-1, actions[:, None])[:, 0]
    return torch.expm1(-d) + d


def _compare(
    shape: Shape, device: str, kind: str, dtype: str, seed: int, say: Callable[[str], None]
) -> list[Cell]:
    say(f"timing {kind} KL in {dtype} on {device}")
    generator = torch.Generator().manual_seed(seed)
    policy = 3 * torch.randn(shape.rows, shape.vocab, generator=generator)
    ref = policy + DISTANCE * torch.randn(shape.rows, shape.vocab, generator=generator)
    actions = torch.randint(shape.vocab, (shape.rows,), generator=generator).to(device)
    logits = (policy.to(device, DTYPES[dtype]), ref.to(device, DTYPES[dtype]))
    expected = truth(kind, *logits, actions)
    mean_kl = expected.mean().item()

    def ours(x: Tensor, y: Tensor, a: Tensor) -> Tensor:
        return lk.token_kl(x, y, a, kl=kind).kl

    cells: dict[str, Cell] = {}
    ready: dict[str, list[Callable[[], Tensor]]] = {}
    for way, compute in _ways(kind, ours, shape.compiled):
        cell = Cell(device, kind, dtype, way, mean_kl)
        steps = _steps(compute, *logits, actions)
        try:
            result = steps[0]()
            steps[1]()
        except Exception as problem:  # torch.compile fails in many ways; whichever it is belongs in the table
            if way != COMPILED:
                raise
            cells[way] = replace(cell, problem=_why(problem))
            continue
        error = ((result.double() - expected).abs().max() / expected.mean()).item()
        cells[way] = replace(cell, error=error, extra_bytes=_extra_memory(steps[0], device))
        ready[way] = steps
    times = _alternate(ready, shape.repeats, device)
    for way, (forward, forward_backward) in times.items():
        cells[way] = replace(cells[way], forward=forward, forward_backward=forward_backward)
    return list(cells.values())


def _ways(kind: str, ours: KL, compiled: bool) -> list[tuple[str, KL]]:
    ways = [(EAGER, TEXTBOOK[kind]), (OURS, ours)]
    # Fixed shapes: what torch.compile does best.
    return ways + [(COMPILED, torch.compile(TEXTBOOK[kind], dynamic=False))] if compiled else ways


def _steps(compute: KL, policy: Tensor, ref: Tensor, actions: Tensor) -> list[Callable[[], Tensor]]:
    """The forward pass alone, and forward with backward to the policy's logits."""
    leaf = policy.detach().requires_grad_()

    def forward() -> Tensor:
        with torch.no_grad():
            return compute(policy, ref, actions)

    def forward_backward() -> Tensor:
        return torch.autograd.grad(compute(leaf, ref, actions).mean(), leaf)[0]

    return [forward, forward_backward]


def _alternate(
    ready: dict[str, list[Callable[[], Tensor]]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Median seconds of each step, all ways in turn, so that a busy moment of the machine meets them all."""
    times: dict[str, list[list[float]]] = {way: [[] for _ in steps] for way, steps in ready.items()}
    for _ in range(repeats):
        for way, steps in ready.items():
            for at, step in enumerate(steps):
                _wait(device)
                started = time.perf_counter()
                step()
                _wait(device)
                times[way][at].append(time.perf_counter() - started)
    return {way: [statistics.median(one) for one in each] for way, each in times.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _extra_memory(step: Callable[[], Tensor], device: str) -> int:
    """Peak bytes that one forward pass holds beyond its inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator keeps no peak; the profiler reports each allocation and release in order of time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _why(problem: Exception) -> str:
    text = str(problem)
    if "compiler" in text.lower() and ("not found" in text.lower() or "InvalidCxxCompiler" in text):
        return "no C++ compiler"
    return type(problem).__name__
