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


def rich_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    """A table with its first column to the left and numbers to the right.

    Raises:
        MissingExtra: rich is not installed.
    """
    table = load("rich.table", "reference").Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table
