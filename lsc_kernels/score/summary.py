"""The numbers a person wants at the end, computed from the output file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..wording import counted
from .data import BadLine
from .progress import describe_bad_lines
from .store import read_metadata

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class PropertySummary:
    """One property over all rows: means, and shares between 0 and 1.

    ``marginal_utility`` is the mean slope of the utility in the centred score, sigmoid(-z) where the floor is
    0. ``binds`` is the share of rows where this property's weighted slope is the largest: the one worth
    improving. ``pair_accuracy`` is the share of pairs where the chosen response scores higher; a tie counts
    half.
    """

    name: str
    mean_score: float
    reference: str
    mean_reference: float
    share_above: float
    marginal_utility: float
    binds: float
    pair_accuracy: float | None


@dataclass(frozen=True)
class ScoreSummary:
    """What one scoring run found. Printed with rich it is the summary table.

    KL per token is the mean over all response tokens; KL per sequence is the mean of the sums. Rows with a
    score that is not finite are counted in ``not_finite`` and left out of the means.
    """

    out: Path
    rows: int
    records: int
    pairs: int
    properties: tuple[PropertySummary, ...]
    utility: float
    utility_pair_accuracy: float | None
    kl_kind: str
    kl_per_token: float
    kl_per_sequence: float
    tokens: int
    bad: tuple[BadLine, ...]
    not_finite: int
    prompts_cut: int
    responses_cut: int
    reward_texts_cut: int
    alone: int
    scored_now: int = 0
    seconds: float = 0.0  # that scoring took, without loading before and assembling after it

    @property
    def rows_per_second(self) -> float:
        """Rows scored by this call per second, loading and assembling left out."""
        return self.scored_now / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain values."""
        return {**asdict(self), "out": str(self.out)}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        yield self._table()
        yield from map(Text, self.lines())  # what data and options say may look like markup

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=counted(self.rows, "row"), title_justify="left")
        table.add_column("property", no_wrap=True)
        headings = ["mean score", "reference", "above it", "marginal utility", "binds"]
        for heading in headings + (["chosen preferred"] if self.pairs else []):
            table.add_column(heading, justify="right")
        for one in self.properties:
            cells = [f"{one.mean_score:.3f}", f"{one.mean_reference:.3f}", f"{one.share_above:.1%}"]
            cells += [f"{one.marginal_utility:.3f}", f"{one.binds:.1%}"]
            cells += [] if one.pair_accuracy is None else [f"{one.pair_accuracy:.1%}"]
            table.add_row(Text(one.name), *cells)
        return table

    def _preference(self) -> str:
        if self.utility_pair_accuracy is None:
            return ""
        return f"; it prefers the chosen response in {self.utility_pair_accuracy:.1%} of {counted(self.pairs, 'pair')}"

    def lines(self) -> list[str]:
        """What stands below the table."""
        told = [
            f"mean utility {self.utility:.3f}{self._preference()}",
            f"mean KL ({self.kl_kind}) {self.kl_per_token:.4g} per token, {self.kl_per_sequence:.4g} per "
            f"sequence, {self.tokens / max(1, self.rows):.1f} tokens per response",
            "references: " + "; ".join(f"{one.name} {one.reference}" for one in self.properties),
        ]
        if self.alone:
            are = "row is alone with its" if self.alone == 1 else "rows are alone with their"
            told.append(f"{self.alone} {are} prompt: the reference is then the quantile of the file")
        cut = {
            "prompt": self.prompts_cut,
            "response": self.responses_cut,
            "reward model text": self.reward_texts_cut,
        }
        if any(cut.values()):
            what = ", ".join(counted(count, name) for name, count in cut.items() if count)
            told.append(f"too long and cut: {what}")
        if self.not_finite:
            have = "row has" if self.not_finite == 1 else "rows have"
            told.append(
                f"{self.not_finite} {have} a score that is not finite, which is left out of the means"
            )
        if self.bad:
            lines = len({one.line for one in self.bad})
            told.append(f"{lines} of {counted(self.records, 'record')} left out:")
            told += [f"  {text}" for text in describe_bad_lines(self.bad)]
        if self.scored_now:
            told.append(
                f"scored {counted(self.scored_now, 'row')} in {self.seconds:.1f} s, "
                f"{self.rows_per_second:.1f} rows/s"
            )
        told.append(f"written to {self.out}")
        return told


