"""What each way to combine rewards buys for the same KL, on samples of the base policy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.analysis.operands import names_of, spread
from lsc_kernels.analysis.report import Report, percent, rich_table
from lsc_kernels.analysis.tilt import (
    Base,
    largest_kl,
    samples_of_base,
    smallest_kl,
    solve_gamma,
    standard_error,
    tilted,
)
from lsc_kernels.extras import load
from lsc_kernels.formula import Formula
from lsc_kernels.ops import _checks
from lsc_kernels.ops.aggregate_rewards import aggregate_rewards
from lsc_kernels.ops.lsc_transform import lsc_transform
from lsc_kernels.transforms import TRANSFORMS, transform_reward

METHODS = ("raw", "lsc", "sigmoid", "zscore")
WITH_SAMPLES = ("quantile", "log_quantile", "exp_quantile")
FEWEST_EFFECTIVE = 4  # the default budgets stop where about so many samples of a prompt carry the tilt
DEFAULT_BUDGETS = 12
SIDE_BY_SIDE = 4  # methods that a terminal of 80 columns has room for


@dataclass(frozen=True)
class FrontierPoint(Report):
    """One method at one KL: means over prompts under its tilted policy.

    ``p_all`` is the expected probability of being good in the sense of all properties (or of the formula), ``p_good``
    that of each property, ``underfit`` the share of samples below each property's reference; ``*_error`` standard
    errors.
    """

    method: str
    kl: float
    gamma: float
    p_all: float
    p_all_error: float
    p_good: tuple[float, ...]
    p_good_error: tuple[float, ...]
    underfit: tuple[float, ...]
    effective_samples: float

    @property
    def label(self) -> str:
        return f"{self.method}/kl={self.kl:g}"


@dataclass(frozen=True)
class Frontier(Report):
    """Methods side by side on one KL axis.

    Attributes:
        points: one per method and KL, KL ascending; a method whose samples do not reach a KL has none there.
        base: the base policy itself, as a point at KL 0.
        samples: of a prompt, the mean over prompts.
        reach: the largest KL that so many samples can show, log n.
    """

    points: tuple[FrontierPoint, ...]
    base: FrontierPoint
    names: tuple[str, ...]
    methods: tuple[str, ...]
    prompts: int
    samples: float
    reach: float

    def of(self, method: str) -> list[FrontierPoint]:
        """The points of one method, from the base policy on."""
        return [self.base, *(point for point in self.points if point.method == method)]

    def table(self) -> Any:
        """P(all good) and the probability of the worst property, per KL and method, for the terminal.

        Raises:
            MissingExtra: rich is not installed.
        """
        budgets = sorted({point.kl for point in self.points})
        found = {(point.method, point.kl): point for point in self.points}

        def cell(point: FrontierPoint | None) -> str:
            shares = (
                (percent(share).rstrip("%") for share in (point.p_all, min(point.p_good))) if point else "-"
            )
            return " / ".join(shares)

        title = (
            f"P(all good) / P(worst property) in %, under the best policy at this KL; {self.prompts} "
            f"prompt{'s' * (self.prompts > 1)}, {self.samples:.4g} samples each"
        )
        tables = []
        for first in range(0, len(self.methods), SIDE_BY_SIDE):
            methods = self.methods[first : first + SIDE_BY_SIDE]
            rows = [["0", *[cell(self.base)] * len(methods)]]
            rows += [[f"{kl:.3g}", *(cell(found.get((method, kl))) for method in methods)] for kl in budgets]
            tables.append(rich_table("" if first else title, ["KL", *methods], rows))
        return load("rich.console", "reference").Group(*tables)

    def figure(self) -> Any:
        """P(all good) over KL for all methods; each property's for the first two. A matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from lsc_kernels.analysis.figures import frontier_figure

        return frontier_figure(self)


@dataclass(frozen=True)
class _Scored:
    """Samples [P, n] of the base policy as the judges see them."""

    there: Tensor  # [P, n]
    p_all: Tensor  # [P, n]
    p_good: Tensor  # [P, n, K]
    below: Tensor = field(repr=False)  # [P, n, K]


