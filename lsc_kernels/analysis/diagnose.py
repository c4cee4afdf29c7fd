"""What references, scales and weights make of the scores at hand: which property pulls, where, and how evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.analysis.operands import names_of, spread
from lsc_kernels.analysis.report import Report, percent, rich_table
from lsc_kernels.ops import _checks
from lsc_kernels.ops.lsc_transform import lsc_transform

SATURATED = 4.0  # from there on the slope is below 0.018
EPS = 1e-4  # what group z-scores add to the standard deviation
ONE_JUDGEMENT = 0.8  # rank correlation from which two properties are nearly the same judgement
CONFLICT = -0.3


@dataclass(frozen=True)
class PropertyDiagnosis(Report):
    """One property, over the samples that have a score of it; z = (score - reference) / scale.

    Attributes:
        name: the property.
        samples, missing: how many samples have a score, and how many have none.
        mean_z, median_z: of z.
        underfit: share with z < 0: below the reference.
        saturated: share with z > 4, where the slope is below 0.018.
        p_good: mean probability of being good, f + (1 - f) sigmoid(z).
        marginal_utility: mean slope of the utility in z, sigmoid(-z) where the floor is 0: 1 far below the reference, 0
            far above.
        binds: share of samples where this property's weighted slope is the largest: the one worth improving there.
        gain_uniformity: how evenly the slope is shared by the samples, (sum s)^2 / (n sum s^2): 1 when all pull alike,
            0.1 when a tenth of them does all the pulling.
    """

    name: str
    samples: int
    missing: int
    mean_z: float
    median_z: float
    underfit: float
    saturated: float
    p_good: float
    marginal_utility: float
    binds: float
    gain_uniformity: float

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True)
class Dependence(Report):
    """How the properties go together, over the samples that have all scores.

    AND multiplies: it takes the judgements of one output as independent. One score per judgement cannot show whether
    they are; what it shows is whether properties rise and fall together from output to output. Nearly the same ranking
    means nearly the same judgement, which the product counts twice.

    Attributes:
        correlation: rank correlation (Spearman) of z, [K][K].
        joint: mean of the product of the P(good), what AND reports.
        product: product of the means: the joint if properties did not go together from output to output.
        weakest: mean of the smallest P(good): the joint if the judgements of an output were one.
        all_above, all_above_if_independent: share of samples with every z > 0, and the product of the shares.
    """

    correlation: tuple[tuple[float, ...], ...]
    joint: float
    product: float
    weakest: float
    all_above: float
    all_above_if_independent: float


@dataclass(frozen=True)
class GroupEffect(Report):
    """What dividing by each group's standard deviation (GRPO) would make of the utility.

    Attributes:
        groups: those with two samples or more.
        alone: samples that are alone in their group, and left out.
        correlation: mean over groups of the correlation between the group's utilities and its sums of z, which is
            that of their z-scores: 1 means that within groups LSC is undone.
        saturated: share of groups in which every sample has every z > 4: nothing left to gain.
        saturated_share: their share of the sum of |advantage| with utilities that are only centred.
        saturated_share_zscored: the same after division by the standard deviation.
        eps_decides: share of groups whose standard deviation is below 1e-4, the constant in the denominator.
    """

    groups: int
    alone: int
    correlation: float
    saturated: float
    saturated_share: float
    saturated_share_zscored: float
    eps_decides: float


@dataclass(frozen=True)
class Diagnosis(Report):
    """What :func:`diagnose` finds; ``findings()`` says it in sentences."""

    properties: tuple[PropertyDiagnosis, ...]
    dependence: Dependence
    group: GroupEffect | None
    z: Tensor = field(repr=False, compare=False)

    def table(self) -> Any:
        """One row per property, for the terminal.

        Raises:
            MissingExtra: rich is not installed.
        """
        headings = ["property", "mean z", "z < 0", "z > 4", "P(good)", "slope", "binds", "uniformity"]
        rows = [
            [
                one.name,
                f"{one.mean_z:.2f}",
                f"{one.underfit:.1%}",
                f"{one.saturated:.1%}",
                percent(one.p_good),
                f"{one.marginal_utility:.3f}",
                f"{one.binds:.1%}",
                f"{one.gain_uniformity:.2f}",
            ]
            for one in self.properties
        ]
        return rich_table(f"{len(self.z)} samples", headings, rows)

    def findings(self) -> list[str]:
        """What is worth knowing, in sentences."""
        return [*_pull(self), *_together(self), *_grouped(self.group)]

    def figure(self) -> Any:
        """z of every property, which of them pulls, and how they go together. A matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from lsc_kernels.analysis.figures import diagnosis_figure

        return diagnosis_figure(self)


