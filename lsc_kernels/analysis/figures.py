"""Figures of results. What draws one panel draws it into axes it is given, so that reports can put panels together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lsc_kernels.analysis.diagnose import SATURATED
from lsc_kernels.plotting import COLOURS, bar_style, line_style, new_figure

if TYPE_CHECKING:
    from lsc_kernels.analysis.diagnose import Diagnosis
    from lsc_kernels.analysis.frontier import Frontier
    from lsc_kernels.analysis.tilt import Tilt

FAR = 0.002  # share of the samples on either side that the histograms leave out
BINS = 50
MARKERS = "os^Dvxp"  # with the colours, one for each of 32 properties
ROOMY = 4  # properties of which a panel holds the bars at its usual height
CROWDED = 16  # more have no numbers beside their bars


def diagnosis_figure(found: Diagnosis) -> Any:
    """z, pull, correlation."""
    extra = extra_height(len(found.properties))  # the matrix grows both ways
    figure = new_figure(14 + extra, 3.6 + extra)
    margins, pull, together = figure.subplots(1, 3, width_ratios=(1.2, 1, 0.8 + 0.3 * extra))
    draw_margins(margins, found)
    draw_pull(pull, found)
    draw_correlation(together, found)
    return _open(figure)


def frontier_figure(found: Frontier) -> Any:
    """P(all good) of every method; single properties of the first two."""
    figure = new_figure(11, 3.8 + extra_height(len(found.names)))
    everything, single = figure.subplots(1, 2)
    draw_frontier(everything, found)
    draw_properties(single, found)
    return _open(figure)


def tilt_figure(found: Tilt) -> Any:
    """Utilities before and after; P(good) beside best-of-n."""
    figure = new_figure(11, 3.6)
    utilities, good = figure.subplots(1, 2)
    _draw_utilities(utilities, found)
    _draw_best_of(good, found)
    return _open(figure)


def extra_height(properties: int) -> float:
    """Inches by which a row of panels grows with what it shows."""
    return 0.5 * (min(max(properties, ROOMY), CROWDED) - ROOMY)


def draw_margins(axes: Any, found: Diagnosis) -> None:
    """How far the scores are from their references, with the zones where LSC is steep and flat."""
    z = found.z.numpy()
    finite = z[np.isfinite(z)]
    low, high = np.quantile(finite, [FAR, 1 - FAR]) if finite.size else (-1.0, 1.0)
    low, high = min(low, -1.0), max(high, 1.0)
    bins = np.linspace(low, high, BINS + 1)
    for k, one in enumerate(found.properties):
        values = z[:, k][np.isfinite(z[:, k])]
        weights = np.full(len(values), 1 / max(1, len(values)))
        axes.hist(
            values,
            bins=bins,
            weights=weights,
            histtype="step",
            linewidth=1.6,
            label=one.name,
            **line_style(k),
        )
    axes.axvline(0, color="black", linewidth=0.8)
    if high > SATURATED:
        axes.axvspan(SATURATED, high, color="0.9", zorder=0)
        axes.text(
            high, 0.99, "saturated ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=8
        )
    axes.set_xlim(low, high)
    axes.locator_params(axis="x", nbins=6)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set(
        xlabel="z = (score - reference) / scale", ylabel="share of samples", title="Scores and references"
    )
    _legend(axes)


def draw_pull(axes: Any, found: Diagnosis) -> None:
    """Which property pulls, and on how many samples."""
    labels = ("P(good)", "mean slope\nin z", "samples where\nit binds", "uniformity\nof the slope")
    places = np.arange(len(labels))
    height = 0.8 / len(found.properties)
    for k, one in enumerate(found.properties):
        values = [one.p_good, one.marginal_utility, one.binds, one.gain_uniformity]
        at = places + (k - (len(found.properties) - 1) / 2) * height
        bars = axes.barh(at, values, height=0.92 * height, label=one.name, **bar_style(k))
        if len(found.properties) <= CROWDED:
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=6.5)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xticks(np.linspace(0, 1, 5))
    axes.set(xlim=(0, 1.15), xlabel="share, probability or slope", title="Which property pulls")
    _legend(axes)


def draw_correlation(axes: Any, found: Diagnosis) -> None:
    """Rank correlations as a matrix of numbers on grey; names stand once, or long ones would take all the room."""
    correlation = np.array(found.dependence.correlation)
    names = [one.name for one in found.properties]
    axes.imshow(np.abs(correlation), cmap="Greys", vmin=0, vmax=1.6)
    if len(names) <= CROWDED:
        for i, row in enumerate(correlation):
            for j, value in enumerate(row):
                text = f"{value:.2f}".replace("-0.00", "0.00")
                axes.text(j, i, text, ha="center", va="center", fontsize=9 if len(names) <= ROOMY else 7)
    axes.set_xticks(range(len(names)), range(1, len(names) + 1))
    axes.set_yticks(range(len(names)), [f"{name} ({k})" for k, name in enumerate(names, 1)])
    axes.set_title("Rank correlation of z")


def draw_frontier(axes: Any, found: Frontier, budget: float | None = None) -> None:
    """P(all good) over KL; bands of two standard errors."""
    for number, method in enumerate(found.methods):
        points = found.of(method)
        kl, p, error = (
            np.array([getattr(point, name) for point in points]) for name in ("kl", "p_all", "p_all_error")
        )
        style = line_style(number)
        axes.plot(kl, p, label=method, linewidth=1.6, marker=".", markersize=4, **style)
        low, high = np.clip([p - 2 * error, p + 2 * error], 0, 1)
        axes.fill_between(kl, low, high, color=style["color"], alpha=0.12, linewidth=0)
    _mark_budget(axes, budget)
    axes.set_xlim(left=0)
    axes.set(
        xlabel="KL from the base policy (nats)",
        ylabel="P(all good)",
        title="What each reward buys (bands: 2 s.e.)",
    )
    _legend(axes)


def draw_properties(axes: Any, found: Frontier, budget: float | None = None) -> None:
    """P(good) of single properties over KL, for the first two methods: dashed and solid."""
    methods = found.methods[:2]
    for k, name in enumerate(found.names):
        style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "markersize": 3}
        for line, method in zip(("--", "-"), methods, strict=False):
            points = found.of(method)
            axes.plot(
                [point.kl for point in points],
                [point.p_good[k] for point in points],
                linestyle=line,
                linewidth=1.4,
                **style,
            )
        axes.plot([], [], linestyle="", label=name, **style)
    for line, method in zip(("--", "-"), methods, strict=False):
        axes.plot([], [], color="0.3", linestyle=line, linewidth=1.4, label=method)
    _mark_budget(axes, budget)
    axes.set_xlim(left=0)
    axes.set(xlabel="KL from the base policy (nats)", ylabel="P(good)", title="Property by property")
    _legend(axes)


def _mark_budget(axes: Any, budget: float | None) -> None:
    if budget is not None:
        axes.axvline(budget, color="black", linewidth=0.8, linestyle=(0, (1, 2)))


def _draw_utilities(axes: Any, found: Tilt) -> None:
    values, weights = found.utilities.double().numpy().ravel(), found.weights.numpy().ravel()
    known = np.isfinite(values)
    values, weights = values[known], weights[known]
    bins = np.linspace(np.quantile(values, FAR), values.max(), BINS + 1)
    uniform = np.full(len(values), 1 / len(values))
    for number, (label, share) in enumerate((("base policy", uniform), ("tilted", weights / weights.sum()))):
        axes.hist(
            values,
            bins=bins,
            weights=share,
            histtype="step",
            linewidth=1.6,
            label=label,
            **line_style(number),
        )
    title = f"KL {found.kl:.3g} nats, {found.effective_samples:.3g} of {found.samples:.4g} samples carry it"
    axes.set(xlabel="utility", ylabel="share of samples", title=title)
    axes.title.set_fontsize(10)
    _legend(axes)


def _draw_best_of(axes: Any, found: Tilt) -> None:
    """Win rate and P(good) over KL: the tilt as a large mark, best-of-n as a curve."""
    kl = [0.0, *(one.kl for one in found.best_of)]
    curves = [
        ("win rate", [0.5, *(one.win_rate for one in found.best_of)], found.win_rate, found.win_rate_error)
    ]
    curves += [
        (
            f"P({name})",
            [found.base_p_good[k], *(one.p_good[k] for one in found.best_of)],
            found.p_good[k],
            found.p_good_error[k],
        )
        for k, name in enumerate(found.names)
    ]
    for number, (label, best, at, error) in enumerate(curves):
        style = line_style(number)
        axes.plot(kl, best, linewidth=1.4, marker=".", label=f"{label}, best of n", **style)
        axes.errorbar(found.kl, at, yerr=2 * error, fmt="D", markersize=5, capsize=2, color=style["color"])
    axes.set_xlim(left=0)
    axes.set(xlabel="KL from the base policy (nats)", ylabel="rate", title="Tilt (diamond) beside best-of-n")
    _legend(axes)


def _legend(axes: Any) -> None:
    """Beside the axes, where it hides nothing."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _open(figure: Any) -> Any:
    """Without the upper and right edge of its axes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure
