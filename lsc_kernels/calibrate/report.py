"""What a person sees of a calibration: a bar while it runs, a table at the end."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from ..reference.table import CANNED
from ..wording import counted
from .query import Calibration

FEW = (
    8  # below it, what the same model gives next exceeds the 85% quantile by half as often again as it should
)


class Progress(AbstractContextManager["Progress"]):
    """A bar on standard error, one after another for each thing that is done; nothing where there is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description:8}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def __call__(self, doing: str, share: float) -> None:
        if doing not in self._tasks:
            self._tasks[doing] = self._bar.add_task(doing, total=1.0)
        self._bar.update(self._tasks[doing], completed=share)


def summary(result: Calibration, out: Path) -> Group:
    """The table at the end, and what is worth knowing of it."""
    about = result.table.provenance
    what = (
        "the canned response"
        if about.method == CANNED
        else f"the {about.quantile:g} quantile, {about.method}"
    )
    table = Table(
        title=f"{counted(len(result.table), 'prompt')}, {counted(about.samples, 'score')}: {what}",
        title_justify="left",
    )
    table.add_column("property", no_wrap=True)
    for heading in ("whole", "prompts: 10%", "median", "90%", "scores per prompt", "missing"):
        table.add_column(heading, justify="right")
    for k, name in enumerate(result.table.properties):
        references = result.prompts.references[:, k]
        known = references[~np.isnan(references)]
        spread = np.quantile(known, [0.1, 0.5, 0.9]) if known.size else [np.nan] * 3
        samples = np.median(result.prompts.samples[:, k])
        cells = [f"{value:.3f}" for value in (result.whole.references[0, k], *spread)]
        table.add_row(name, *cells, f"{samples:g}", str(result.missing[name]))
    return Group(table, *_notes(result), f"written to {out}")


def _notes(result: Calibration) -> list[str]:
    notes = []
    if result.table.provenance.method != CANNED and np.median(result.prompts.samples) < FEW:
        most = np.median(result.prompts.samples)
        notes.append(
            f"half of the prompts have {most:g} {'score' if most == 1 else 'scores'} or fewer: their quantiles are "
            f"biased low. More samples per prompt, or --min-samples {FEW} to use the bucket's quantile instead"
        )
    without = int(np.isnan(result.prompts.references).any(axis=1).sum())
    if without:
        have = "prompt has" if without == 1 else "prompts have"
        notes.append(f"{without} {have} too few scores of some property: looked up, the bucket's is given")
    return notes
