"""What the scored file shows, as numbers: computed from the Parquet file and the judges' grades alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from .chain import SCALES
from .data import PROPERTIES, Response, Split

_SCALES = np.array([SCALES[name] for name in PROPERTIES], dtype=np.float32)
FAILING_GRADE = 1  # of 5: what a judge gives an answer that is no good to him


class Fooled(NamedTuple):
    """A sum of the scores, and the rows that it and LSC-AND put first for one request."""

    rule: str
    total: np.ndarray
    """The sum of each row."""
    slopes: tuple[float, ...]
    """What it gains where a property's margin grows by 1. Between answers to one request nothing else differs."""
    rows: tuple[int, int]


@dataclass(frozen=True)
class Findings:
    """The rows of a scored file with their grades; rows of one prompt stand together.

    ``scores`` and ``references`` are [rows, properties].
    """

    responses: tuple[Response, ...]
    scores: np.ndarray
    references: np.ndarray
    utility: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """z: how far each score lies above its reference reward, in units of its reward model's scale."""
        return (self.scores - self.references) / _SCALES

    @property
    def raw_sum(self) -> np.ndarray:
        """What people add up who neither centre nor rescale."""
        return self.scores.sum(axis=1)

    @property
    def rescaled_sum(self) -> np.ndarray:
        """The sum in equal units, still without a reference."""
        return (self.scores / _SCALES).sum(axis=1)

    @property
    def failing(self) -> np.ndarray:
        """Rows that one of the judges gave the lowest grades."""
        return np.array([min(r.helpful, r.harmless) <= FAILING_GRADE for r in self.responses])

    def first(self, by: np.ndarray) -> np.ndarray:
        """For each prompt the row that ranks first."""
        rows_of: dict[str, list[int]] = {}
        for row, response in enumerate(self.responses):
            rows_of.setdefault(response.prompt, []).append(row)
        return np.array([rows[int(np.argmax(by[rows]))] for rows in rows_of.values()])

    def fooled(self) -> Fooled | None:
        """Where a sum is fooled most: the raw one, or if nowhere, the one in equal units. None: neither anywhere.

        Fooled: its first choice fails a judge, and that of LSC-AND does not. Most: where its choice is
        least probably good, compared with that of LSC-AND.
        """
        best = self.first(self.utility)
        for rule, total, slopes in (
            ("raw sum", self.raw_sum, tuple(SCALES[name] for name in PROPERTIES)),
            ("sum in equal units", self.rescaled_sum, (1.0,) * len(PROPERTIES)),
        ):
            pairs = zip(self.first(total), best, strict=True)
            cases = [
                (int(row), int(lsc)) for row, lsc in pairs if self.failing[row] and not self.failing[lsc]
            ]
            if cases:
                rows = max(cases, key=lambda case: self.utility[case[1]] - self.utility[case[0]])
                return Fooled(rule, total, slopes, rows)
        return None


def read(path: Path, split: Split) -> Findings:
    """Read a scored file whose rows are the responses of ``split``, in order."""
    heads = ("score", "reference")
    names = {head: [f"{head}_{name}" for name in PROPERTIES] for head in heads}
    table = pq.read_table(path, columns=["response", "utility", *names["score"], *names["reference"]])
    if table["response"].to_pylist() != [r.response for r in split.responses]:
        raise RuntimeError(f"{path} does not hold the held-out responses in order")
    scores, references = (
        np.stack([table[name].to_numpy() for name in names[head]], axis=1) for head in heads
    )
    return Findings(split.responses, scores, references, table["utility"].to_numpy())
