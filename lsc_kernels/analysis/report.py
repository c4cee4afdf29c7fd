"""What all results share: plain values for loggers, tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from lsc_kernels.extras import load


class Report:
    """A result that knows itself as plain values. Subclasses are dataclasses."""

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, nested ones joined with a slash; no tensors: for a logger, or JSON."""
        return dict(_flat("", self))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        return
    if is_dataclass(value) and not isinstance(value, type):
        label = f"{name}/" if name else ""
        for each in fields(value):
            if each.repr:
                yield from _flat(label + each.name, getattr(value, each.name))
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _flat(f"{name}/{key}", each)
    elif isinstance(value, (tuple, list)):
        for number, each in enumerate(value):
            yield from _flat(f"{name}/{getattr(each, 'label', number)}", each)
    else:
        yield name, value


def percent(share: float) -> str:
    """As a person reads it: one decimal, and two digits of what is below 1%.

    >>> percent(0.123), percent(0.00042)
    ('12.3%', '0.042%')
    """
    return f"{share:.1%}" if share >= 0.01 or share <= 0 else f"{100 * share:.2g}%"


def rich_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table with its first column to the left and numbers to the right. Where it is narrow, names are broken into
    lines; a number never is, nor cut.

    Raises:
        MissingExtra: rich is not installed.
    """
    text = load("rich.text", "reference").Text  # a name may hold what rich takes for markup
    table = load("rich.table", "reference").Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        words = " ".join(row[number] for row in rows).split() if number else []
        table.add_column(
            text(heading),
            justify="right" if number else "left",
            overflow="fold",
            min_width=max(map(len, words), default=1),
        )
    for row in rows:
        table.add_row(*map(text, row))
    return table
