"""The token ops, shaped_rewards and advantages on a GPU, beside eager, torch.compile and installed peers.

    python -m benchmarks.gpu [--seconds 240] [--name NAME]

writes gpu-NAME.json into benchmarks/results/ and prints a short table. Every way of a row is checked against fp64 on
its first rows, then timed with CUDA events, all ways in turn, a buffer larger than the second cache written before each
run. ``host_ahead`` is the share of the runs that were wholly launched before that buffer was written: in others the
device may have waited for the host. The bytes that the work must move, over that time, are given as a share of the copy
bandwidth measured in the same run. Rows come in order of weight; those that the seconds do not reach are listed as left
out. The file is written anew after each row.

A kernel that reads where it must not ends the process's CUDA context, and with it every later row. The exit status is
then 75, and ``--resume`` goes on in a new process behind that row, without that way of that op.

``--quick`` runs a few small rows once on whatever device there is, and writes nothing. ``--only-compile`` calls what
torch.compile makes once, so that its cache on disk has it when a measurement begins.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks"), str(ROOT)]

import _logits  # noqa: E402
import _truth  # noqa: E402
import bench_advantages as advantages  # noqa: E402
import bench_shaped_rewards as shaped  # noqa: E402
from _measure import COMPILED, EAGER, NATIVE, Function, Outputs, commit, errors, forward, forward_backward  # noqa: E402

import lsc_kernels as lk  # noqa: E402

TRITON, TRL, LIGER = "triton", "trl", "liger"
OURS = (TRITON, NATIVE)
VOCABULARIES, ROWS = (128256, 151936, 32000), (8192, 1024, 64)
FLUSHED_BYTES = 2 << 30  # takes half a millisecond, in which the host is ahead with what is timed
CHECKED_ROWS = 64
SECONDS_A_ROW = 0.7
COUNTED_BELOW_MS = 100  # a loop of 8192 steps starts more kernels than the profiler reads in seconds
CONTEXT_LOST = 75


@dataclass(frozen=True)
class Problem:
    """One row of the table: what is computed, on what, and the bytes that it must move."""

    op: str
    case: str
    dtype: torch.dtype
    shape: dict[str, int]
    inputs: Callable[[], list[Any]]
    checked: Callable[[list[Any]], list[Any]]  # the part of the inputs that is also computed in fp64
    ways: dict[str, Function]
    truth: Function
    moved_bytes: int
    leaf: int | None = None  # the input to differentiate; None: forward only

    @property
    def step(self) -> str:
        return "forward" if self.leaf is None else "forward + backward"


@dataclass
class Timing:
    """One way of a problem."""

    median_ms: float
    min_ms: float
    share_of_copy: float
    host_ahead: float
    error: dict[str, float]
    extra_mb: float | None
    launches: int | None


@dataclass
class Row:
    """One problem's timings, as they are written to the results file."""

    op: str
    case: str
    step: str
    dtype: str
    shape: dict[str, int]
    moved_gb: float
    ways: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    lost: str | None = None  # the way that ended the CUDA context


def choose(way: str) -> None:
    """The backend of this library that a way is named after. It takes the host longer than some kernels run: it is for
    outside the clock."""
    lk.set_backend(way if way in OURS else "auto")


@dataclass(frozen=True)
class Run:
    """One timed run."""

    ms: float
    host_ahead: bool  # all of it was launched before the device began with it


