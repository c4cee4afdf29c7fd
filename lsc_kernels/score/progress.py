"""What a person watching a run sees on standard error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ..wording import counted
from .data import BadLine

LINE_SECONDS = 30.0  # between lines where there is no terminal to draw a bar on


class Left(TimeRemainingColumn):
    """The time that is left, with the word for it; nothing as long as nobody knows how much there is to do."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else Text.assemble(super().render(task), " left")


class Progress(AbstractContextManager["Progress"]):
    """A bar that grows with the characters scored, which is what the time goes with, and counts rows.

    Args:
        show: show anything at all.
    """

    def __init__(self, *, show: bool) -> None:
        self.console = Console(stderr=True, quiet=not show, highlight=False, markup=False)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            Left(),
            console=self.console,
            disable=not (show and self.console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, count="")
        self._rows = self._done = self._skipped = 0
        self._characters = self._characters_left = 0
        self._started = self._told = 0.0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, doing: str) -> None:
        """What is being done now."""
        self._bar.update(self._task, description=doing)

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def notes(self, texts: Sequence[str]) -> None:
        """Lines that stay."""
        for text in texts:
            self.note(text)

    def bad_lines(self, bad: Sequence[BadLine]) -> None:
        """Lines of the data that are left out, by reason."""
        self.notes([f"left out: {text}" for text in describe_bad_lines(bad)])

    def begin(self, rows: int, characters: int) -> None:
        """Scoring starts."""
        self._rows, self._characters_left = rows, characters
        self._started = self._told = time.monotonic()
        self._bar.update(self._task, description="scoring", total=characters)

    def skip(self, rows: int, characters: int) -> None:
        """Rows that an earlier run has finished: the bar moves, the rate does not count them."""
        self._skipped += rows
        self._characters_left -= characters
        # A new total instead of a jump: the remaining time is judged from the speed of the bar.
        self._bar.update(self._task, total=self._characters + self._characters_left, count=self._count())

    def advance(self, rows: int, characters: int) -> None:
        """Rows are done."""
        self._done += rows
        self._characters += characters
        self._characters_left -= characters
        self._bar.update(self._task, advance=characters, count=self._count())
        now = time.monotonic()
        if not self.console.is_terminal and now - self._told >= LINE_SECONDS:
            self._told = now
            left = (now - self._started) * self._characters_left / max(1, self._characters)
            self.note(f"scored {self._count()}, about {left:.0f} s left")

    def _count(self) -> str:
        rate = self._done / max(1e-9, time.monotonic() - self._started)
        return f"{self._skipped + self._done} of {counted(self._rows, 'row')}, {rate:.1f} rows/s"


def describe_bad_lines(bad: Sequence[BadLine]) -> list[str]:
    """One text per reason, with the line numbers in short: ``not valid JSON: lines 3, 7-9``.

    >>> describe_bad_lines([BadLine(line, "not valid JSON") for line in (3, 7, 8, 9)])
    ['not valid JSON: lines 3, 7-9']
    """
    by_reason: dict[str, list[int]] = {}
    for one in bad:
        by_reason.setdefault(one.reason, []).append(one.line)
    told = []
    for reason, lines in by_reason.items():
        runs: list[list[int]] = []
        for line in sorted(set(lines)):
            if runs and line == runs[-1][-1] + 1:
                runs[-1][1:] = [line]
            else:
                runs.append([line])
        numbers = ", ".join("-".join(map(str, run)) for run in runs)
        told.append(f"{reason}: line{'s' if len(lines) > 1 else ''} {numbers}")
    return told
