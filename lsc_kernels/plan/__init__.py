"""``lsc-kernels plan``: what references, scales and ways to combine make of a table of scores, before any training.

The command line is here; `lsc_kernels.plan.read` reads the table, `lsc_kernels.plan.report` makes the report, and the
numbers are those of ``lsc_kernels.analysis``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..extras import load
from ..files import check_outputs
from ..score.config import check_numbers, per_property
from ..transforms import TRANSFORMS

if TYPE_CHECKING:
    from torch import Tensor

    from .read import Samples

__all__ = ["add_arguments", "run"]

POOLING = ("auto", "never", "always")
METHODS = ("raw", "lsc", "sigmoid", "zscore")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lsc-kernels plan`` to a parser."""
    parser.description = (
        "From scores of the base policy's responses: which property binds, and what raw sum, LSC and other rewards "
        "would buy for the same KL. A report, and a figure."
    )
    parser.add_argument(
        "scores",
        nargs="+",
        help="Parquet, JSON lines or CSV: what `lsc-kernels score` writes, or prompt and one score_NAME per property, "
        "or prompt, property, score (and response, to say which scores belong together)",
    )
    parser.add_argument(
        "--kl-budget", type=float, default=5.0, help="KL from the base policy, in nats (default: %(default)s)"
    )
    parser.add_argument(
        "--reference",
        action="append",
        help="reference reward: a number, quantile:0.85 of these scores, prompt-quantile:0.85 among the responses to "
        "the same prompt, or a table of `lsc-kernels calibrate`; repeat to give one per property (default: the "
        "reference_NAME of the file, else quantile:0.85)",
    )
    parser.add_argument("--names", type=_words, help="take these properties, in this order (with commas)")
    parser.add_argument(
        "--scale",
        type=_numbers,
        help="Bradley-Terry temperature, one or one per property (default: what `score` was given, else 1)",
    )
    parser.add_argument(
        "--floor",
        type=_numbers,
        help="rate at which the judge is wrong, one or one each (default: what `score` was given, else 0)",
    )
    parser.add_argument(
        "--weights",
        type=_numbers,
        help="exponent of each property's probability (default: what `score` was given, else 1)",
    )
    parser.add_argument("--formula", help="which outputs count as good, as 'helpful & (short | kind)'")
    parser.add_argument(
        "--methods", type=_words, default=METHODS, help=f"rewards to compare (default: {','.join(METHODS)})"
    )
    parser.add_argument(
        "--pool",
        choices=POOLING,
        default="auto",
        help="take all responses as if to one prompt: auto does where a prompt has too few (default: %(default)s)",
    )
    parser.add_argument("--plot", default="plan.png", help="figure to write (default: %(default)s)")
    parser.add_argument("--json", help="also write all numbers into this file")


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options; returns the exit code.

    Raises:
        UserError: a mistake of the user, in one line.
        MissingExtra: a package is not installed.
    """
    plot = Path(args.plot)
    _check_files(args, plot)
    for module, extra in (("duckdb", "reference"), ("rich", "reference"), ("matplotlib", "plot")):
        load(module, extra)
    from rich.console import Console

    from ..plotting import check_figure_name, save_figure
    from ..wording import first_line
    from .read import SHAPE, read_scores, references
    from .report import make_plan

    if not 0 < args.kl_budget < math.inf:
        raise UserError(f"--kl-budget {args.kl_budget}: wants a number of nats above 0")
    for method in args.methods:
        if method not in TRANSFORMS:
            raise UserError(f"--methods {method}: wants some of {','.join(TRANSFORMS)}")
    for option in SHAPE:
        if getattr(args, option) is not None:
            check_numbers(option, getattr(args, option))
    check_figure_name(plot)
    samples = read_scores(args.scores, args.names)
    reference, origin = references(samples, args.reference)
    try:
        plan = make_plan(
            samples,
            reference,
            origin,
            args.kl_budget,
            methods=args.methods,
            pool=args.pool,
            formula=args.formula,
            **{option: _each(args, option, samples) for option in SHAPE},
        )
    except ValueError as problem:
        where, line = f"--formula {args.formula!r}: ", first_line(problem)
        raise UserError(
            line.replace("formula: ", where, 1) if line.startswith("formula: ") else line
        ) from problem
    Console(highlight=False, markup=False).print(plan)
    save_figure(plan.figure(), plot)
    print(f"figure: {plot}")
    if args.json is not None:
        try:
            Path(args.json).write_text(_as_json(plan.as_dict()), encoding="utf-8")
        except OSError as problem:
            raise UserError(f"--json {args.json}: cannot be written: {problem.strerror}") from problem
    return 0


def _check_files(args: argparse.Namespace, plot: Path) -> None:
    """Refuse to write over what is read, or over what is no earlier output."""
    from ..tables import files_of

    outputs = [("--plot", plot)] + ([("--json", Path(args.json))] if args.json is not None else [])
    inputs = [("the command", path) for path in files_of(args.scores)]
    check_outputs(outputs, inputs + [("--reference", path) for path in files_of(args.reference or ())])
    if args.json is None or not Path(args.json).exists():
        return
    try:
        kept = json.loads(Path(args.json).read_bytes())
    except OSError as problem:
        raise UserError(f"--json {args.json}: cannot be written: {problem.strerror}") from problem
    except (ValueError, RecursionError):
        kept = None
    if not isinstance(kept, dict):
        raise UserError(
            f"--json {args.json}: is there already and holds no JSON object: give it another name"
        )


def _each(args: argparse.Namespace, option: str, samples: Samples) -> Tensor:
    """One number per property: those given, else those that the file was scored with, else none of it."""
    import torch

    given = getattr(args, option)
    if given is None:
        given = samples.shape.get(option, (0.0 if option == "floor" else 1.0,))
    return torch.tensor(per_property(given, samples.names, option), dtype=torch.float64)


def _as_json(numbers: dict[str, Any]) -> str:
    """JSON knows neither NaN nor infinity: null."""
    known = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in numbers.items()
    }
    return json.dumps(known, indent=1, allow_nan=False)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: wants numbers with commas between them") from None
