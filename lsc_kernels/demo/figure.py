"""The demo's figure: what LSC-AND ranks first and what a sum does; times with their errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .chain import SCALES
from .data import PROPERTIES
from .findings import FAILING_GRADE, Findings, Fooled
from .speed import COMPILED, EAGER, OURS, Cell, Shape

# Okabe and Ito's colours, told apart by colour-blind readers; markers and hatches tell them apart in grey.
GOOD, FAILING, RAW = "#0072B2", "#D55E00", "#555555"
WAYS = {EAGER: ("#BBBBBB", "///"), COMPILED: ("#E69F00", "..."), OURS: ("#0072B2", "")}


def draw(path: Path, found: Findings, cells: Sequence[Cell], shape: Shape) -> None:
    """Draw both halves into one file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: nothing global changes and no display is looked for.
    figure = Figure(figsize=(12.5, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    case = found.fooled()
    lines = _draw_margins(left, found, case)
    _draw_times(right, [cell for cell in cells if cell.device == cells[-1].device], shape)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if case is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # everything else has its place now, and keeps it
        _note_firsts(left, found, case, lines)
    figure.savefig(path, dpi=180)


def _draw_margins(axes: Any, found: Findings, case: Fooled | None) -> np.ndarray:
    """Draw the answers; returns the lines [points, 2] that a note should not cover."""
    z = found.margins
    low, high = z.min(axis=0), z.max(axis=0)
    span = high - low
    low, high = low - 0.06 * span, high + 0.08 * span
    x, y = np.meshgrid(*np.linspace(low, high, 400).T)
    probability = np.exp(_log_and(x, y))
    levels = [0.001, 0.01, 0.1, 0.5, 0.9]
    axes.contour(x, y, probability, levels, colors=GOOD, linewidths=0.7, alpha=0.5)
    for level in levels:  # each labelled where it leaves the axes at the top
        there = level * (1 + np.exp(-high[1]))
        if there < 1 and low[0] < (at := np.log(there / (1 - there))) < high[0]:
            label = f"{100 * level:g}%"
            axes.text(
                at, 1.01, label, transform=axes.get_xaxis_transform(), ha="center", fontsize=8, color=GOOD
            )
    shown = np.ones(len(z), dtype=bool)
    if case is not None:
        shown = np.array([r.prompt == found.responses[case.rows[0]].prompt for r in found.responses])
    request = "" if case is None else " (full colour: answers to one request)"
    failing = found.failing
    for which, colour, marker, label in (
        (~failing, GOOD, "o", f"passes both judges{request}"),
        (failing, FAILING, "x", f"fails one: grade 0 or {FAILING_GRADE} of 5"),
    ):
        drawn, pale = z[which & shown].T, z[which & ~shown].T
        axes.scatter(*drawn, s=34, marker=marker, color=colour, linewidths=1.6, label=label, zorder=4)
        axes.scatter(*pale, s=14, marker=marker, color=colour, linewidths=0.8, alpha=0.25, zorder=2)
    axes.plot([], [], color=GOOD, linewidth=0.7, alpha=0.7, label="LSC-AND: P(good in both), in %")
    lines = np.empty((0, 2)) if case is None else _draw_fooled(axes, x, y, z[case.rows[1]], case)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for name, set_label in zip(PROPERTIES, (axes.set_xlabel, axes.set_ylabel), strict=True):
        unit = "" if SCALES[name] == 1 else f" / {SCALES[name]:g}"
        set_label(f"{name}: (score - reference reward){unit}")
    axes.set_title("A sum lets one property pay for the other; AND does not", fontsize=11, pad=18)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=8, ncols=2, frameon=False)
    return lines


def _draw_fooled(axes: Any, x: np.ndarray, y: np.ndarray, best: np.ndarray, case: Fooled) -> np.ndarray:
    """What the sum and what LSC-AND rank as high as ``best``, LSC-AND's first, and between the two what fools the sum.

    Returns both lines, [points, 2].
    """
    level = np.exp(_log_and(*best))
    gain = case.slopes[0] * (x - best[0]) + case.slopes[1] * (y - best[1])
    probability = np.exp(_log_and(x, y))
    lines = (
        axes.contour(x, y, probability, [level], colors=GOOD, linewidths=1.8),
        axes.contour(x, y, gain, [0.0], colors=RAW, linewidths=1.4, linestyles="--"),
    )
    preferred = ((gain > 0) & (probability < level)).astype(float)
    axes.contourf(x, y, preferred, [0.5, 1.5], colors=FAILING, alpha=0.13)
    axes.plot([], [], color=GOOD, linewidth=1.8, label="as good in both as LSC-AND's first")
    axes.plot([], [], color=RAW, linewidth=1.4, linestyle="--", label=f"the same {case.rule}")
    axes.fill(
        [], [], color=FAILING, alpha=0.13, linewidth=0, label="a higher sum, but less probably good in both"
    )
    return np.concatenate([path.vertices[::4] for line in lines for path in line.get_paths()])


def _note_firsts(axes: Any, found: Findings, case: Fooled, lines: np.ndarray) -> None:
    """Circle what the sum and LSC-AND rank first, and say what each counts, beside the points."""
    from matplotlib.text import Text

    z = found.margins
    to_axes = axes.transData + axes.transAxes.inverted()
    targets, lines = to_axes.transform(z), to_axes.transform(lines)
    taken, notes = targets, np.empty((0, 2, 2))
    for row, rule in zip(case.rows, (f"the {case.rule}", "LSC-AND"), strict=True):
        axes.scatter(*z[row], s=150, facecolors="none", edgecolors="black", linewidths=1.5, zorder=5)
        note = axes.annotate(
            f"first by {rule}:\nsum {case.total[row]:+.1f}, P(good in both) {np.exp(found.utility[row]):.2g}",
            z[row],
            xytext=(0, 0),
            textcoords="axes fraction",
            fontsize=9,
            zorder=6,
            bbox={"facecolor": "white", "edgecolor": "0.6", "linewidth": 0.6, "pad": 3},
            arrowprops={"arrowstyle": "-", "linewidth": 0.8, "shrinkB": 6},
        )
        size = Text.get_window_extent(note, axes.figure.canvas.get_renderer()).size / axes.bbox.size
        corner = _free_place(size, targets[row], taken, lines, notes)
        note.set_position(tuple(corner))
        notes = np.concatenate([notes, [[corner, corner + size]]])
        covered = corner + size * _grid(np.linspace(0, 1, 9), np.linspace(0, 1, 9))
        taken = np.concatenate([taken, covered, _between(targets[row], corner + size / 2)])


def _grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All points of a grid, [points, 2]."""
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def _between(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points of a straight line, or of several that begin together, [..., points, 2]."""
    return begin + np.linspace(0, 1, 40)[:, None] * (end - begin)[..., None, :]


def _free_place(
    size: np.ndarray, target: np.ndarray, taken: np.ndarray, lines: np.ndarray, notes: np.ndarray
) -> np.ndarray:
    """The lower left corner of a box in [0, 1], near ``target``.

    It covers as little as can be of ``taken``, and the line to it of the ``notes`` that are there, [notes, (lower,
    upper), 2]; it stays away from ``lines`` where that is not far.
    """
    margin = 0.03
    corners = _grid(*(np.linspace(margin, 1 - margin - side, 40) for side in size))
    covered = _inside(taken, corners - margin, corners + size + margin)
    crossed = sum(_inside(_between(target, corners + size / 2), *note) for note in notes)
    on_lines = _inside(lines, corners, corners + size)
    away = np.linalg.norm(np.clip(target, corners, corners + size) - target, axis=1)
    best: np.ndarray = corners[np.argmin(10 * (covered + crossed) + 0.02 * on_lines + away)]
    return best


def _inside(points: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """How many of the points [..., points, 2] each box has inside."""
    within: np.ndarray = (points > lower[..., None, :]) & (points < upper[..., None, :])
    return within.all(axis=-1).sum(axis=-1)


def _log_and(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """log P(good in both) of two margins."""
    return -np.logaddexp(0, -x) - np.logaddexp(0, -y)


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
    axes.set_title("KL of nearly equal policies: time, and error against fp64", fontsize=11, pad=18)