def diagnose(
    scores: Tensor,
    reference_reward: float | Tensor,
    *,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
    group: Tensor | int | None = None,
) -> Diagnosis:
    """What references, scales and weights make of scores: per property, together, and within groups.

    Args:
        scores: [N, K], NaN where one is missing; any floating dtype, computed in fp64.
        reference_reward: broadcasts against ``scores``, as ``weights``, ``scale`` and ``floor`` do.
        names: K names.
        weights: the exponents of the AND, >= 0.
        scale, floor: as in ``lk.lsc_transform``.
        group: which samples answer the same prompt: ids [N], or the size of consecutive groups. None: no word on
            group z-scores.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: shapes that do not fit, a property without scores, a scale or floor out of range.

    Example:
        >>> import torch
        >>> from lsc_kernels.analysis import diagnose
        >>> scores = torch.tensor([[5.0, -1.0], [6.0, 0.5], [7.0, -3.0], [8.0, 1.0]])
        >>> found = diagnose(scores, 0.0, names=["helpful", "harmless"], group=2)
        >>> [(one.name, one.saturated, one.binds) for one in found.properties]
        [('helpful', 1.0, 0.0), ('harmless', 0.0, 1.0)]
    """
    _checks.floating("scores", scores)
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [N, K], not empty; got {list(scores.shape)}")
    names = names_of(names, scores.shape[1])
    score = scores.detach().to("cpu", torch.float64)
    reference = spread("reference_reward", reference_reward, score)
    weight, scale, floor = (
        spread(name, value, score)
        for name, value in (("weights", weights), ("scale", scale), ("floor", floor))
    )
    z = (score - reference) / scale
    for k, name in enumerate(names):
        if z[:, k].isnan().all():
            raise ValueError(f"scores: property {name!r} has none")
    leaf = score.clone().requires_grad_()
    utility = lsc_transform(leaf, reference, scale=scale, floor=floor)
    (slope,) = torch.autograd.grad(utility.sum(), leaf)
    slope = torch.where(z.isnan(), math.nan, slope * scale)
    utility = utility.detach()
    pull = (weight * slope).nan_to_num(nan=-math.inf)
    whole = ~z.isnan().any(1)
    binding = pull[whole].argmax(1)
    properties = tuple(
        _property(name, z[:, k], utility[:, k], slope[:, k], binding == k) for k, name in enumerate(names)
    )
    effect = None
    if group is not None:
        ids = _group_ids(group, len(z))
        effect = _group_effect(
            z[whole], (weight * utility).sum(1)[whole], (weight * z).sum(1)[whole], ids[whole]
        )
    return Diagnosis(properties, _dependence(z[whole], utility[whole].exp()), effect, z)


def _property(name: str, z: Tensor, utility: Tensor, slope: Tensor, binds: Tensor) -> PropertyDiagnosis:
    there = ~z.isnan()
    z, utility, slope = z[there], utility[there], slope[there]
    square = slope.square().sum()
    return PropertyDiagnosis(
        name=name,
        samples=len(z),
        missing=int((~there).sum()),
        mean_z=z.mean().item(),
        median_z=z.quantile(0.5).item() if len(z) < 2**24 else z.median().item(),
        underfit=(z < 0).double().mean().item(),
        saturated=(z > SATURATED).double().mean().item(),
        p_good=utility.exp().mean().item(),
        marginal_utility=slope.mean().item(),
        binds=binds.double().mean().item(),
        gain_uniformity=(slope.sum().square() / (len(slope) * square)).item() if square > 0 else math.nan,
    )


def _dependence(z: Tensor, p: Tensor) -> Dependence:
    above = (z > 0).double()
    return Dependence(
        correlation=tuple(tuple(row) for row in rank_correlation(z).tolist()),
        joint=p.prod(1).mean().item(),
        product=p.mean(0).prod().item(),
        weakest=p.amin(1).mean().item() if len(p) else math.nan,
        all_above=above.prod(1).mean().item(),
        all_above_if_independent=above.mean(0).prod().item(),
    )


def rank_correlation(z: Tensor) -> Tensor:
    """Spearman's correlation of the columns of [N, K], ties at the middle of their ranks; 0 for a constant column."""
    columns = z.T.contiguous()
    ordered = columns.sort(-1).values
    ranks = torch.searchsorted(ordered, columns) + torch.searchsorted(ordered, columns, right=True)
    centred = ranks.double() - ranks.double().mean(-1, keepdim=True)
    length = centred.norm(dim=-1)
    unit = torch.where(length > 0, 1 / length, 0.0)[:, None] * centred
    return (unit @ unit.T).fill_diagonal_(1.0).clamp(-1, 1)


