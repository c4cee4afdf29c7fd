"""``lsc-kernels demo``: the whole chain on small models made on the spot, offline, in one to two minutes.

Preference pairs of two conflicting properties -> a language model, two reward models -> reference rewards ->
one run of ``lsc-kernels score`` -> what it shows, in plain words -> the speed of the kernels on this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the demo."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("lsc-demo"),
        metavar="DIR",
        help="folder for models, data, rewards and demo.png (default: %(default)s)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smaller run for a first check: less training, small shapes, no torch.compile",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of data, training and sampling (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=None, metavar="N", help="CPU threads (default: what PyTorch takes)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every part of it worked.

    Raises:
        UserError: an option that cannot be used, or an extra package that is not installed.
    """
    from lsc_kernels.demo.story import Options, tell

    return tell(Options(out=args.out, quick=args.quick, seed=args.seed, threads=args.threads))
