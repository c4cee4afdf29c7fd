"""The Bradley-Terry temperature of a reward model: how much a difference of its scores is worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import log_sigmoid
from lsc_kernels.ops import _checks


class ScaleFit(NamedTuple):
    """What :func:`fit_scale` found, as Python numbers, without gradient.

    Attributes:
        scale: the temperature s, > 0, in units of the score.
        low: the lower end of its confidence interval, in the same units.
        high: the upper end; inf where the data cannot tell the scores from noise.
        confidence: the level of the interval, in (0, 1), as given.
        accuracy: the share of pairs, in [0, 1], in which the chosen output has the higher score; a tie is half a pair.
        log_likelihood: at ``scale``, per pair, in nats; -0.6931 is a coin.
        pairs: how many pairs there were.
    """

    scale: float
    low: float
    high: float
    confidence: float
    accuracy: float
    log_likelihood: float
    pairs: int


def fit_scale(scores_chosen: Tensor, scores_rejected: Tensor, *, confidence: float = 0.95) -> ScaleFit:
    r"""The temperature s of a reward model under which its scores explain held-out preferences best.

    Under the Bradley-Terry model the chosen output is preferred with probability :math:`\sigma((r_c - r_r) / s)`. A
    reward model that was trained without a fixed scale, or distilled, merged or ranked with, need not have s = 1; and
    s is what its ``scale`` in :func:`aggregate_rewards` should be, since otherwise the spread of its scores silently
    decides how much it counts in the AND.

    The likelihood is maximised over 1/s, in which its logarithm is concave. The confidence interval is that of the
    likelihood ratio: the s at which the log-likelihood is at most half the quantile of :math:`\chi^2_1` below its
    maximum. It does not depend on how the parameter is written, and need not be symmetric about s. ``high`` is inf
    where the data cannot tell the scores from noise.

    Args:
        scores_chosen: scores of the preferred outputs, any shape; of pairs that the reward model was not trained on,
            independent of one another.
        scores_rejected: those of the others, of the same shape.
        confidence: the level of the interval, in (0, 1).

    Returns:
        ``ScaleFit(scale, low, high, confidence, accuracy, log_likelihood, pairs)``, floats. Waits for the device.

    Raises:
        TypeError: scores that are no floating-point tensors.
        ValueError: shapes or devices that differ, scores that are not finite, a ``confidence`` outside (0, 1); no
            positive finite scale is the best: no pair is ranked wrong (s goes to 0), the scores do not agree with the
            preferences more than a coin would (s goes to infinity), or no two scores differ.

    Source:
        R. A. Bradley and M. E. Terry, "Rank analysis of incomplete block designs" (1952); the temperature on held-out
        data, C. Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> generator = torch.Generator().manual_seed(0)
        >>> chosen, rejected = 6 * torch.randn(2, 4000, generator=generator)
        >>> wrong = torch.rand(4000, generator=generator) > torch.sigmoid((chosen - rejected) / 3)  # s = 3
        >>> chosen, rejected = torch.where(wrong, rejected, chosen), torch.where(wrong, chosen, rejected)
        >>> fit = lk.fit_scale(chosen, rejected)
        >>> fit.low < 3 < fit.high, round(fit.scale), fit.pairs
        (True, 3, 4000)
    """
    differences = _differences(scores_chosen, scores_rejected)
    if not _checks.is_number(confidence):
        raise TypeError(f"confidence must be a float; got {type(confidence).__name__}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1); got {confidence}")
    unit = float(differences.abs().mean())
    if unit == 0:
        raise ValueError(
            "scores_chosen and scores_rejected are equal in every pair: any scale explains them alike"
        )
    differences = differences / unit
    pairs = differences.numel()

    def log_likelihood(beta: float) -> float:
        return float(log_sigmoid(beta * differences).sum())

    def slope(beta: float) -> float:
        return float((differences * torch.sigmoid(-beta * differences)).sum())

    accuracy = float((differences > 0).double().mean() + (differences == 0).double().mean() / 2)
    if bool((differences >= 0).all()):
        raise ValueError(
            f"no pair of {pairs} is ranked wrong: the smaller the scale, the likelier they are, without end. "
            "More pairs are needed, or harder ones"
        )
    if slope(0.0) <= 0:
        raise ValueError(
            f"the scores disagree with the preferences (accuracy {accuracy:.3f}, mean difference "
            f"{float(differences.mean()) * unit:.3g}): no positive scale is better than a coin. "
            "Are chosen and rejected exchanged?"
        )
    best = _root(slope, 0.0, 1.0)
    highest = log_likelihood(best)
    drop = NormalDist().inv_cdf(0.5 + confidence / 2) ** 2 / 2

    def within(beta: float) -> float:
        return log_likelihood(beta) - highest + drop

    low = unit / _root(within, best, 2 * best)
    high = math.inf if within(0.0) >= 0 else unit / _root(lambda beta: -within(beta), 0.0, best)
    return ScaleFit(unit / best, low, high, float(confidence), accuracy, highest / pairs, pairs)


def _differences(scores_chosen: Tensor, scores_rejected: Tensor) -> Tensor:
    chosen = _checks.floating("scores_chosen", scores_chosen)
    rejected = _checks.floating("scores_rejected", scores_rejected)
    _checks.shape("scores_rejected", rejected, chosen.shape, "scores_chosen")
    _checks.same_device("scores_rejected", rejected, "scores_chosen", chosen.device)
    if chosen.numel() == 0:
        raise ValueError("scores_chosen must not be empty")
    for name, scores in (("scores_chosen", chosen), ("scores_rejected", rejected)):
        if not bool(scores.isfinite().all()):
            wrong = int((~scores.isfinite()).sum())
            raise ValueError(f"{name} must be finite; {wrong} of {scores.numel()} are not")
    return (chosen.detach().double() - rejected.detach().double()).flatten()


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function that is positive at ``low`` and falls turns negative; ``high`` is a first guess at beyond."""
    while function(high) > 0:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high or high - low <= 1e-12 * high:
            return middle
        if function(middle) > 0:
            low = middle
        else:
            high = middle