def frontier(
    scores: Tensor,
    reference_reward: float | Tensor,
    *,
    kl: Sequence[float] | None = None,
    methods: Sequence[str] = METHODS,
    options: Mapping[str, Mapping[str, object]] | None = None,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
    formula: Formula | str | None = None,
) -> Frontier:
    r"""For each method and KL, the policy :math:`\pi_0 e^{u / \gamma}` with that KL, and how good its samples are.

    A method's utility is :math:`u = \sum_k w_k T(r_k)`, T from ``lk.TRANSFORMS``; with ``lsc`` it is
    ``lk.aggregate_rewards``, so that a formula counts. gamma is found for each, so no method gains by the size of its
    numbers. This is the best that any training with this reward can reach at this KL, as far as the samples tell.

    All policies are judged by the same probabilities :math:`f + (1 - f)\,\sigma(z)`, from the same reward models that
    they are tilted by. What fools a reward model is not seen here, and LSC is judged by what it maximises the
    logarithm of: look at the single properties as well.

    Args:
        scores: r of samples of the base policy; [n, K] of one prompt, [P, n, K] of P prompts, NaN where a prompt has
            fewer samples. A sample with one score missing is left out.
        reference_reward: broadcasts against ``scores``, as ``weights``, ``scale`` and ``floor`` do.
        kl: KL budgets, in nats. None: from near 0 to where about four samples of a prompt carry the tilt, 5 at most.
        methods: names in ``lk.TRANSFORMS``.
        options: options of methods, by name: ``{"clip": {"low": -5.0}}``. ``reference_reward``, ``scale``, ``floor``
            are given already; ``samples`` are, for the quantile methods, those of the prompt, and for ``zscore`` and
            ``minmax`` all there are.
        names: K names.
        weights: w >= 0; the exponents in ``lsc``, the factors in the other sums.
        scale, floor: of the judgements.
        formula: which outputs count as good, as in ``lk.aggregate_rewards``; for ``lsc`` and for ``p_all``.

    Returns:
        A :class:`Frontier`. KLs beyond what the samples of a method reach are left out, and those below every
        tilt's, where some have utility -inf.

    Raises:
        TypeError, ValueError: as ``lk.aggregate_rewards`` and ``lk.transform_reward``; an unknown method; a prompt
            without samples.

    Example:
        >>> import torch
        >>> from lsc_kernels.analysis import frontier
        >>> scores = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0])
        >>> found = frontier(scores, torch.tensor([2.0, 0.5]), kl=[1.0], methods=["raw", "lsc"])
        >>> [f"{point.method}: {min(point.p_good):.2f}" for point in found.points]  # the worse property
        ['raw: 0.49', 'lsc: 0.52']
    """
    _checks.floating("scores", scores)
    if scores.dim() not in (2, 3) or scores.numel() == 0:
        raise ValueError(f"scores must be [n, K] or [P, n, K], not empty; got {list(scores.shape)}")
    if isinstance(methods, str) or not methods:
        raise ValueError(f"methods must be a sequence of names, at least one; got {methods!r}")
    for method in methods:
        if method not in TRANSFORMS:
            raise ValueError(f"methods must be among {', '.join(TRANSFORMS)}; got {method!r}")
    for method in options or {}:
        if method not in methods:
            raise ValueError(f"options: {method!r} is not among the methods, {', '.join(methods)}")
    names = names_of(names, scores.shape[-1])
    scores = scores.detach().to("cpu", torch.float64)
    given = {"reference_reward": reference_reward, "weights": weights, "scale": scale, "floor": floor}
    # in the shape of scores as [P, n, K]
    reference, factor, scale, floor = (
        spread(name, value, scores).reshape(-1, *scores.shape[-2:]) for name, value in given.items()
    )
    scores = scores.reshape(-1, *scores.shape[-2:])
    missing = scores.isnan().any(-1)
    scores = scores.masked_fill(missing[..., None], math.nan)
    shape: dict[str, Any] = {"scale": scale, "floor": floor}
    utility = aggregate_rewards(scores, reference, formula=formula, names=names, weights=factor, **shape)
    judged = _Scored(
        ~missing, utility.exp(), lsc_transform(scores, reference, **shape).exp(), scores < reference
    )
    points: list[FrontierPoint] = []
    bases = {
        method: samples_of_base(
            utility
            if method == "lsc" and not (options or {}).get("lsc")
            else _sum(scores, reference, factor, method, shape, (options or {}).get(method, {}))
        )
        for method in methods
    }
    any_base = samples_of_base(utility)
    budgets = _budgets(any_base, kl)
    for method, base in bases.items():
        least, reach = smallest_kl(base), largest_kl(base)
        gamma: float | None = None
        for budget in budgets:
            if least * (1 + 1e-6) < budget < reach * (1 - 1e-6):
                gamma = solve_gamma(base, budget, start=gamma)
                points.append(_point(base, judged, method, budget, gamma))
    return Frontier(
        points=tuple(sorted(points, key=lambda point: (point.kl, methods.index(point.method)))),
        base=_point(any_base, judged, "base", 0.0, math.inf),
        names=names,
        methods=tuple(methods),
        prompts=len(any_base.counts),
        samples=any_base.counts.mean().item(),
        reach=any_base.counts.log().mean().item(),
    )


