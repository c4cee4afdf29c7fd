"""The demo's figure: what LSC-AND ranks first and what the raw sum does; times with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .chain import SCALES
from .data import PROPERTIES
from .findings import Findings
from .speed import COMPILED, EAGER, OURS, Cell, Shape

# Okabe and Ito's colours, told apart by colour-blind readers; markers and hatches tell them apart in grey.
GOOD, FAILING, RAW = "#0072B2", "#D55E00", "#555555"
WAYS = {EAGER: ("#BBBBBB", "///"), COMPILED: ("#E69F00", "..."), OURS: ("#0072B2", "")}


def draw(path: Path, found: Findings, cells: Sequence[Cell], shape: Shape) -> None:
    """Draw both halves into one file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing global changes and no display is looked for.
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_margins(left, found)
    _draw_times(right, [cell for cell in cells if cell.device == cells[-1].device], shape)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=180)


def _draw_margins(axes: Any, found: Findings) -> None:
    z = found.margins
    low, high = z.min(axis=0), z.max(axis=0)
    span = high - low
    low, high = low - span * (0.05, 0.2), high + span * (0.1, 0.12)  # the legend stands below the points
    x, y = np.meshgrid(*np.linspace(low, high, 300).T)
    probability = np.exp(-np.logaddexp(0, -x) - np.logaddexp(0, -y))
    levels = [0.001, 0.01, 0.1, 0.5, 0.9]
    curves = axes.contour(x, y, probability, levels, colors=GOOD, linewidths=1.1)
    # Each label on the upright part of its curve, near the top.
    places = [(np.log(p / (1 - p)), high[1] - 0.04 * span[1]) for p in levels]
    labels = axes.clabel(curves, fmt=lambda p: f"{100 * p:g}%", fontsize=8, manual=places)
    for label in labels:
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
        label.set_rotation(90)
    a, b = (SCALES[name] for name in PROPERTIES)
    sums = np.linspace(a * low[0] + b * low[1], a * high[0] + b * high[1], 10)
    axes.contour(x, y, a * x + b * y, sums, colors=RAW, linewidths=0.6, linestyles="--")
    failing = found.failing
    for which, colour, marker, label in (
        (~failing, GOOD, "o", "fair to both judges"),
        (failing, FAILING, "x", "a judge's grade is 0 or 1 of 5"),
    ):
        axes.scatter(*z[which].T, s=22, marker=marker, color=colour, linewidths=1, label=label, zorder=3)
    case = found.fooled()
    if case is not None:
        for row, text in zip(case.rows, (f"{case.rule}'s first", "LSC-AND's first"), strict=True):
            axes.scatter(*z[row], s=130, facecolors="none", edgecolors="black", linewidths=1.4, zorder=4)
            axes.annotate(
                text,
                z[row],
                xytext=(0, 10),
                textcoords="offset points",
                ha="right" if z[row, 0] > high[0] - 0.25 * span[0] else "center",
                fontsize=9,
                zorder=5,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            )
    axes.plot([], [], color=GOOD, linewidth=1, label="equal LSC-AND: P(good in both)")
    axes.plot([], [], color=RAW, linewidth=0.8, linestyle="--", label="equal raw sum")
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for name, label in zip(PROPERTIES, (axes.set_xlabel, axes.set_ylabel), strict=True):
        unit = "" if SCALES[name] == 1 else f" / {SCALES[name]:g}"
        label(f"{name}: (score - reference reward){unit}")
    axes.set_title("A sum lets one property pay for the other; AND does not", fontsize=11)
    axes.legend(loc="lower left", fontsize=8, ncols=2, framealpha=0.9)


def _draw_times(axes: Any, cells: Sequence[Cell], shape: Shape) -> None:
    settings = list(dict.fromkeys((cell.kind, cell.dtype) for cell in cells))
    ways = [way for way in WAYS if any(cell.way == way for cell in cells)]
    height = 0.8 / len(ways)
    for cell in cells:
        at = settings.index((cell.kind, cell.dtype)) + (ways.index(cell.way) - (len(ways) - 1) / 2) * height
        colour, hatch = WAYS[cell.way]
        if cell.problem:
            axes.text(0, at, f" {cell.problem}", va="center", fontsize=8)
            continue
        time = 1e3 * cell.forward_backward
        axes.barh(at, time, height * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
        axes.barh(at, time, height * 0.92, color="none", edgecolor="black", linewidth=0.6)
        axes.text(time, at, f" {time:.1f} ms, error {cell.error:.0e}", va="center", fontsize=8)
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=WAYS[way][0], hatch=WAYS[way][1], edgecolor="black", label=way) for way in ways
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=8)
    axes.set_yticks(range(len(settings)), [f"{kind} KL\n{dtype}" for kind, dtype in settings])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45e3 * max(cell.forward_backward for cell in cells if not cell.problem))
    axes.set_xlabel(
        f"forward + backward, ms ({shape.rows} tokens, vocabulary {shape.vocab}, {cells[0].device})"
    )
    axes.set_title("KL of nearly equal policies: time, and error against fp64", fontsize=11)