class Clock:
    """Times ways on one device, its caches flushed before."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(FLUSHED_BYTES // 4 if self.cuda else 1, dtype=torch.int32, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def in_turn(self, steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Run]]:
        runs: dict[str, list[Run]] = {way: [] for way in steps}
        for _, (way, step) in itertools.product(range(rounds), steps.items()):
            choose(way)
            self.flushed.zero_()
            runs[way].append(self.once(step))
        return runs

    def once(self, step: Callable[[], object]) -> Run:
        if not self.cuda:
            started = time.perf_counter()
            step()
            return Run(1e3 * (time.perf_counter() - started), host_ahead=True)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        host_ahead = not start.query()
        end.synchronize()
        return Run(start.elapsed_time(end), host_ahead)


def copy_bandwidth(clock: Clock, device: torch.device) -> float:
    """Bytes read and written per second by a copy of 4 GB (64 MB on a CPU)."""
    source = torch.empty((4 << 30) if clock.cuda else (64 << 20), dtype=torch.uint8, device=device).fill_(7)
    target = torch.empty_like(source)
    runs = clock.in_turn({"copy": lambda: target.copy_(source)}, 10)["copy"][2:]
    return 2 * source.numel() / (1e-3 * statistics.median(run.ms for run in runs))


def extra_memory(step: Callable[[], object]) -> float | None:
    """Peak MB beyond the inputs; None where torch keeps no peak."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def launches(step: Callable[[], object]) -> int | None:
    """Kernels that one run starts; None where the profiler sees none, as on machines that forbid it."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]) or None


def ours(device: torch.device, function: Function) -> dict[str, Function]:
    """This library's own kernels on the device; ``choose`` says which of them a call means."""
    served = lk.backends()[device.type]
    return {name: function for name in OURS if served[name] == "available"}


@functools.cache
def compiled(function: Function) -> Function:
    """Compiled once for all shapes, as a trainer whose lengths change needs it."""
    # for each dtype, with and without a gradient; beyond the limit it would silently be eager
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


@functools.cache
def peers() -> tuple[dict[str, Function], dict[str, str]]:
    """Log-probability kernels of other packages, and why the others are left out."""
    found: dict[str, Function] = {}
    missing: dict[str, str] = {}
    try:
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        def trl(logits: Tensor, actions: Tensor) -> Outputs:
            logprobs, entropy = selective_log_softmax_and_entropy(logits[None], actions[None])
            return {"logprobs": logprobs[0], "entropy": entropy[0]}

        found[TRL] = trl
    except Exception as problem:  # a package made for other versions can fail in any way while it is imported
        missing[TRL] = f"{type(problem).__name__}: {problem}"
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        def liger(logits: Tensor, actions: Tensor) -> Outputs:
            # one row less: it takes the logits of a sequence's last position for those of the token after it
            return {"logprobs": fused_selective_log_softmax(logits[None], actions[None, :-1], 1.0)[0]}

        found[LIGER] = liger
    except Exception as problem:
        missing[LIGER] = f"{type(problem).__name__}: {problem}"
    return found, missing


def first_rows(inputs: list[Any]) -> list[Any]:
    return [tensor[:CHECKED_ROWS] for tensor in inputs]


