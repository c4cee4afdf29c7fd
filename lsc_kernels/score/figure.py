"""One figure of a scored file: where the scores lie, which property binds, where in a response the KL is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from ..plotting import COLOURS, bar_style, line_style, new_figure, save_figure
from .extras import require
from .store import read_metadata
from .summary import ScoreSummary, kl_by_position, summarize

if TYPE_CHECKING:
    import pyarrow as pa

FEWEST_ROWS = 0.05  # the KL is drawn up to the position that this share of rows reaches
KL_BINS = 32


def draw(out: Path, path: Path) -> None:
    """Draw the figure of an output file.

    Raises:
        UserError: matplotlib is missing, or the figure cannot be written.
    """
    require("matplotlib")
    summary = summarize(out)
    names = read_metadata(out)["names"]
    columns = [f"{head}_{name}" for name in names for head in ("score", "reference")]
    rows = pq.read_table(out, columns=columns)
    figure = new_figure(11, 3.6)
    scores, binding, kl = figure.subplots(1, 3)
    _draw_scores(scores, rows, names)
    _draw_binding(binding, summary)
    _draw_kl(kl, out, summary)
    save_figure(figure, path)


def _draw_scores(axes: Any, rows: pa.Table, names: list[str]) -> None:
    centred = {
        name: rows[f"score_{name}"].to_numpy() - rows[f"reference_{name}"].to_numpy() for name in names
    }
    centred = {name: values[np.isfinite(values)] for name, values in centred.items()}
    everything = np.concatenate(list(centred.values()))
    bins = np.histogram_bin_edges(everything, bins="auto") if everything.size else np.linspace(-1, 1, 11)
    # A few far values must not squeeze the rest into two bins, nor make thousands.
    bins = np.linspace(bins[0], bins[-1], min(max(len(bins), 20), 80))
    for k, (name, values) in enumerate(centred.items()):
        axes.hist(values, bins=bins, histtype="step", linewidth=1.6, label=name, **line_style(k))
    # The legend stands above bars and line.
    below = 1 - min(0.05 + 0.08 * len(centred), 0.6)
    axes.set_ylim(0, axes.get_ylim()[1] / below)
    axes.axvline(0, ymax=below, color="black", linewidth=0.8)
    axes.set(xlabel="score minus reference reward", ylabel="rows", title="Scores against the reference")
    axes.legend(frameon=False, loc="upper left")


def _draw_binding(axes: Any, summary: ScoreSummary) -> None:
    shown = ("share_above", "marginal_utility", "binds")
    labels = ("rows above\nthe reference", "marginal utility\n(mean slope)", "rows where\nit binds")
    places = np.arange(len(shown))
    height = 0.8 / len(summary.properties)
    for k, one in enumerate(summary.properties):
        offset = (k - (len(summary.properties) - 1) / 2) * height
        values = [getattr(one, name) for name in shown]
        bars = axes.barh(places + offset, values, height=0.92 * height, label=one.name, **bar_style(k))
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="share of rows, or slope", title="Which property binds")
    axes.legend(frameon=False)


def _draw_kl(axes: Any, out: Path, summary: ScoreSummary) -> None:
    counts, sums = kl_by_position(out)
    reach = max(1, int(np.count_nonzero(counts >= FEWEST_ROWS * counts[0])))
    edges = np.unique(np.linspace(0, reach, KL_BINS + 1).round().astype(int))
    means = np.add.reduceat(sums[:reach], edges[:-1]) / np.add.reduceat(counts[:reach], edges[:-1])
    # Tokens are counted from 1: a bin over positions a to b-1 has its middle at (a + b + 1) / 2.
    axes.plot((edges[:-1] + edges[1:] + 1) / 2, means, color=COLOURS[0], linewidth=1.6, marker=".")
    axes.axhline(
        summary.kl_per_token, color="black", linewidth=0.8, linestyle="--", label="mean of all tokens"
    )
    axes.set_ylim(*_room(np.append(means, summary.kl_per_token)))
    axes.set(xlabel="response token", ylabel=f"mean KL ({summary.kl_kind})", title="KL along the response")
    axes.legend(frameon=False)


def _room(values: np.ndarray) -> tuple[float, float]:
    """Limits from zero, with room above for the legend; signed kinds of KL reach below it."""
    known = np.append(values[np.isfinite(values)], 0.0)
    low, high = float(known.min()), float(known.max())
    return low, high + 0.25 * (high - low or 1.0)
