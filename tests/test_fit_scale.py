"""fit_scale: the maximum of the likelihood, its interval's coverage, and data that have no answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk


def preferences(generator: Generator, scale: float, pairs: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    """Scores of pairs whose preferences follow the Bradley-Terry model at this scale."""
    first, second = spread * torch.randn(2, pairs, generator=generator, dtype=torch.float64)
    wins = torch.rand(pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(
        (first - second) / scale
    )
    return torch.where(wins, first, second), torch.where(wins, second, first)


def likelihood(chosen: Tensor, rejected: Tensor, scale: float) -> float:
    return float(torch.nn.functional.logsigmoid((chosen.double() - rejected.double()) / scale).sum())


@pytest.mark.parametrize("scale", [0.02, 1.0, 37.0])
def test_it_is_the_maximum_and_the_interval_is_that_of_the_likelihood_ratio(
    generator: Generator, scale: float
) -> None:
    chosen, rejected = preferences(generator, scale, 3000, spread=2 * scale)
    fit = lk.fit_scale(chosen, rejected, confidence=0.9)
    best = likelihood(chosen, rejected, fit.scale)
    assert fit.log_likelihood * fit.pairs == pytest.approx(best, rel=1e-12)
    for other in (0.9, 0.999, 1.001, 1.1):
        assert likelihood(chosen, rejected, fit.scale * other) < best
    chi_square = 2.705543454095  # the 0.9 quantile with one degree of freedom
    for end in (fit.low, fit.high):
        assert 2 * (best - likelihood(chosen, rejected, end)) == pytest.approx(chi_square, rel=1e-6)
    assert fit.low < fit.scale < fit.high and fit.confidence == 0.9 and fit.pairs == 3000
    assert fit.accuracy == pytest.approx((chosen > rejected).double().mean().item())


def test_the_interval_covers_the_truth_as_often_as_it_says(generator: Generator) -> None:
    trials = 400
    covered = 0
    for _ in range(trials):
        fit = lk.fit_scale(*preferences(generator, 2.0, 150), confidence=0.8)
        covered += fit.low <= 2.0 <= fit.high
    deviation = math.sqrt(trials * 0.8 * 0.2)
    assert abs(covered - 0.8 * trials) < 5 * deviation


def test_units_and_shift_and_shape(generator: Generator) -> None:
    chosen, rejected = preferences(generator, 1.0, 500)
    fit = lk.fit_scale(chosen, rejected)
    other = lk.fit_scale(7 * chosen.view(50, 10) + 3, 7 * rejected.view(50, 10) + 3)
    assert other[:3] == pytest.approx([7 * x for x in fit[:3]], rel=1e-9)
    assert other.log_likelihood == pytest.approx(fit.log_likelihood)
    narrow = lk.fit_scale(chosen.bfloat16(), rejected.bfloat16())
    assert narrow.scale == pytest.approx(fit.scale, rel=0.05)


def test_scores_at_their_scale_are_calibrated(generator: Generator) -> None:
    """Divided by it, they have scale 1: the scale that aggregate_rewards and lsc_transform take."""
    chosen, rejected = preferences(generator, 3.0, 2000)
    fit = lk.fit_scale(chosen, rejected)
    assert lk.fit_scale(chosen / fit.scale, rejected / fit.scale).scale == pytest.approx(1.0, rel=1e-9)
    losses = [lk.bradley_terry_loss(chosen / s, rejected / s).item() for s in (fit.scale, 1.0, 10.0)]
    assert losses[0] == min(losses) and -losses[0] == pytest.approx(fit.log_likelihood, rel=1e-6)


def test_noise_has_no_upper_end(generator: Generator) -> None:
    chosen, rejected = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    fit = lk.fit_scale(chosen, rejected)
    assert fit.scale == pytest.approx(1 / math.log(2)) and fit.high == math.inf and 0 < fit.low < fit.scale


S = torch.zeros(3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.fit_scale([1.0], S), TypeError, "scores_chosen must be a tensor; got list"),
    (lambda: lk.fit_scale(S, S[:2]), ValueError, "scores_rejected must have the shape of scores_chosen"),
    (lambda: lk.fit_scale(S[:0], S[:0]), ValueError, "scores_chosen must not be empty"),
    (lambda: lk.fit_scale(S, S / 0), ValueError, "scores_rejected must be finite; 3 of 3 are not"),
    (lambda: lk.fit_scale(S, S), ValueError, "equal in every pair"),
    (lambda: lk.fit_scale(S + 1, S), ValueError, "no pair of 3 is ranked wrong.*More pairs"),
    (
        lambda: lk.fit_scale(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])),
        ValueError,
        r"disagree with the preferences \(accuracy 0.500, mean difference -0.5\)",
    ),
    (
        lambda: lk.fit_scale(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])),
        ValueError,
        "no positive scale is better than a coin",
    ),
    (lambda: lk.fit_scale(S + 1, S, confidence=95), ValueError, r"confidence must be in \(0, 1\); got 95"),
    (lambda: lk.fit_scale(S + 1, S, confidence="95%"), TypeError, "confidence must be a float; got str"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