def token_problems(device: torch.device, rows: int, vocabulary: int, dtype: torch.dtype) -> Iterator[Problem]:
    """All token ops on logits [N, V], forward and forward + backward."""
    shape = {"N": rows, "V": vocabulary}
    logits_bytes = rows * vocabulary * dtype.itemsize

    @functools.cache
    def logits(reference: str = "near") -> tuple[Tensor, Tensor, Tensor]:
        return _logits.logits(Generator(device).manual_seed(20), rows, vocabulary, dtype, reference)

    def entropy_too(policy: Tensor, actions: Tensor) -> Outputs:
        return lk.token_logprobs(policy, actions)._asdict()

    def true_logprobs(policy: Tensor, actions: Tensor) -> Outputs:
        return _truth.token_logprobs(policy.double(), actions)._asdict()

    found, _ = peers()
    for leaf in (None, 0):
        ways = {EAGER: _logits.textbook_logprobs, COMPILED: compiled(_logits.textbook_logprobs)}
        ways |= {name: way for name, way in found.items() if leaf is None or name == TRL}
        yield Problem(
            *("token_logprobs", "with entropy", dtype, shape),
            inputs=lambda: [logits()[0], logits()[2]],
            checked=first_rows,
            ways={**ways, **ours(device, entropy_too)},
            truth=true_logprobs,
            moved_bytes=logits_bytes * (1 if leaf is None else 3),
            leaf=leaf,
        )
    cases = [("near", *case) for case in itertools.product(("full", "k3"), (None, 0))]
    for reference, kl, leaf in (*cases, ("independent", "full", None)):
        backward_bytes = {"full": 3, "k3": 2}[kl]
        yield Problem(
            *("token_kl", f"{kl}, {reference} reference", dtype, shape),
            inputs=functools.partial(lambda named: list(logits(named)), reference),
            checked=first_rows,
            ways={
                EAGER: _logits.TEXTBOOK[kl],
                COMPILED: compiled(_logits.TEXTBOOK[kl]),
                **ours(device, functools.partial(_logits.token_kl, kl=kl)),
            },
            truth=functools.partial(_logits.true_token_kl, kl=kl),
            moved_bytes=logits_bytes * (2 if leaf is None else 2 + backward_bytes),
            leaf=leaf,
        )
    batch = 8
    for leaf in (None, 3):

        def inputs() -> list[Any]:
            policy, ref, actions = logits()
            side = shaped.reward_side(Generator(device).manual_seed(21), batch, rows // batch, dtype)
            in_sequences = [
                tensor.view(batch, rows // batch, *tensor.shape[1:]) for tensor in (policy, ref, actions)
            ]
            return [*side[:3], *in_sequences, torch.ones_like(side[3])]

        yield Problem(
            *("shaped_rewards", "from logits, k3", dtype, {"B": batch, "T": rows // batch, "V": vocabulary}),
            inputs=inputs,
            checked=lambda given: [given[0][:1], *given[1:3], *(tensor[:1] for tensor in given[3:])],
            ways={
                EAGER: shaped.textbook,
                COMPILED: compiled(shaped.textbook),
                **ours(device, shaped.ours),
            },
            truth=shaped.truth,
            moved_bytes=logits_bytes * (2 if leaf is None else 4),
            leaf=leaf,
        )


def logprob_problems(device: torch.device, batch: int, length: int) -> Iterator[Problem]:
    """shaped_rewards from log-probabilities that are already there, [B, T] in fp32."""
    generator = Generator(device).manual_seed(22)
    logprobs = -5 * torch.rand(batch, length, generator=generator, device=device)
    ref_logprobs = logprobs + 0.1 * torch.randn(batch, length, generator=generator, device=device)
    hidden, weight, reference, mask = shaped.reward_side(generator, batch, length, torch.float32)
    textbook, truth, function = shaped.from_logprobs(reference, mask)
    for leaf in (None, 1):
        yield Problem(
            *("shaped_rewards", "from log-probabilities, k3", torch.float32, {"B": batch, "T": length}),
            inputs=lambda: [shaped.score(hidden, weight), logprobs, ref_logprobs],
            checked=list,
            ways={EAGER: textbook, COMPILED: compiled(textbook), **ours(device, function)},
            truth=truth,
            # two log-probabilities and the mask in, KL and rewards out; then their gradients in and two out
            moved_bytes=batch * length * ((4 * 4 + 1) + (0 if leaf is None else 6 * 4 + 1)),
            leaf=leaf,
        )


def advantage_problems(device: torch.device, batch: int, length: int) -> Iterator[Problem]:
    """What comes after the rewards, [B, T] in fp32, and a million samples in groups."""
    generator = Generator(device).manual_seed(23)
    rewards, values = torch.randn(2, batch, length, generator=generator, device=device)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator, device=device)
    mask = torch.arange(length, device=device) < lengths
    utility = torch.randn(batch * length // 64 * advantages.GROUP, generator=generator, device=device)
    # a loop of 8192 steps cannot be compiled as a whole
    steps = functools.partial(advantages.textbook_gae, step=compiled(advantages.gae_step))
    for op, ours_, textbook, in_compilation, inputs, bytes_each in (
        ("gae", advantages.gae, advantages.textbook_gae, steps, [rewards, values, mask], 17),
        ("discounted_returns", advantages.returns, advantages.textbook_returns, None, [rewards, mask], 9),
        ("masked_whiten", advantages.whitened, advantages.textbook_whitened, None, [rewards, mask], 14),
        ("group_advantages", advantages.grouped, advantages.textbook_grouped, None, [utility], 8),
    ):
        yield Problem(
            *(op, "as trainers call it", torch.float32, dict(zip("BT", inputs[0].shape, strict=False))),
            inputs=functools.partial(list, inputs),
            checked=first_rows if op == "gae" else list,
            ways={
                EAGER: textbook,
                COMPILED: in_compilation or compiled(textbook),
                **ours(device, ours_),
            },
            truth=advantages.in_fp64(textbook),
            moved_bytes=inputs[0].numel() * bytes_each,
        )


def problems(device: torch.device, quick: bool) -> Iterator[Problem]:
    """Every row of the table, those that matter most first."""
    if quick:
        yield from token_problems(device, 16, 1001, torch.bfloat16)
        yield from logprob_problems(device, 4, 33)
        yield from advantage_problems(device, 2, 50)
        return
    yield from logprob_problems(device, 1024, 2048)
    yield from advantage_problems(device, 1024, 8192)
    for vocabulary, rows, dtype in itertools.product(VOCABULARIES, ROWS, _logits.DTYPES):
        yield from token_problems(device, rows, vocabulary, dtype)
    # rows that do not begin on 16 bytes
    yield from token_problems(device, ROWS[1], VOCABULARIES[0] + 1, torch.bfloat16)


def named(problem: Problem) -> Row:
    return Row(
        *(problem.op, problem.case, problem.step, str(problem.dtype)[6:], problem.shape),
        moved_gb=problem.moved_bytes / 1e9,
    )


def explained(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"[:300]


def context_is_lost() -> bool:
    """Whether every further call to CUDA fails, as after an illegal access."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure(row: Row, problem: Problem, clock: Clock, bandwidth: float, deadline: float) -> None:
    """Check and time every way; a way that fails is left out with the reason."""
    inputs = problem.inputs()
    make = forward if problem.leaf is None else functools.partial(forward_backward, leaf=problem.leaf)
    steps: dict[str, Callable[[], Outputs]] = {}
    found: dict[str, dict[str, float]] = {}
    true = make(problem.truth, problem.checked(inputs))()
    for name, way in problem.ways.items():
        step = make(way, inputs)
        choose(name)
        try:
            got = step()
            found[name] = errors(
                {output: value[: len(true[output])] for output, value in got.items()},
                {output: value for output, value in true.items() if output in got},
            )
        except Exception as problem_of_way:  # out of memory, an unsupported GPU, a compiler that is not there
            row.left_out[name] = explained(problem_of_way)
            if context_is_lost():
                row.lost = name
                raise
            continue
        del got
        steps[name] = step
    one_round = sum(run.ms for runs in clock.in_turn(steps, 1).values() for run in runs)
    left = max(deadline - time.monotonic(), 0)
    rounds = int(min(30, max(3, 1e3 * min(left, SECONDS_A_ROW) / one_round)))
    for name, runs in clock.in_turn(steps, rounds).items():
        choose(name)
        seconds = 1e-3 * statistics.median(run.ms for run in runs)
        row.ways[name] = Timing(
            *(1e3 * seconds, min(run.ms for run in runs), problem.moved_bytes / seconds / bandwidth),
            host_ahead=statistics.mean(run.host_ahead for run in runs),
            error=found[name],
            extra_mb=extra_memory(steps[name]),
            launches=launches(steps[name]) if 1e3 * seconds < COUNTED_BELOW_MS else None,
        )


def compile_all(device: torch.device) -> None:
    """What torch.compile makes of the first row of each kind and dtype, which are the shapes it compiles at."""
    rows = itertools.chain(
        logprob_problems(device, 1024, 2048),
        *(token_problems(device, ROWS[0], VOCABULARIES[0], dtype) for dtype in _logits.DTYPES),
        advantage_problems(device, 1024, 8192),
    )
    for problem in rows:
        make = forward if problem.leaf is None else functools.partial(forward_backward, leaf=problem.leaf)
        started = time.monotonic()
        try:
            make(problem.ways[COMPILED], problem.inputs())()
            outcome = f"{time.monotonic() - started:.1f} s"
        except Exception as failure:
            outcome = explained(failure)
        print(f"{line(named(problem))}{outcome}", flush=True)


def report(
    rows: list[Row], device: torch.device, bandwidth: float, missing: dict[str, str]
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else platform.processor(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "machine": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "lsc_kernels": lk.__version__,
        "backends": lk.backends()[device.type],
        "peers_missing": missing,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "copy_gb_per_s": bandwidth / 1e9,
        "comparisons": [asdict(row) for row in rows],
    }


def version_of(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def line(row: Row) -> str:
    shape = " x ".join(map(str, row.shape.values()))
    ways = "  ".join(
        f"{name} {timing.median_ms:.3f} ms ({timing.share_of_copy:.0%}{', host late' * (timing.host_ahead < 0.5)})"
        for name, timing in row.ways.items()
    )
    return f"{row.op} {row.case} {row.dtype} {row.step} [{shape}]  {ways}" + "".join(
        f"  {name}: {why}" for name, why in row.left_out.items()
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all rows")
    parser.add_argument(
        "--name", help="results go to benchmarks/results/gpu-NAME.json; default: the GPU's name"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results", help="write them there instead"
    )
    parser.add_argument("--resume", action="store_true", help="go on behind the rows that the file has")
    parser.add_argument("--only-compile", action="store_true", help="fill torch.compile's cache, and no more")
    parser.add_argument("--quick", action="store_true", help="a few small rows, on a CPU if need be")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.quick:
        print("torch sees no CUDA device; --quick runs a few small rows without one", file=sys.stderr)
        return 2

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.only_compile:
        compile_all(device)
        return 0
    clock = Clock(device)
    bandwidth = copy_bandwidth(clock, device)
    print(f"copy: {bandwidth / 1e9:.0f} GB/s read + written", flush=True)
    deadline = time.monotonic() + options.seconds
    rows: list[Row] = []
    path: Path | None = None
    if not options.quick:
        name = options.name or torch.cuda.get_device_name(device).lower().replace("nvidia ", "").replace(
            " ", "-"
        )
        path = options.out / f"gpu-{name}.json"
        rows = earlier_rows(path) if options.resume else []
    lost = {(row.op, row.lost) for row in rows}
    failed = False
    for problem in itertools.islice(problems(device, options.quick), len(rows), None):
        row = named(problem)
        rows.append(row)
        without = [name for name in problem.ways if (problem.op, name) in lost]
        row.left_out = {name: "it has ended the CUDA context before" for name in without}
        for name in without:
            del problem.ways[name]
        if time.monotonic() > deadline:
            row.left_out |= {name: "no time left" for name in problem.ways}
        else:
            try:
                measure(row, problem, clock, bandwidth, deadline)
            except Exception as failure:  # the inputs or the truth: memory, or a device that is lost
                done = {*row.ways, *row.left_out}
                row.left_out |= {name: explained(failure) for name in problem.ways if name not in done}
                failed = True
        print(line(row), flush=True)
        lk.set_backend("auto")
        if path is not None:
            write(path, report(rows, device, bandwidth, peers()[1]))
        if failed and context_is_lost():
            return CONTEXT_LOST
    if path is not None:
        print(f"results: {path}")
    return int(failed)


def earlier_rows(path: Path) -> list[Row]:
    """Those of a run that has lost the device."""
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["comparisons"]]
    for row in rows:
        row.ways = {name: Timing(**timing) for name, timing in row.ways.items()}  # type: ignore[arg-type]
    return rows


def write(path: Path, results: dict[str, Any]) -> None:
    """As a whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
