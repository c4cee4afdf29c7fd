r"""The policy that a utility asks for, from samples of the base policy alone: no training.

Maximising E[u] - gamma KL(pi || pi_0) has the solution pi = pi_0 e^(u / gamma) / Z. Over n samples of pi_0 it is a
weight on each: w_i = e^(u_i / gamma) / sum_j e^(u_j / gamma). With v = u / gamma,

    log Z = log mean e^v          KL(pi || pi_0) = E_pi[v] - log Z          effective samples = 1 / sum w^2

are estimates. Each is a smooth function of means over the samples, so its standard error follows from the deviation
of its influence function (the delta method); with omega_i = n w_i these are

    log Z     omega - 1
    KL        omega (v - E_pi[v] - 1) + 1
    E_pi[f]   omega (f - E_pi[f])

On n samples no policy is further away than log n: near it, the estimate is of the samples and not of the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.analysis.operands import names_of
from lsc_kernels.analysis.report import Report, rich_table
from lsc_kernels.ops import _checks

MAX_STEPS = 100
TOLERANCE = 1e-12
NO_WEIGHT = -800.0  # its exponential is 0 in fp64


class Base(NamedTuple):
    """Samples of the base policy: utilities [P, n] in fp64, -inf where ``there`` is False."""

    utilities: Tensor
    there: Tensor

    @property
    def counts(self) -> Tensor:
        """How many samples each prompt has, [P], in fp64 as all that is divided by it."""
        return self.there.sum(-1).double()


@dataclass(frozen=True)
class BestOf(Report):
    """Taking the best of n samples: exactly, for draws with replacement from the samples given; means over prompts.

    ``kl`` is that of the samples, ``bound`` is log n - (n - 1) / n, the KL where no two samples tie (Beirami et al.
    2024, arXiv:2401.01879); ``p_good`` has one entry per property.
    """

    n: int
    kl: float
    bound: float
    utility: float
    win_rate: float
    p_good: tuple[float, ...]


@dataclass(frozen=True)
class Tilt(Report):
    """What a tilt of the base policy does: means over prompts. ``*_error`` is the standard error of what it is named
    after, for other samples of the same prompts.

    Attributes:
        gamma: the weight of the KL.
        kl, log_z: KL(pi || pi_0) and log E_0[e^(u / gamma)], in nats.
        effective_samples: 1 / sum of squared weights; of n samples of a prompt.
        samples: n, the mean number of samples of a prompt.
        utility, base_utility: mean utility under pi and under the base policy.
        win_rate: how often a sample of pi has a higher utility than one of the base policy; a tie counts half.
        p_good, base_p_good: expected probability of each property being good, under pi and under the base policy.
        best_of: best-of-n on the same samples, beside it.
        weights: of every sample, in the shape of the utilities; they sum to 1 for each prompt.
        utilities: the utilities they belong to.
    """

    gamma: float
    kl: float
    kl_error: float
    log_z: float
    log_z_error: float
    effective_samples: float
    samples: float
    prompts: int
    utility: float
    base_utility: float
    win_rate: float
    win_rate_error: float
    names: tuple[str, ...]
    p_good: tuple[float, ...]
    p_good_error: tuple[float, ...]
    base_p_good: tuple[float, ...]
    best_of: tuple[BestOf, ...]
    weights: Tensor = field(repr=False, compare=False)
    utilities: Tensor = field(repr=False, compare=False)

    def table(self) -> Any:
        """The tilt with best-of-n beside it, for the terminal.

        Raises:
            MissingExtra: rich is not installed.
        """
        headings = ["policy", "KL", "utility", "win rate", *(f"P({name})" for name in self.names)]
        base = [f"{0:.3f}", f"{self.base_utility:.3f}", "50.0%", *(f"{p:.1%}" for p in self.base_p_good)]
        tilted = [f"{self.kl:.3f} ± {self.kl_error:.3f}", f"{self.utility:.3f}"]
        tilted += [f"{self.win_rate:.1%} ± {self.win_rate_error:.1%}"]
        tilted += [f"{p:.1%} ± {e:.1%}" for p, e in zip(self.p_good, self.p_good_error, strict=True)]
        rows = [["base", *base], [f"gamma = {self.gamma:.4g}", *tilted]]
        for one in self.best_of:
            cells = [f"{one.kl:.3f}", f"{one.utility:.3f}", f"{one.win_rate:.1%}"]
            rows.append([f"best of {one.n}", *cells, *(f"{p:.1%}" for p in one.p_good)])
        title = (
            f"{self.prompts} prompt{'s' * (self.prompts > 1)}, {self.samples:.4g} samples each, of which "
            f"{self.effective_samples:.3g} carry the tilt; ± one standard error"
        )
        return rich_table(title, headings, rows)

    def figure(self) -> Any:
        """Utilities under the base policy and the tilted one; P(good) beside best-of-n. A matplotlib figure.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from lsc_kernels.analysis.figures import tilt_figure

        return tilt_figure(self)


