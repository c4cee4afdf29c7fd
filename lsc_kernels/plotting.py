"""How figures look, here and everywhere: told apart in print, by colour-blind readers, and without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lsc_kernels.errors import UserError
from lsc_kernels.extras import load

SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's colours: told apart by colour-blind readers; the line styles tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# One line and hatch fewer than colours: the two together repeat after thirty.
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\")


def line_style(number: int) -> dict[str, Any]:
    """Colour and line of the curve with this number."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of the bars with this number."""
    colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white"}


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of its own, not pyplot's: nothing global changes and no display is looked for; inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    canvas, figure = load("matplotlib.backends.backend_agg", "plot"), load("matplotlib.figure", "plot")
    made = figure.Figure(figsize=(width, height), layout="constrained")
    canvas.FigureCanvasAgg(made)
    return made


def check_figure_name(path: Path) -> None:
    """Refuse a name whose ending is no kind of figure, before anything is computed.

    Raises:
        UserError: it ends in something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: wants a name ending in {', '.join(SUFFIXES)}")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure into a file, without the upper and right edge of its axes.

    Raises:
        UserError: it cannot be written.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200)
    except OSError as problem:
        raise UserError(f"--plot {path}: cannot be written: {problem.strerror}") from problem