def _sum(
    scores: Tensor,
    reference: Tensor,
    weights: Tensor,
    method: str,
    shape: Mapping[str, Tensor],
    options: Mapping[str, object],
) -> Tensor:
    """The weighted sum of transformed rewards, [P, n]."""
    known = TRANSFORMS[method].options
    total = torch.zeros(scores.shape[:-1], dtype=torch.float64)
    for k in range(scores.shape[-1]):
        given: dict[str, Any] = {
            name: shape[name][..., k] for name in ("scale", "floor") if name in known
        } | dict(options)
        score, centre = scores[..., k], reference[..., k]
        if method in WITH_SAMPLES and "samples" not in given:
            transformed = torch.full_like(score, math.nan)
            for prompt, row in enumerate(score):
                there = ~row.isnan()
                transformed[prompt, there] = transform_reward(row[there], method, samples=row[there], **given)
        elif method in ("zscore", "minmax") and "samples" not in given:
            samples = score[~score.isnan()]
            transformed = transform_reward(score, method, samples=samples, **given)
        else:
            transformed = transform_reward(score, method, reference_reward=centre, **given)
        total += weights[..., k] * transformed
    return total


def _budgets(base: Base, kl: Sequence[float] | None) -> list[float]:
    if kl is None:
        most = min(5.0, max(0.05, base.counts.log().mean().item() - math.log(FEWEST_EFFECTIVE)))
        return [most * (number / DEFAULT_BUDGETS) ** 2 for number in range(1, DEFAULT_BUDGETS + 1)]
    if isinstance(kl, str) or not isinstance(kl, Iterable):
        raise TypeError(f"kl must be a sequence of floats; got {type(kl).__name__}")
    for budget in kl:
        if _checks.number("kl", budget) <= 0:
            raise ValueError(f"kl must be > 0 nats; got {budget}")
    return sorted({float(budget) for budget in kl})


def _point(base: Base, judged: _Scored, method: str, kl: float, gamma: float) -> FrontierPoint:
    w = base.there / base.counts[:, None] if gamma == math.inf else tilted(base, gamma)[0].exp()

    def expected(values: Tensor) -> tuple[Tensor, Tensor]:
        """The mean under the tilt and its standard error."""
        values = torch.where(judged.there[..., None], values, 0.0)
        mean = (w[..., None] * values).sum(1)
        influence = (w * base.counts[:, None])[..., None] * (values - mean[:, None])
        return mean.mean(0), standard_error(base, influence)

    p_all, p_all_error = expected(judged.p_all[..., None])
    p_good, p_good_error = expected(judged.p_good)
    return FrontierPoint(
        method=method,
        kl=kl,
        gamma=gamma,
        p_all=p_all.item(),
        p_all_error=p_all_error.item(),
        p_good=tuple(p_good.tolist()),
        p_good_error=tuple(p_good_error.tolist()),
        underfit=tuple(expected(judged.below.double())[0].tolist()),
        effective_samples=(1 / w.square().sum(-1)).mean().item(),
    )