def tilt(
    utilities: Tensor,
    gamma: float,
    *,
    p_good: Tensor | None = None,
    names: Sequence[str] | None = None,
    best_of: Sequence[int] = (2, 4, 8, 16),
) -> Tilt:
    r"""The policy :math:`\pi \propto \pi_0 e^{u / \gamma}` on samples of :math:`\pi_0`, and best-of-n beside it.

    Args:
        utilities: u of samples of the base policy; [n] for one prompt, [P, n] for P prompts with n each, NaN where a
            prompt has fewer. Any floating dtype; computed in fp64.
        gamma: the weight of the KL, > 0.
        p_good: [..., K], the probability that each sample is good in each property, such as sigmoid(z).
        names: K names.
        best_of: values of n to put beside it.

    Returns:
        A :class:`Tilt`. With u = log F(r), F the distribution of r under the base policy, and a = 1 / gamma, it
        estimates Z = 1 / (1 + a), KL = log(1 + a) - a / (1 + a), win rate (1 + a) / (2 + a).

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: gamma not positive, shapes that do not fit, a prompt without a finite utility, +inf.

    Example:
        >>> import torch
        >>> from lsc_kernels.analysis import tilt
        >>> log_rank = torch.log((torch.arange(1000) + 0.5) / 1000)
        >>> result = tilt(log_rank, 0.5)  # a = 2: log 3 - 2/3 = 0.432, 3/4
        >>> round(result.kl, 3), round(result.win_rate, 3)
        (0.432, 0.75)
    """
    base = samples_of_base(utilities)
    gamma = _checks.number("gamma", gamma)
    if gamma <= 0:
        raise ValueError(f"gamma must be > 0; got {gamma}")
    good, names = _properties(p_good, names, utilities)
    good = good.reshape(*base.utilities.shape, len(names))
    rank = _ranks(base)
    log_w, log_z = tilted(base, gamma)
    w = log_w.exp()
    kl, kl_influence = _kl(base, log_w)
    win, win_influence = _win_rate(base, w, rank)
    mean = (w[..., None] * good).sum(-2)
    omega = w * base.counts[:, None]
    good_influence = omega[..., None] * (good - mean[:, None])
    uniform = base.there / base.counts[:, None]
    prompts = base.utilities.shape[0]
    return Tilt(
        gamma=gamma,
        kl=kl.mean().item(),
        kl_error=standard_error(base, kl_influence).item(),
        log_z=log_z.mean().item(),
        log_z_error=standard_error(base, omega - 1).item(),
        effective_samples=(1 / w.square().sum(-1)).mean().item(),
        samples=base.counts.mean().item(),
        prompts=prompts,
        utility=_expected(w, base.utilities),
        base_utility=_expected(uniform, base.utilities),
        win_rate=win.mean().item(),
        win_rate_error=standard_error(base, win_influence).item(),
        names=names,
        p_good=tuple(mean.mean(0).tolist()),
        p_good_error=tuple(standard_error(base, good_influence).tolist()),
        base_p_good=tuple((uniform[..., None] * good).sum(-2).mean(0).tolist()),
        best_of=tuple(_best_of(base, n, good) for n in best_of),
        weights=w.reshape(utilities.shape),
        utilities=utilities.detach(),
    )


def best_of_n(utilities: Tensor, n: int, *, p_good: Tensor | None = None) -> BestOf:
    r"""Taking the best of n samples, exactly for draws with replacement from the samples given.

    With F(c) the share of samples with utility at most c, the best of n has a utility of at most c with probability
    F(c)^n; samples that tie share what falls to them.

    Args:
        utilities: as in :func:`tilt`.
        n: at least 1.
        p_good: as in :func:`tilt`.

    Returns:
        A :class:`BestOf`.

    Raises:
        TypeError, ValueError: as :func:`tilt`.

    Example:
        >>> import torch
        >>> from lsc_kernels.analysis import best_of_n
        >>> result = best_of_n(torch.arange(1000.0), 4)
        >>> round(result.kl, 3), round(result.bound, 3), round(result.win_rate, 3)
        (0.636, 0.636, 0.8)
    """
    base = samples_of_base(utilities)
    good, names = _properties(p_good, None, utilities)
    return _best_of(base, n, good.reshape(*base.utilities.shape, len(names)))


