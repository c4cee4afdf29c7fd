"""What the scored file shows, as numbers: computed from the Parquet file and the judges' grades alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from .data import PROPERTIES, Response, Split

FAILING_GRADE = 1  # of 5: what a judge gives an answer that is no good to him


@dataclass(frozen=True)
class Findings:
    """The rows of a scored file with their grades; rows of one prompt stand together.

    ``scores``, ``references`` and ``margins`` are [rows, properties]; ``margins`` = scores - references.
    """

    responses: tuple[Response, ...]
    scores: np.ndarray
    references: np.ndarray
    utility: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """How far each score lies above its reference reward."""
        return self.scores - self.references

    @property
    def raw_sum(self) -> np.ndarray:
        """What people add up who do not centre."""
        return self.scores.sum(axis=1)

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

    def fooled(self) -> tuple[int, int] | None:
        """(row the raw sum puts first, row LSC-AND puts first) where the raw sum is fooled most, or None.

        Fooled: its first choice fails a judge, and that of LSC-AND does not. Most: where the two margins of
        its choice are farthest apart.
        """
        pairs = zip(self.first(self.raw_sum), self.first(self.utility), strict=True)
        cases = [(int(raw), int(lsc)) for raw, lsc in pairs if self.failing[raw] and not self.failing[lsc]]
        return max(cases, key=lambda case: np.ptp(self.margins[case[0]]), default=None)


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