def _group_ids(group: Tensor | int, samples: int) -> Tensor:
    if isinstance(group, int) and not isinstance(group, bool):
        if group < 1 or samples % group:
            raise ValueError(f"group must divide the {samples} samples; got {group}")
        return torch.arange(samples) // group
    ids = _checks.integer("group", group)
    if ids.shape != (samples,):
        raise ValueError(f"group must be ids [{samples}], one per sample; got {list(ids.shape)}")
    return ids.cpu().unique(return_inverse=True)[1]


def _group_effect(z: Tensor, utility: Tensor, total: Tensor, ids: Tensor) -> GroupEffect:
    sizes = torch.bincount(ids)
    kept = sizes[ids] > 1 if len(ids) else torch.zeros(0, dtype=torch.bool)
    alone = len(ids) - int(kept.sum())
    ids = ids[kept].unique(return_inverse=True)[1]
    if not len(ids):
        return GroupEffect(0, alone, *[math.nan] * 5)
    sizes = torch.bincount(ids).double()

    def mean(values: Tensor) -> Tensor:
        """Of every group."""
        return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, ids, values) / sizes

    u = utility[kept] - mean(utility[kept])[ids]
    t = total[kept] - mean(total[kept])[ids]
    std = (mean(u.square()) * sizes / (sizes - 1)).sqrt()
    together = mean(u * t) / (mean(u.square()) * mean(t.square())).sqrt()
    saturated = mean((z[kept] > SATURATED).all(1).double()) == 1
    zscored = u / (std[ids] + EPS)
    return GroupEffect(
        groups=len(sizes),
        alone=alone,
        correlation=together[together.isfinite()].mean().item(),
        saturated=saturated.double().mean().item(),
        saturated_share=_share(u.abs(), saturated[ids]),
        saturated_share_zscored=_share(zscored.abs(), saturated[ids]),
        eps_decides=(std < EPS).double().mean().item(),
    )


def _share(values: Tensor, where: Tensor) -> float:
    return (values[where].sum() / values.sum()).item() if values.sum() > 0 else math.nan


def _pull(found: Diagnosis) -> list[str]:
    """Which property pulls, and which cannot."""
    told = []
    most = max(found.properties, key=lambda one: one.binds)
    if len(found.properties) > 1:
        told.append(f"{most.name} binds on {most.binds:.0%} of the samples: the utility asks for it first")
    for one in found.properties:
        if one.saturated > 0.5:
            told.append(
                f"{one.name} is saturated on {one.saturated:.0%} of the samples and pulls little: raise its reference "
                "or its scale if more of it is wanted"
            )
        if one.underfit > 0.95:
            told.append(
                f"{one.name} is below its reference on {one.underfit:.0%} of the samples: there LSC is the raw reward; "
                "lower the reference if what is there is good enough"
            )
        if one.missing:
            told.append(f"{one.name} has no score on {one.missing} samples")
    return told


def _together(found: Diagnosis) -> list[str]:
    """Pairs of properties that are one judgement, or at odds."""
    told = []
    names = [one.name for one in found.properties]
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            r = found.dependence.correlation[i][j]
            if r > ONE_JUDGEMENT:
                told.append(
                    f"{one} and {names[j]} rank alike (correlation {r:.2f}), nearly one judgement that AND counts "
                    f"twice: use weakest({one}, {names[j]}), or weights of 1/2"
                )
            elif r < CONFLICT:
                told.append(f"{one} and {names[j]} are at odds (correlation {r:.2f}): expect a trade-off")
    if len(names) > 1:
        d = found.dependence
        told.append(
            f"P(all good) is {percent(d.joint)}; {percent(d.product)} if the properties did not go together from "
            f"sample to sample, {percent(d.weakest)} if they were one judgement"
        )
    return told


def _grouped(effect: GroupEffect | None) -> list[str]:
    """What a z-score within groups would do."""
    if effect is None or not effect.groups:
        return []
    told = [
        f"within groups, utility and raw sum correlate {effect.correlation:.2f}: a group z-score keeps that much of "
        "the raw reward's order and none of LSC's size"
    ]
    if effect.saturated > 0:
        told.append(
            f"{effect.saturated:.0%} of the groups have nothing left to gain; they carry "
            f"{effect.saturated_share:.1%} of the advantages as LSC gives them, "
            f"{effect.saturated_share_zscored:.1%} after a group z-score"
        )
    if effect.eps_decides > 0:
        told.append(
            f"in {effect.eps_decides:.0%} of the groups the standard deviation is below {EPS:g}: there the constant in "
            "the denominator decides"
        )
    return told
