"""What the scored file shows, as numbers: everything here is computed from the Parquet file and the judges' grades."""

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
    kl_per_token: float
    kl_per_response: float
    binds: np.ndarray

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
        """(row the raw sum puts first, row LSC-AND puts first) for the prompt where the raw sum is fooled most.

        That is where its first choice fails one judge and the other's score outweighs it most; None if nowhere.
        """
        pairs = zip(self.first(self.raw_sum), self.first(self.utility), strict=True)
        cases = [(int(raw), int(lsc)) for raw, lsc in pairs if self.failing[raw] and not self.failing[lsc]]
        return max(cases, key=lambda case: np.ptp(self.margins[case[0]]), default=None)


def read(path: Path, split: Split) -> Findings:
    """Read a scored file whose rows are the responses of ``split``, in order."""
    columns = [f"{head}_{name}" for head in ("score", "reference") for name in PROPERTIES]
    table = pq.read_table(path, columns=["response", "utility", "binding", "kl", *columns])
    if table["response"].to_pylist() != [r.response for r in split.responses]:
        raise RuntimeError(f"{path} does not hold the held-out responses in their order")
    kl = [np.array(row, dtype=np.float64) for row in table["kl"].to_pylist()]
    binding = np.array(table["binding"].to_pylist())
    stack = {h: np.stack([table[f"{h}_{name}"].to_numpy() for name in PROPERTIES], axis=1) for h in ("score", "reference")}
    return Findings(
        responses=split.responses,
        scores=stack["score"],
        references=stack["reference"],
        utility=table["utility"].to_numpy(),
        kl_per_token=float(np.concatenate(kl).mean()),
        kl_per_response=float(np.mean([row.sum() for row in kl])),
        binds=np.array([(binding == name).mean() for name in PROPERTIES]),
    )
