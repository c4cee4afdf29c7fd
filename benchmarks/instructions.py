"""Instructions in the loops of the token ops' GPU kernels, counted in their machine code: no GPU is needed.

    python -m benchmarks.instructions [--architecture sm_90]

compiles the kernels with nvcc and Triton, writes instructions-ARCHITECTURE.json into benchmarks/results/ and prints a
table. It says whether a kernel can keep the memory busy, and nothing of how long it takes.

What a CUDA kernel's loop takes is the shortest way from the copy of a tile to the next one, in loads of 16 bytes, that
goes through one vote and no other (forward), or through a store of 16 bytes (backward). Rows that begin anywhere go
through the block's memory besides, where their words are moved into place. Triton's is the shortest loop over groups of
tiles.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]

from _measure import commit  # noqa: E402

COLUMNS = 8  # of a thread, in a tile
EXPONENTIAL, VOTE = r"MUFU\.EX2", r"VOTE\.ANY P"
COPY, STORE = r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.EF\.128"
# The last lane's copy of the words behind its own; where words in the block's memory are stored again.
COPY_BEHIND, MOVE = rf"{COPY} .*\.64\+0x10\]", r"STS\.128"
TYPES = {"float32": "f", "bfloat16": "NS0_8BFloat16E"}


@dataclass(frozen=True)
class Loop:
    """One way through a kernel's loop: its instructions for 8 columns of a thread."""

    op: str
    backend: str
    step: str
    way: str
    dtype: str
    instructions: int


