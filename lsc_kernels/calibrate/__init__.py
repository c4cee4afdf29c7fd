"""``lsc-kernels calibrate``: reference rewards per prompt from tables of scores that may be larger than memory.

The command line is here; the work is in `lsc_kernels.calibrate.query`, whose ``calibrate(...)`` is the function to
call from Python.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import UserError
from ..files import check_outputs
from ..reference.quantile import METHODS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``lsc-kernels calibrate`` to a parser."""
    parser.description = (
        "Take a quantile of the scores of every prompt, of every bucket of prompts and of the whole, and keep them "
        "as a table of reference rewards (lk.reference.ReferenceTable)."
    )
    parser.add_argument(
        "scores",
        nargs="+",
        help="Parquet, JSON lines or CSV; columns prompt, property, score, or prompt and one score_NAME per "
        "property (what `lsc-kernels score` writes); several files of one kind, or a pattern in quotes",
    )
    parser.add_argument("--out", required=True, help="Parquet file to write")
    parser.add_argument(
        "--quantile", type=float, default=0.85, help="of the scores of a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--method", choices=METHODS, default="linear", help="of the quantile (default: %(default)s)"
    )
    parser.add_argument(
        "--canned",
        action="store_true",
        help="the scores are of canned responses, one per prompt and property",
    )
    parser.add_argument(
        "--names",
        type=lambda text: text.split(","),
        help="take these properties, in this order (with commas)",
    )
    parser.add_argument(
        "--bucket",
        default="length",
        metavar="length|none|column:NAME",
        help="what a prompt that the table does not know falls back to, before the whole (default: %(default)s)",
    )
    parser.add_argument(
        "--min-samples", type=int, default=1, help="fewer scores make no reference (default: %(default)s)"
    )
    parser.add_argument("--model", default="", help="what gave the responses: kept in the table")
    parser.add_argument("--memory", help="most memory to use, as 4GB (default: what DuckDB takes, 80%%)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--temp", help="folder for what does not fit into memory (default: beside --out)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")


def run(args: argparse.Namespace) -> int:
    """Run the command with parsed options; returns the exit code.

    Raises:
        UserError: a mistake of the user, in one line.
        MissingExtra: a package is not installed.
    """
    from ..extras import load
    from ..tables import files_of

    out = Path(args.out)
    check_outputs([("--out", out)], [("the command", path) for path in files_of(args.scores)])
    for module in ("duckdb", "pyarrow", "rich"):
        load(module, "reference")
    from rich.console import Console

    from .query import calibrate
    from .report import Progress, summary

    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out}: is there already; --overwrite replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--out {out}: cannot be written: {problem.strerror}") from problem
    with Progress() as progress:
        result = calibrate(
            args.scores,
            args.quantile,
            method=args.method,
            canned=args.canned,
            properties=args.names,
            bucket=args.bucket,
            min_samples=args.min_samples,
            model=args.model,
            memory=args.memory,
            threads=args.threads,
            temp=args.temp or out.parent,
            progress=progress,
        )
    try:
        result.table.save(out)
    except OSError as problem:
        raise UserError(f"--out {out}: cannot be written: {problem.strerror}") from problem
    Console(highlight=False, markup=False).print(summary(result, out))
    return 0