def gamma_for_kl(utilities: Tensor, budget: float) -> float:
    r"""The gamma at which the tilt of these samples has a given KL from the base policy.

    The KL falls as gamma grows, with slope :math:`-\mathrm{Var}_\pi(u) / \gamma^3`; found by Newton's method on log
    gamma, kept within a bracket.

    Args:
        utilities: as in :func:`tilt`.
        budget: the mean KL over prompts, in nats, > 0.

    Returns:
        gamma; the tilt's KL agrees with the budget to a relative 1e-9.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the samples do not reach the budget: of n samples, the best is log n away from the base policy,
            less where several tie. Or every tilt is beyond it: one in which no sample of utility -inf has weight is
            log(n / others) away, however large gamma.

    Example:
        >>> import torch
        >>> from lsc_kernels.analysis import gamma_for_kl
        >>> log_rank = torch.log((torch.arange(20_000) + 0.5) / 20_000)
        >>> round(gamma_for_kl(log_rank, 0.4319), 3)  # log 3 - 2/3, where a = 2
        0.5
    """
    base = samples_of_base(utilities)
    budget = _checks.number("budget", budget)
    if budget <= 0:
        raise ValueError(f"budget must be > 0 nats; got {budget}")
    reach = largest_kl(base)
    if budget >= reach * (1 - 1e-6):
        raise ValueError(
            f"budget must be less than these samples reach, {reach:.3g} nats with "
            f"{base.counts.mean():.4g} samples per prompt; got {budget:g}. "
            f"A KL of {budget:g} needs well over e^{budget:g} = {math.exp(min(budget, 50)):.3g} samples per prompt"
        )
    least = smallest_kl(base)
    if budget <= least * (1 + 1e-6):
        raise ValueError(
            f"budget must be more than {least:.3g} nats, since every tilt leaves out the samples of utility -inf; "
            f"got {budget:g}"
        )
    return solve_gamma(base, budget)


def samples_of_base(utilities: Tensor) -> Base:
    """Check utilities and bring them into [P, n]."""
    _checks.floating("utilities", utilities)
    if utilities.dim() not in (1, 2) or utilities.numel() == 0:
        raise ValueError(f"utilities must be [n] or [P, n], not empty; got {list(utilities.shape)}")
    values = utilities.detach().to("cpu", torch.float64).reshape(-1, utilities.shape[-1])
    if (values == math.inf).any():
        raise ValueError("utilities must be below +inf: all weight would be there")
    finite = values.isfinite().any(-1)
    if not finite.all():
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(f"utilities must have a finite value for every prompt; row {row} has none")
    there = ~values.isnan()
    return Base(values.masked_fill(~there, -math.inf), there)


def tilted(base: Base, gamma: float) -> tuple[Tensor, Tensor]:
    """Log-weights [P, n] and log Z [P] of a tilt."""
    v = base.utilities / gamma
    total = v.logsumexp(-1)
    return v - total[:, None], total - base.counts.log()


def standard_error(base: Base, influence: Tensor) -> Tensor:
    """Of the mean over prompts of an estimate with this influence function, [P, n] or [P, n, K]."""
    there = base.there.reshape(*base.there.shape, *[1] * (influence.dim() - 2))
    square = torch.where(there, influence, 0.0).square().sum(1)
    counts = base.counts.reshape(-1, *[1] * (influence.dim() - 2))
    return (square / counts.square()).sum(0).sqrt() / len(counts)


def largest_kl(base: Base) -> float:
    """The KL from the base policy of taking the best sample only; those that tie share it."""
    best = (base.utilities == base.utilities.amax(-1, keepdim=True)).sum(-1)
    return (base.counts / best).log().mean().item()


def smallest_kl(base: Base) -> float:
    """The KL from the base policy of leaving out what has utility -inf, where a tilt goes as gamma grows."""
    return (base.counts / base.utilities.isfinite().sum(-1)).log().mean().item()