class Code:
    """A function's instructions and where each may go on."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in lines:
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(self.instructions)
            elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ;", line):
                self.instructions.append(found[1])
        self.next = [list(self._successors(i, labels)) for i in range(len(self.instructions))]

    def _successors(self, i: int, labels: dict[str, int]) -> Iterator[int]:
        text = self.instructions[i]
        target = re.search(r"BRA .*`\((\.L_x_\d+)\)", text)
        if target:
            yield labels[target[1]]
        conditional = text.startswith("@") or re.search(r"BRA !?U?P\d,", text)
        ends = target or text.startswith(("EXIT", "RET"))
        if (conditional or not ends) and i + 1 < len(self.instructions):
            yield i + 1

    def find(self, pattern: str) -> list[int]:
        return [i for i, text in enumerate(self.instructions) if re.search(pattern, text)]

    def path(self, begin: int, end: int, without: Container[int] = ()) -> list[int] | None:
        """The shortest, ``begin`` left out."""
        waiting, came_from = [(0, begin, begin)], dict[int, int]()
        while waiting:
            length, at, before = heapq.heappop(waiting)
            if at in came_from:
                continue
            if length:
                came_from[at] = before
            if length and at == end:
                break
            for following in self.next[at]:
                if following not in came_from and following not in without:
                    heapq.heappush(waiting, (length + 1, following, at))
        if end not in came_from:
            return None
        found = [end]
        while came_from[found[-1]] != begin:
            found.append(came_from[found[-1]])
        return found[::-1]

    def round_trip(self, *through: int, without: Container[int] = ()) -> list[int] | None:
        whole: list[int] = []
        for begin, end in zip(through, (*through[1:], through[0]), strict=True):
            part = self.path(begin, end, without)
            if part is None:
                return None
            whole += part
        return whole

    def exponentials(self, loop: Sequence[int]) -> int:
        return sum(bool(re.search(EXPONENTIAL, self.instructions[i])) for i in loop)


def disassembled(cubin: Path) -> list[str]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout.splitlines()


def compiled(source: str, architecture: str, folder: Path) -> dict[str, Code]:
    """The kernels of a file in csrc/cuda, by their mangled names."""
    cubin = folder / f"{source}.cubin"
    include = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++17",
        "-O3",
        "-fmad=false",
        "--expt-relaxed-constexpr",
        f"-arch={architecture}",
        "-cubin",
    ]
    definitions = ["-DLSC_ISA=cuda", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    paths = ["-I", ROOT / "csrc", "-isystem", include, ROOT / f"csrc/cuda/{source}.cu", "-o", cubin]
    subprocess.run(["nvcc", *flags, *definitions, *paths], check=True)
    functions: dict[str, list[str]] = {}
    inside: list[str] = []
    for line in disassembled(cubin):
        if found := re.match(r"\.text\.(\w+):", line):
            inside = functions[found[1]] = []
        elif line.startswith("$"):  # what it calls
            inside = []
        inside.append(line)
    return {name: Code(lines) for name, lines in functions.items()}


def loops_of_one_vote(code: Code) -> list[list[int]]:
    """For each vote: the shortest round from a copy through it and no other."""
    copies, votes = code.find(COPY), code.find(VOTE)
    found = []
    for vote in votes:
        others = set(votes) - {vote}
        loops = [loop for copy in copies if (loop := code.round_trip(copy, vote, without=others))]
        if complete := [loop for loop in loops if code.exponentials(loop) >= COLUMNS]:
            found.append(min(complete, key=len))
    return found


def nearest(code: Code, begin: int, pattern: str) -> int:
    paths = {i: path for i in code.find(pattern) if (path := code.path(begin, i))}
    return min(paths, key=lambda i: len(paths[i]))


def rows_anywhere(code: Code) -> dict[str, int]:
    """The usual way of :func:`loops_of_one_vote` where rows do not begin on 16 bytes."""
    moves = {copy: nearest(code, copy, MOVE) for copy in code.find(COPY_BEHIND)}
    votes = code.find(VOTE)
    rounds = (
        code.round_trip(copy, move, vote, without=set(votes) - {vote})
        for copy, move in moves.items()
        for vote in votes
    )
    loops = [len(loop) for loop in rounds if loop and code.exponentials(loop) == COLUMNS]
    return {"usual, rows anywhere": min(loops)}


def one_model(code: Code) -> dict[str, int]:
    return {"usual": min(map(len, loops_of_one_vote(code)))} | rows_anywhere(code)


def two_models(code: Code) -> dict[str, int]:
    """Two exponentials a column are those of models far apart. The exact difference takes more than the usual one, a
    tile that is taken with care more than either."""
    loops = loops_of_one_vote(code)
    far = min(len(loop) for loop in loops if code.exponentials(loop) == 2 * COLUMNS)
    usual, exact, *_ = sorted(len(loop) for loop in loops if code.exponentials(loop) == COLUMNS)
    ways = {"usual": usual, "exact difference": exact, "models far apart": far}
    return ways | rows_anywhere(code)


def backward_ways(code: Code) -> dict[str, int]:
    """A loop that reads the reference has a second exponential, for columns that need it."""
    stores, copies = code.find(STORE), code.find(COPY)
    found: dict[str, int] = {}
    for copy in copies:
        for store in stores:
            loop = code.round_trip(copy, store)
            if loop and code.exponentials(loop) >= COLUMNS:
                way = "policy alone" if code.exponentials(loop) == COLUMNS else "reads the reference"
                found[way] = min(found.get(way, len(loop)), len(loop))
    return found


def of_cuda(architecture: str) -> Iterator[Loop]:
    with tempfile.TemporaryDirectory() as name:
        kl, alone = (compiled(op, architecture, Path(name)) for op in ("token_kl", "token_logprobs"))
    kernels = [
        (kl, "token_kl", "forward", "token_forwardI{}LNS0_7ReadingE1E", two_models),
        (kl, "token_kl, full reverse", "forward", "token_forwardI{}LNS0_7ReadingE2E", two_models),
        (alone, "token_logprobs", "forward", "token_forwardI{}LNS0_7ReadingE0E", one_model),
        (kl, "token_kl", "backward", "token_backwardI{}Lb1E", backward_ways),
        (alone, "token_logprobs", "backward", "token_backwardI{}Lb0E", backward_ways),
    ]
    for functions, op, step, pattern, ways in kernels:
        for dtype, mangled in TYPES.items():
            (code,) = (code for name, code in functions.items() if pattern.format(mangled) in name)
            for way, instructions in ways(code).items():
                yield Loop(op, "CUDA C++", step, way, dtype, instructions)


def of_triton(architecture: str) -> Iterator[Loop]:
    ops = {"two": "token_kl", "two, reverse": "token_kl, full reverse", "one": "token_logprobs"}
    for dtype in TYPES:
        command = [sys.executable, ROOT / "tests" / "_aot.py", architecture, dtype, "k3", "full_reverse"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        found: dict[str, list[int]] = {}
        for facts in map(json.loads, output.splitlines()):
            if facts["kernel"] == "token_rows.forward_kernel":
                found.setdefault(ops[facts["models"]], facts["group_instructions"])
        for op, instructions in found.items():
            # a pair's kernel has shorter loops too, for one model where the other's row is undefined
            ways = ("usual",) if op == "token_logprobs" else ("usual", "exact difference")
            for way, count in zip(ways, instructions[-len(ways) :], strict=True):
                yield Loop(op, "Triton", "forward", way, dtype, count)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--architecture", default="sm_90", help="default: sm_90")
    architecture = parser.parse_args(arguments).architecture
    loops = [*of_cuda(architecture), *of_triton(architecture)]
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\S+),", nvcc)
    results: dict[str, Any] = {
        "architecture": architecture,
        "nvcc": release[1] if release else None,
        "triton": triton.__version__,
        "commit": commit(),
        "loops": [asdict(loop) for loop in loops],
    }
    path = ROOT / "benchmarks" / "results" / f"instructions-{architecture}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for loop in loops:
        print(f"{loop.op:24} {loop.backend:9} {loop.step:9} {loop.way:20} {loop.dtype:9} {loop.instructions}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
