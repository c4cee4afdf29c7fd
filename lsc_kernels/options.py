"""Checks of options that several commands have."""

from __future__ import annotations

import os

from .errors import UserError
from .wording import counted

SEEDS = range(-(2**63), 2**63)  # what PyTorch's generators take


def check_threads(threads: int | None) -> None:
    """Refuse no threads, and so many that the library beneath PyTorch ends the process.

    Raises:
        UserError: too few or too many.
    """
    cores = os.cpu_count() or 1
    most = max(64, 4 * cores)
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: wants at least 1")
    if threads is not None and threads > most:
        raise UserError(
            f"--threads {threads}: wants at most {most} on this machine, which has {counted(cores, 'core')}"
        )


def check_seed(seed: int | None) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        UserError: it does not fit into 64 bits.
    """
    if seed is not None and seed not in SEEDS:
        raise UserError(f"--seed {seed}: wants a number from {SEEDS[0]} to {SEEDS[-1]}")
