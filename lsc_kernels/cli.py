"""The command ``lsc-kernels``: finds the subcommand, runs it, and turns a user's mistake into one line.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int``, the exit code. Only the
one that is called is imported: ``info`` must work where the extras of ``score`` are not installed.

Exit codes: 0 done, 2 the user can put it right (one line on stderr says what and where), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import lsc_kernels
from lsc_kernels.errors import UserError
from lsc_kernels.extras import EXTRA_OF, MissingExtra
from lsc_kernels.options import check_seed, check_threads

# What `--help` says of each, beside its name; it lives in the module lsc_kernels.<name>.
COMMANDS = {
    "info": "what is installed, which backend serves which device, how to get what is missing",
    "demo": "train, score and time everything on small models made on the spot, offline",
    "score": "rewards, utilities and KL for every response of a data set",
    "calibrate": "reference rewards per prompt, from tables of scores of any size",
    "plan": "what rewards would buy for the same KL, from a table of scores, before training",
    "bench": "time the ops on this machine against eager PyTorch and torch.compile",
}


class Parser(argparse.ArgumentParser):
    """Tells a wrong option in one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (`{self.prog} --help` lists the options)\n")


def build_parser(command: str | None) -> Parser:
    """The parser with all subcommands, of which only ``command`` knows its options."""
    parser = Parser(prog="lsc-kernels", description="Fused kernels for the reward half of an RLHF step.")
    parser.add_argument("--version", action="version", version=f"lsc-kernels {lsc_kernels.__version__}")
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        subparser = subcommands.add_parser(name, help=summary, description=description)
        if name == command:
            module = importlib.import_module(f"lsc_kernels.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run, parser=subparser)
    return parser


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse; an option that a subcommand does not know is told by the subcommand, whose help lists those it knows."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def check_environment() -> None:
    """Refuse a wrong ``LSC_KERNELS_...`` variable, which an import lets pass until the first op is called."""
    if lsc_kernels.WITHOUT_TORCH is not None:
        return
    try:
        lsc_kernels.get_backend()
    except ValueError as error:
        raise UserError(str(error)) from None


def explain(error: Exception) -> str | None:
    """The line that tells a user's mistake; None for an error that is not the user's."""
    if isinstance(error, (UserError, MissingExtra)):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRA_OF:
            return f"{package} is not installed; get it with: pip install 'lsc-kernels[{EXTRA_OF[package]}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lsc-kernels`` with these arguments (default: those of the process); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else None
    try:
        if lsc_kernels.WITHOUT_TORCH is not None and command in COMMANDS and command != "info":
            raise UserError(lsc_kernels.WITHOUT_TORCH)
        args = parse(build_parser(command), argv)
        check_threads(getattr(args, "threads", None))
        check_seed(getattr(args, "seed", None))
        check_environment()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # whoever read the output has seen enough; Python's flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"lsc-kernels {command}: error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