def _kl(base: Base, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """KL [P] and its influence [P, n]."""
    w = log_w.exp()
    log_omega = log_w + base.counts.log()[:, None]  # v - log Z
    terms = torch.where(w > 0, w * log_omega, 0.0)
    kl = terms.sum(-1)
    influence = torch.where(w > 0, w * base.counts[:, None] * (log_omega - kl[:, None] - 1), 0.0) + 1
    return kl, influence


def solve_gamma(base: Base, budget: float, start: float | None = None) -> float:
    """The gamma of a KL between the smallest and the largest of these samples; ``start`` is one nearby."""
    # below the best one of the prompt; what is certainly bad stays so far below that its weight is 0
    below = base.utilities - base.utilities.amax(-1, keepdim=True)
    log_count = base.counts.log()
    log_gamma = math.log(start or -below.masked_fill(below.isinf(), 0.0).min().item())
    low, high = -math.inf, math.inf  # of log gamma: the KL is above the budget at low, below it at high
    for _ in range(MAX_STEPS):
        v = (below / math.exp(log_gamma)).clamp_(min=NO_WEIGHT)
        w = v.exp()
        total = w.sum(-1)
        mean = w.mul_(v).sum(-1) / total
        square = w.mul_(v).sum(-1) / total
        kl = (mean - total.log() + log_count).mean().item()
        if abs(kl - budget) <= TOLERANCE * budget or high - low <= 1e-14 * max(1.0, abs(log_gamma)):
            break
        low, high = (log_gamma, high) if kl > budget else (low, log_gamma)
        slope = -(square - mean.square()).mean().item()  # dKL / d log gamma, minus the variance of v
        # Newton on the logarithms of both, which are nearly linear where the KL is small
        step = math.log(budget / kl) * kl / slope if kl > 0 and slope < 0 else math.nan
        step = max(-3.0, min(3.0, step)) if math.isfinite(step) else (3.0 if kl > budget else -3.0)
        log_gamma += step
        if not low < log_gamma < high:
            log_gamma = (low + high) / 2
    return math.exp(log_gamma)


def _ranks(base: Base) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ascending order, F of each sample's utility without and with those that tie, and the order's inverse."""
    ordered, order = base.utilities.masked_fill(~base.there, math.inf).sort(-1)
    ordered = ordered.contiguous()
    counts = base.counts[:, None]
    before = torch.minimum(torch.searchsorted(ordered, ordered), counts) / counts
    after = torch.minimum(torch.searchsorted(ordered, ordered, right=True), counts) / counts
    back = order.argsort(-1)
    return order, before.gather(-1, back), after.gather(-1, back), back


def _win_rate(base: Base, w: Tensor, rank: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """How often the tilted policy beats the base [P], and its influence: as the one side and as the other."""
    order, before, after, _ = rank
    middle = (before + after) / 2
    win = (w * middle).sum(-1)
    # the weight of samples above each one, half of those that tie: from cumulative weights at the ends of ties
    cumulative = torch.nn.functional.pad(w.gather(-1, order).cumsum(-1), (1, 0))
    counts = base.counts[:, None]
    upto = cumulative.gather(-1, (after * counts).round().long())
    below = cumulative.gather(-1, (before * counts).round().long())
    beaten = 1 - (upto + below) / 2
    influence = w * counts * (middle - win[:, None]) + beaten - win[:, None]
    return win, influence


def _best_of(base: Base, n: int, good: Tensor) -> BestOf:
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n must be an int; got {type(n).__name__}")
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    _, before, after, _ = _ranks(base)
    ties = ((after - before) * base.counts[:, None]).round().clamp(min=1)
    w = torch.where(base.there, (after**n - before**n) / ties, 0.0)
    terms = torch.where(w > 0, w * (w * base.counts[:, None]).log(), 0.0)
    return BestOf(
        n=n,
        kl=max(0.0, terms.sum(-1).mean().item()),
        bound=math.log(n) - (n - 1) / n,
        utility=_expected(w, base.utilities),
        win_rate=(w * (before + after) / 2).sum(-1).mean().item(),
        p_good=tuple((w[..., None] * good).sum(-2).mean(0).tolist()),
    )


def _expected(w: Tensor, values: Tensor) -> float:
    return torch.where(w > 0, w * values, 0.0).sum(-1).mean().item()


def _properties(
    p_good: Tensor | None, names: Sequence[str] | None, utilities: Tensor
) -> tuple[Tensor, tuple[str, ...]]:
    """P(good) [..., K] in fp64, 0 where there is no sample, and K names."""
    if p_good is None:
        if names is not None:
            raise ValueError(f"names are those of p_good; got {names!r} without p_good")
        return torch.zeros(*utilities.shape, 0, dtype=torch.float64), ()
    _checks.floating("p_good", p_good)
    shape = utilities.shape
    if p_good.dim() != len(shape) + 1 or p_good.shape[:-1] != shape or p_good.shape[-1] == 0:
        raise ValueError(f"p_good must be [..., K] with utilities {list(shape)}; got {list(p_good.shape)}")
    good = p_good.detach().to("cpu", torch.float64)
    good = good.masked_fill(utilities.detach().cpu().isnan()[..., None], 0.0)
    wrong = good[~((good >= 0) & (good <= 1))]
    if len(wrong):
        raise ValueError(f"p_good must be probabilities, in [0, 1]; got {wrong[0].item()}")
    return good, names_of(names, p_good.shape[-1])
