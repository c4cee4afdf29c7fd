"""``lsc-kernels bench``: the speed table of ``token_kl`` on this machine, at a size of your choice.

Against eager PyTorch and torch.compile, forward alone and with backward, the error against fp64 beside each
time, and the time that reading the two logit tensors once takes at the least. The benchmarks of all ops are
in the repository: ``make bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

import lsc_kernels
from lsc_kernels import info
from lsc_kernels.demo import speed
from lsc_kernels.errors import UserError
from lsc_kernels.score.batching import out_of_memory

READ_BYTES = 256 * 2**20
BYTES = 32  # of each logit at the least: both models' in fp32, and three tensors of the fp64 truth
WAYS = {speed.OURS: 0, speed.COMPILED: 1, speed.EAGER: 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    for option, default, what in (
        ("rows", 256, "token positions"),
        ("vocab", 128256, "size of the vocabulary"),
        ("repeats", 5, "timings of each, of which the median is told"),
        ("seed", 0, "seed of the logits"),
    ):
        text = f"{what} (default: %(default)s)"
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: what PyTorch takes)")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes a minute"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0.

    Raises:
        UserError: an option that is not a positive number, or too large for this machine.
    """
    for option in ("rows", "vocab", "repeats"):
        value = getattr(args, option)
        if value < 1:
            raise UserError(f"--{option} {value}: wants at least 1")
    check_memory(args.rows, args.vocab)
    if args.threads:
        torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    shape = speed.Shape(args.rows, args.vocab, args.repeats, not args.no_compile)
    try:
        cells = speed.measure(shape, args.seed)
    except RuntimeError as problem:
        if not out_of_memory(problem):
            raise
        raise UserError(f"--rows {args.rows} --vocab {args.vocab}: do not fit into memory") from problem
    if args.json:
        machine = {key: info.collect()[key] for key in ("versions", "cpu", "cuda", "backends", "backend")}
        result = {"rows": args.rows, "vocab": args.vocab, "read_bytes_per_second": bandwidth, **machine}
        print(json.dumps(result | {"cells": [asdict(cell) for cell in cells]}, indent=2))
    else:
        print(render(cells, args.rows, args.vocab, bandwidth))
    return 0


def check_memory(rows: int, vocab: int) -> None:
    """Refuse at once what this machine cannot hold: a system that gives memory on trust ends the process instead.

    Raises:
        UserError: the least that is needed is more than there is.
    """
    needed = rows * vocab * BYTES
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63
    if needed > there:
        raise UserError(
            f"--rows {rows} --vocab {vocab}: need {needed / 1e9:.0f} GB at least; this machine has {there / 1e9:.0f} GB"
        )


def read_bandwidth() -> float:
    """Bytes per second at which the CPU reads memory, as fast as torch sums a large tensor."""
    data = torch.randn(READ_BYTES // 4)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return READ_BYTES / statistics.median(times)


def render(cells: Sequence[speed.Cell], rows: int, vocab: int, bandwidth: float) -> str:
    """The table as text: for each device, KL and dtype the floor, then every way of computing it."""
    lines = [("device", "KL", "dtype", "", "forward", "with backward", "error", "extra memory")]
    for cell in sorted(cells, key=lambda cell: (cell.device, cell.kind, cell.dtype, WAYS[cell.way])):
        about = (cell.device, cell.kind, cell.dtype)
        if cell.way == speed.OURS and cell.device == "cpu":
            floor = 2 * rows * vocab * speed.DTYPES[cell.dtype].itemsize / bandwidth
            lines.append((*about, "read floor", milliseconds(floor), "", "", ""))
        if cell.problem is not None:
            lines.append((*about, cell.way, cell.problem, "", "", ""))
            continue
        times = milliseconds(cell.forward), milliseconds(cell.forward_backward)
        memory = "" if cell.extra_bytes is None else f"{cell.extra_bytes / 2**20:.1f} MB"
        lines.append((*about, cell.way, *times, f"{cell.error:.1e}", memory))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
        "  ".join(f"{text:{'<' if at < 4 else '>'}{widths[at]}}" for at, text in enumerate(line)).rstrip()
        for line in lines
    ]
    return "\n".join(
        [
            f"token_kl, {rows} x {vocab} logits of standard deviation 3, {speed.DISTANCE:g} apart",
            f"lsc_kernels {lsc_kernels.__version__}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads",
            f"read floor: both logits once at the {bandwidth / 1e9:.1f} GB/s at which this CPU reads memory",
            "error: the worst row against fp64, relative to the mean KL",
            "",
            *table,
        ]
    )


def milliseconds(seconds: float) -> str:
    """Seconds as text."""
    return f"{1e3 * seconds:.2f} ms"
