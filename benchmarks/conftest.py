"""Options of the benchmarks, the comparison they all make, and the file their results go to."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from _measure import (
    COMPILED,
    EAGER,
    FLOOR,
    NATIVE,
    Alternating,
    Function,
    Outputs,
    Record,
    Way,
    commit,
    errors,
    extra_memory,
    forward,
    forward_backward,
    nothing_left_behind,
    read_floor,
    rounds_for,
)
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels import native

RESULTS = Path(__file__).parent / "results"
RECORDS: list[Record] = []
OVERHEADS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lsc_kernels benchmarks")
    group.addoption(
        "--bench-size", default=None, help="N,V of the token ops, or 'full' (256,128256) or 'small'"
    )
    group.addoption("--bench-seconds", type=float, default=8.0, help="time for the rounds of one comparison")
    group.addoption(
        "--bench-threads", type=int, default=None, help="torch.set_num_threads; default: torch's own"
    )
    group.addoption("--bench-name", default=None, help="results go to benchmarks/results/NAME.json")


def smoke(config: pytest.Config) -> bool:
    """Each benchmark once, small, nothing written: ``--benchmark-disable``, as CI runs it."""
    return bool(config.getoption("benchmark_disable"))


def pytest_configure(config: pytest.Config) -> None:
    if threads := config.getoption("--bench-threads"):
        torch.set_num_threads(threads)


class Size:
    """Shapes: the token ops' N and V, and the reward side's sequences and lengths."""

    def __init__(self, text: str) -> None:
        named = {"full": (256, 128256), "small": (8, 4003)}
        try:
            self.rows, self.vocabulary = named.get(text) or (int(part) for part in text.split(","))
        except ValueError:
            raise pytest.UsageError(f"--bench-size must be N,V or 'full' or 'small'; got {text!r}") from None
        self.sequences, self.length, self.hidden = (1024, 8192, 4096) if text == "full" else (16, 128, 64)


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Size:
    return Size(pytestconfig.getoption("--bench-size") or ("small" if smoke(pytestconfig) else "full"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


Compare = Callable[..., None]


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Compare:
    """Check, then time, the ways of computing one operation."""
    if native.UNAVAILABLE:
        pytest.skip(f"nothing to compare: {native.UNAVAILABLE}")
    quick = smoke(request.config)

    def run(
        op: str,
        *,
        ours: Function,
        textbook: Function,
        truth: Callable[..., Outputs],
        inputs: Sequence[Any],
        reads: Sequence[Tensor],
        shape: dict[str, int],
        dtype: torch.dtype,
        case: str = "",
        leaf: int | None = None,
        check: Callable[[Outputs], None] | None = None,
        compile: bool = True,
    ) -> None:
        """``leaf`` is the input to differentiate, None: forward only; ``reads``, the bytes of the floor (none: no
        floor); ``compile``, whether the textbook can be compiled."""
        lk.set_backend("native")
        ways_of = {EAGER: textbook, NATIVE: ours}
        if compile:
            torch._dynamo.reset()
            # tracing alone is enough to see that the comparison still compiles
            compiled = torch.compile(textbook, backend="eager" if quick else "inductor", dynamic=False)
            ways_of = {EAGER: textbook, COMPILED: compiled, NATIVE: ours}
        make = forward if leaf is None else lambda function, given: forward_backward(function, given, leaf)
        steps = {name: make(function, inputs) for name, function in ways_of.items()}
        with nothing_left_behind():
            true = make(truth, inputs)()
            found = {name: errors(step(), true) for name, step in steps.items()}
            del true
        if check is not None:
            check(steps[NATIVE]())
        for output, error in found[NATIVE].items():
            assert error < 1e-4 or error <= 2 * found[EAGER][output], f"{op} {output}: error {error:.1e}"

        timed: dict[str, Callable[[], object]] = {**steps, **({FLOOR: read_floor(reads)} if reads else {})}
        rounds = 1 if quick else rounds_for(timed, request.config.getoption("--bench-seconds"))
        times = Alternating(timed, timed_elsewhere=NATIVE)
        benchmark.group = f"{op} {case} {dtype}"
        benchmark.pedantic(times.timed, setup=times.others, rounds=rounds)
        ways = {
            name: Way(times.median(name), times.fastest(name), found[name], extra_memory(step))
            for name, step in steps.items()
        }
        read = sum(tensor.numel() * tensor.element_size() for tensor in reads)
        step_name = "forward" if leaf is None else "forward + backward"
        record = Record(
            *(op, case, step_name, str(dtype)[6:], shape, rounds, ways),
            floor_ms=times.median(FLOOR) if reads else None,
            read_gb=read / 1e9,
        )
        benchmark.extra_info.update(record.as_json())
        RECORDS.append(record)
        save(request.config)
        lk.set_backend("auto")

    return run


@pytest.fixture
def overhead(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Microseconds of one call on tiny tensors: what a call costs before it computes anything."""
    if native.UNAVAILABLE:
        pytest.skip(f"nothing to time: {native.UNAVAILABLE}")

    def run(op: str, step_name: str, ours: Callable[[], object], textbook: Callable[[], object]) -> None:
        lk.set_backend("native")
        calls = 1 if smoke(request.config) else 500

        def many(call: Callable[[], object]) -> Callable[[], None]:
            def repeat() -> None:
                for _ in range(calls):
                    call()

            return repeat

        times = Alternating({NATIVE: many(ours), EAGER: many(textbook)}, timed_elsewhere=NATIVE)
        benchmark.pedantic(times.timed, setup=times.others, rounds=1 if calls == 1 else 30, warmup_rounds=1)
        row = {
            "op": op,
            "step": step_name,
            **{name: 1e3 * times.median(name) / calls for name in (NATIVE, EAGER)},
        }
        benchmark.extra_info.update(row)
        OVERHEADS.append(row)
        save(request.config)
        lk.set_backend("auto")

    return run


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def instruction_set() -> str:
    from lsc_kernels import _C

    return str(_C.isa())


def save(config: pytest.Config) -> None:
    """What has been measured so far: a run that is cut short leaves its rows."""
    if smoke(config):
        return
    report = {
        "machine": platform.platform(terse=True),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lsc_kernels": lk.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "comparisons": [record.as_json() for record in RECORDS],
        "overheads": OVERHEADS,
    }
    RESULTS.mkdir(exist_ok=True)
    results_path(config).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def results_path(config: pytest.Config) -> Path:
    return RESULTS / f"{config.getoption('--bench-name') or f'cpu-{instruction_set()}'}.json"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (RECORDS or OVERHEADS) and not smoke(session.config):
        session.config.get_terminal_writer().line(f"\nresults: {results_path(session.config)}")