def summarize(out: Path) -> ScoreSummary:
    """Compute the summary from an output file.

    Raises:
        UserError: the file is no output of this command.
    """
    about = read_metadata(out)
    names = about["names"]
    heads = ("score", "reference", "utility", "marginal_utility")
    columns = [f"{head}_{name}" for name in names for head in heads]
    cuts = ["prompt_tokens_cut", "response_tokens_cut", "reward_tokens_cut"]
    rows = pq.read_table(out, columns=["line", "side", "utility", "binding", *cuts, *columns])
    values = {name: rows[name].to_numpy() for name in ("line", "utility", *cuts, *columns)}
    finite = np.all([np.isfinite(values[f"score_{name}"]) for name in names], axis=0)
    side = np.array(rows["side"].to_pylist(), dtype=object)
    pairs = _pairs(values["line"], side)
    binding = np.array(rows["binding"].to_pylist(), dtype=object)
    tokens_at, kl_at = kl_by_position(out)
    return ScoreSummary(
        out=out,
        rows=rows.num_rows,
        records=about["records"],
        pairs=len(pairs),
        properties=tuple(
            PropertySummary(
                name=name,
                mean_score=_mean(values[f"score_{name}"][finite]),
                reference=reference,
                mean_reference=_mean(values[f"reference_{name}"][finite]),
                share_above=_mean((values[f"score_{name}"] > values[f"reference_{name}"])[finite]),
                marginal_utility=_mean(values[f"marginal_utility_{name}"][finite]),
                binds=_mean((binding == name)[finite]),
                pair_accuracy=_accuracy(values[f"score_{name}"], pairs),
            )
            for name, reference in zip(names, about["references"], strict=True)
        ),
        utility=_mean(values["utility"][finite]),
        utility_pair_accuracy=_accuracy(values["utility"], pairs),
        kl_kind=about["kl"],
        kl_per_token=float(kl_at.sum() / tokens_at.sum()),
        kl_per_sequence=float(kl_at.sum() / rows.num_rows),
        tokens=int(tokens_at.sum()),
        bad=tuple(BadLine(line, reason) for line, reason in about["bad"]),
        not_finite=int((~finite).sum()),
        prompts_cut=int((values[cuts[0]] > 0).sum()),
        responses_cut=int((values[cuts[1]] > 0).sum()),
        reward_texts_cut=int((values[cuts[2]] > 0).sum()),
        alone=about["rows_alone_with_their_prompt"],
    )


def kl_by_position(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """How many responses reach each position, and the sum of their KL there; read piece by piece."""
    counts, sums = np.zeros(0, np.int64), np.zeros(0)
    with pq.ParquetFile(out) as file:
        for batch in file.iter_batches(columns=["kl"]):
            lengths = pc.list_value_length(batch["kl"]).to_numpy(zero_copy_only=False)
            values = pc.list_flatten(batch["kl"]).to_numpy(zero_copy_only=False).astype(np.float64)
            positions = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            longest = max(len(counts), int(lengths.max(initial=0)))
            counts = np.pad(counts, (0, longest - len(counts))) + np.bincount(positions, minlength=longest)
            sums = np.pad(sums, (0, longest - len(sums))) + np.bincount(positions, values, minlength=longest)
    return counts, sums


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if values.size else float("nan")


def _pairs(lines: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Row numbers [pairs, 2] of the chosen and rejected response of each record that has both."""
    chosen = {line: row for row, line in enumerate(lines) if side[row] == "chosen"}
    found = [
        (chosen[line], row) for row, line in enumerate(lines) if side[row] == "rejected" and line in chosen
    ]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _accuracy(values: np.ndarray, pairs: np.ndarray) -> float | None:
    if not len(pairs):
        return None
    difference = values[pairs[:, 0]] - values[pairs[:, 1]]
    return _mean(np.where(difference == 0, 0.5, difference > 0))
