"""lsc_kernels.analysis against closed forms, enumeration, and its own statement of its errors."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels.analysis import best_of_n, diagnose, frontier, gamma_for_kl, tilt
from lsc_kernels.analysis.diagnose import EPS, SATURATED, rank_correlation
from lsc_kernels.analysis.report import percent

UTILITIES = hnp.arrays(np.float64, st.integers(2, 12), elements=st.floats(-20, 20, width=32))
SIGMAS = 5  # a test of n standard errors fails by chance once in two million


def closed_form(a: float) -> dict[str, float]:
    """Of the target pi_0 e^(u / gamma) with u = log F(r) and a = 1 / gamma."""
    return {
        "log_z": -math.log1p(a),
        "kl": math.log1p(a) - a / (1 + a),
        "win_rate": (1 + a) / (2 + a),
    }


# ---- tilt -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.25, 1.0, 4.0])
def test_tilt_has_its_closed_form(a: float) -> None:
    """On a fine grid of ranks, where sums are integrals up to the error of the midpoint rule."""
    n = 50_000
    log_rank = torch.log((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    result = tilt(log_rank, 1 / a)
    for name, truth in closed_form(a).items():
        assert getattr(result, name) == pytest.approx(truth, abs=5e-5), name


@pytest.mark.parametrize("prompts", [1, 40])
@pytest.mark.parametrize("a", [0.5, 3.0])
def test_tilt_of_samples_is_within_its_stated_error(
    a: float, prompts: int, generator: torch.Generator
) -> None:
    u = torch.rand(prompts, 4000 if prompts == 1 else 400, dtype=torch.float64, generator=generator).log()
    result = tilt(u, 1 / a)
    # of 400 samples, the estimates of log Z and KL are off by about a^2 / 800 on average, within a prompt
    bias = (1 + a) ** 2 / u.shape[1]
    for name, truth in closed_form(a).items():
        error = getattr(result, f"{name}_error")
        assert 0 < error < 0.1
        assert abs(getattr(result, name) - truth) < SIGMAS * error + bias, name


def test_stated_errors_are_the_scatter_of_repetitions(generator: torch.Generator) -> None:
    """200 sets of samples: the standard deviation of the estimates is the standard error that each states."""
    results = [
        tilt(u.log(), 0.5, p_good=u[:, None] ** 2, best_of=())
        for u in torch.rand(200, 1000, dtype=torch.float64, generator=generator)
    ]
    for name in ("kl", "log_z", "win_rate"):
        estimates = torch.tensor([getattr(result, name) for result in results])
        stated = torch.tensor([getattr(result, f"{name}_error") for result in results])
        # the deviation of 200 numbers is known to 1 / sqrt(400) = 5%
        assert (estimates.std() / stated.mean()).item() == pytest.approx(1, abs=0.25), name
    estimates, stated = (
        torch.tensor([getattr(result, name)[0] for result in results]) for name in ("p_good", "p_good_error")
    )
    assert (estimates.std() / stated.mean()).item() == pytest.approx(1, abs=0.25)


@given(utilities=UTILITIES, gamma=st.floats(0.05, 20))
@settings(deadline=None)
def test_tilt_by_hand(utilities: np.ndarray, gamma: float) -> None:
    n = len(utilities)
    weights = np.exp((utilities - utilities.max()) / gamma)
    weights /= weights.sum()
    result = tilt(torch.from_numpy(utilities), gamma, p_good=torch.eye(n, dtype=torch.float64))
    np.testing.assert_allclose(result.weights.numpy(), weights, rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(result.p_good, weights, rtol=1e-9, atol=1e-300)
    positive = weights[weights > 0]
    assert result.kl == pytest.approx((positive * np.log(positive * n)).sum(), abs=1e-9)
    assert result.effective_samples == pytest.approx(1 / (weights**2).sum())
    wins = sum(
        w * ((u > other) + 0.5 * (u == other)) / n
        for (u, w), other in itertools.product(zip(utilities, weights, strict=True), utilities)
    )
    assert result.win_rate == pytest.approx(wins, abs=1e-9)
    assert -1e-12 <= result.kl <= math.log(n) + 1e-12
    # the variational identity: log Z = E_pi[u] / gamma - KL
    assert result.log_z == pytest.approx(result.utility / gamma - result.kl, rel=1e-9, abs=1e-9)


def test_prompts_are_averaged_and_may_differ_in_size(generator: torch.Generator) -> None:
    u = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    u[1, 20:] = math.nan
    good = torch.rand(3, 50, 2, dtype=torch.float64, generator=generator)
    together = tilt(u, 0.7, p_good=good)
    alone = [tilt(row[~row.isnan()], 0.7, p_good=p[~row.isnan()]) for row, p in zip(u, good, strict=True)]
    for name in ("kl", "log_z", "win_rate", "utility", "base_utility", "effective_samples", "samples"):
        assert getattr(together, name) == pytest.approx(np.mean([getattr(one, name) for one in alone])), name
    for name in ("p_good", "base_p_good"):
        np.testing.assert_allclose(getattr(together, name), np.mean([getattr(one, name) for one in alone], 0))
    assert together.kl_error == pytest.approx(math.sqrt(sum(one.kl_error**2 for one in alone)) / 3)
    assert (together.weights[1, 20:] == 0).all() and together.weights.shape == u.shape
    torch.testing.assert_close(together.weights.sum(1), torch.ones(3, dtype=torch.float64))
    for mine, theirs in zip(together.best_of, zip(*(one.best_of for one in alone), strict=True), strict=True):
        assert mine.kl == pytest.approx(np.mean([one.kl for one in theirs]))


def test_certainly_bad_samples_get_no_weight() -> None:
    result = tilt(torch.tensor([-math.inf, 0.0, -math.inf, 0.0]), 1.0)
    assert result.weights.tolist() == [0, 0.5, 0, 0.5]
    assert (result.kl, result.utility) == (pytest.approx(math.log(2)), 0.0)
    assert gamma_for_kl(torch.tensor([-math.inf, 0.0, 1.0]), 0.6) > 0


# ---- best of n ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_best_of_n_has_its_closed_form(n: int) -> None:
    result = best_of_n(torch.randperm(100_000).double(), n)
    assert result.bound == pytest.approx(math.log(n) - (n - 1) / n)
    assert result.kl == pytest.approx(result.bound, abs=n * 1e-5)
    assert result.win_rate == pytest.approx(n / (n + 1), abs=1e-5)


@given(
    utilities=hnp.arrays(np.float64, st.integers(2, 5), elements=st.integers(0, 3).map(float)),
    n=st.integers(1, 4),
)
@settings(deadline=None)
def test_best_of_n_by_enumeration(utilities: np.ndarray, n: int) -> None:
    """Every draw of n out of the samples, ties shared; and the bound holds."""
    size = len(utilities)
    weights = np.zeros(size)
    for draw in itertools.product(range(size), repeat=n):
        best = utilities[list(draw)].max()
        winners = np.flatnonzero(utilities == best)
        weights[winners] += 1 / (len(winners) * size**n)
    result = best_of_n(torch.from_numpy(utilities), n, p_good=torch.eye(size, dtype=torch.float64))
    np.testing.assert_allclose(result.p_good, weights, atol=1e-12)
    positive = weights[weights > 0]
    assert result.kl == pytest.approx((positive * np.log(positive * size)).sum(), abs=1e-9)
    assert result.utility == pytest.approx(weights @ utilities)
    assert -1e-12 <= result.kl <= result.bound + 1e-9


# ---- gamma_for_kl ---------------------------------------------------------------------------------


@given(utilities=UTILITIES, share=st.floats(0.001, 0.99))
@settings(deadline=None)
def test_gamma_meets_the_budget(utilities: np.ndarray, share: float) -> None:
    ties = (utilities == utilities.max()).sum()
    reach = math.log(len(utilities) / ties)
    u = torch.from_numpy(utilities)
    if reach == 0:
        with pytest.raises(ValueError, match="less than these samples reach, 0 nats"):
            gamma_for_kl(u, 0.1)
        return
    gamma = gamma_for_kl(u, share * reach)
    assert tilt(u, gamma).kl == pytest.approx(share * reach, rel=1e-8)


def test_gamma_has_its_closed_form() -> None:
    n = 200_000
    log_rank = torch.log((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    for a in (0.1, 1.0, 10.0):
        assert gamma_for_kl(log_rank, closed_form(a)["kl"]) == pytest.approx(1 / a, rel=1e-3)


def test_gamma_over_many_prompts(generator: torch.Generator) -> None:
    u = torch.randn(200, 64, generator=generator) * torch.logspace(-2, 2, 200)[:, None]
    for budget in (1e-6, 0.1, 2.0, 3.5):
        assert tilt(u, gamma_for_kl(u, budget)).kl == pytest.approx(budget, rel=1e-8)


def test_budget_beyond_the_samples() -> None:
    with pytest.raises(
        ValueError, match=r"reach, 2\.77 nats with 16 samples per prompt; got 5\. .* e\^5 = 148"
    ):
        gamma_for_kl(torch.randn(8, 16), 5.0)


def test_budget_below_what_samples_without_weight_cost() -> None:
    half = torch.tensor([0.0, -1.0, -math.inf, -math.inf])
    with pytest.raises(ValueError, match=r"must be more than 0\.693 nats, .* utility -inf; got 0\.3"):
        gamma_for_kl(half, 0.3)
    assert tilt(half, gamma_for_kl(half, 0.8)).kl == pytest.approx(0.8, rel=1e-8)
    with pytest.raises(ValueError, match=r"must be more than 0\.405 nats"):
        gamma_for_kl(torch.tensor([0.0, 0.0, -math.inf]), 0.3)
    scores = torch.tensor([[[1.0], [0.0], [-math.inf], [-math.inf]]])
    assert [point.kl for point in frontier(scores, 0.0, kl=[0.3, 0.8], methods=["lsc"]).points] == [0.8]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: tilt([1.0], 1.0), TypeError, "utilities must be a tensor"),
        (lambda: tilt(torch.ones(3), 0.0), ValueError, "gamma must be > 0; got 0"),
        (lambda: tilt(torch.ones(0), 1.0), ValueError, r"\[n\] or \[P, n\]"),
        (lambda: tilt(torch.ones(2, 2, 2), 1.0), ValueError, r"\[n\] or \[P, n\]"),
        (lambda: tilt(torch.tensor([math.inf, 1.0]), 1.0), ValueError, r"below \+inf"),
        (lambda: tilt(torch.tensor([[0.0, 1.0], [math.nan, math.nan]]), 1.0), ValueError, "row 1 has none"),
        (lambda: tilt(torch.ones(3), 1.0, p_good=torch.ones(4, 1)), ValueError, r"with utilities \[3\]"),
        (lambda: tilt(torch.ones(3), 1.0, p_good=torch.ones(3, 2), names=["a"]), ValueError, "K = 2"),
        (lambda: best_of_n(torch.ones(3), 0), ValueError, "n must be at least 1"),
        (lambda: best_of_n(torch.ones(3), 1.5), TypeError, "n must be an int"),
        (lambda: gamma_for_kl(torch.ones(3), -1.0), ValueError, "budget must be > 0"),
        (lambda: frontier(torch.ones(3), 0.0), ValueError, r"scores must be \[n, K\]"),
        (lambda: frontier(torch.ones(3, 2), 0.0, methods=["best"]), ValueError, "methods must be among raw"),
        (lambda: frontier(torch.ones(3, 2), 0.0, options={"clip": {}}), ValueError, "'clip' is not among"),
        (lambda: frontier(torch.randn(9, 2), 0.0, kl=[0.0]), ValueError, "kl must be > 0"),
        (lambda: frontier(torch.ones(3, 2), 0.0, names=["a"]), ValueError, "K = 2"),
        (lambda: diagnose(torch.ones(3), 0.0), ValueError, r"scores must be \[N, K\]"),
        (lambda: diagnose(torch.full((3, 1), math.nan), 0.0), ValueError, "'property 0' has none"),
        (lambda: diagnose(torch.ones(3, 1), 0.0, group=2), ValueError, "divide the 3 samples"),
        (
            lambda: diagnose(torch.ones(3, 1), 0.0, group=torch.ones(2, dtype=torch.int64)),
            ValueError,
            r"\[3\]",
        ),
        (lambda: diagnose(torch.ones(3, 1), 0.0, scale=-1.0), ValueError, "scale must be finite and > 0"),
        (
            lambda: diagnose(torch.ones(3, 2), torch.ones(4)),
            ValueError,
            r"reference_reward .* \[3, 2\]; got \[4\]",
        ),
        (lambda: diagnose(torch.ones(3, 2), None), TypeError, "reference_reward must be a float or a tensor"),
        (lambda: diagnose(torch.ones(3, 2), 0.0, weights=[1.0, 2.0]), TypeError, "weights must be a tensor"),
        (lambda: diagnose(torch.ones(3, 2), 0.0, names="ab"), TypeError, "names must be a sequence"),
        (lambda: diagnose(torch.ones(3, 2), 0.0, names=["a", "a"]), ValueError, "names must differ"),
        (
            lambda: frontier(torch.ones(4, 3, 2), torch.ones(4, 2)),
            ValueError,
            r"reference_reward .* \[4, 3, 2\]; got \[4, 2\]",
        ),
        (lambda: frontier(torch.ones(3, 2), 0.0, scale="a"), TypeError, "scale must be a float or a tensor"),
        (
            lambda: frontier(torch.ones(3, 2), 0.0, weights=torch.tensor([-1.0, 1.0])),
            ValueError,
            r"weights must be finite and >= 0: .*; got \[-1.0, 1.0\]",
        ),
        (lambda: frontier(torch.ones(3, 2), 0.0, methods="lsc"), ValueError, "methods must be a sequence"),
        (lambda: frontier(torch.randn(9, 2), 0.0, kl=1.0), TypeError, "kl must be a sequence of floats"),
        (lambda: tilt(torch.ones(3), 1.0, p_good=torch.full((3, 1), 1.5)), ValueError, "probabilities"),
        (lambda: tilt(torch.ones(3), 1.0, p_good=torch.full((3, 1), math.nan)), ValueError, "got nan"),
        (lambda: tilt(torch.ones(3), 1.0, names=["a"]), ValueError, "without p_good"),
    ],
)
def test_wrong_arguments(call: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()  # type: ignore[operator]


# ---- frontier -------------------------------------------------------------------------------------


@pytest.fixture
def scores(generator: torch.Generator) -> Tensor:
    """Two properties at odds, the first with the larger scale: [4, 500, 2]."""
    one, other = torch.randn(2, 4, 500, generator=generator, dtype=torch.float64)
    return torch.stack([4 * one, other - one], -1)


REFERENCE = torch.tensor([3.0, 0.5])


def test_frontier_is_tilts_of_the_transforms(scores: Tensor) -> None:
    found = frontier(scores, REFERENCE, kl=[0.5, 2.0], methods=list(lk.TRANSFORMS), names=["a", "b"])
    good = lk.lsc_transform(scores, REFERENCE).exp()
    for point in found.points:
        u = torch.zeros(scores.shape[:2], dtype=torch.float64)
        for k in range(2):
            r = scores[..., k]
            options: dict[str, object] = {}
            if "quantile" in point.method:
                options["samples"] = r.unsqueeze(-2)  # [P, 1, n]: of each prompt
            elif point.method not in ("raw", "zscore", "minmax"):
                options["reference_reward"] = REFERENCE[k]
            u += lk.transform_reward(r, point.method, **options)  # type: ignore[arg-type]
        by_hand = tilt(
            u, gamma_for_kl(u, point.kl), p_good=torch.cat([good, good.prod(-1, keepdim=True)], -1)
        )
        np.testing.assert_allclose((*point.p_good, point.p_all), by_hand.p_good, rtol=1e-6)
        np.testing.assert_allclose((*point.p_good_error, point.p_all_error), by_hand.p_good_error, rtol=1e-5)
        assert point.gamma == pytest.approx(by_hand.gamma, rel=1e-6)
        assert point.effective_samples == pytest.approx(by_hand.effective_samples, rel=1e-6)
    assert len(found.points) == 2 * len(lk.TRANSFORMS)
    assert found.base.p_good == pytest.approx(good.mean((0, 1)).tolist())
    assert found.base.underfit == pytest.approx((scores < REFERENCE).double().mean((0, 1)).tolist())


def test_lsc_maximises_the_mean_utility_at_its_kl(scores: Tensor) -> None:
    """Gibbs: of all policies with this KL, none has a higher mean of log P(all good)."""
    u = lk.aggregate_rewards(scores, REFERENCE)
    best = tilt(u, gamma_for_kl(u, 1.0)).utility
    for other in (scores.sum(-1), torch.sigmoid(scores - REFERENCE).sum(-1)):
        weights = tilt(other, gamma_for_kl(other, 1.0)).weights
        assert (weights * u).sum(-1).mean().item() < best


def test_methods_that_rank_alike_are_one_curve(generator: torch.Generator) -> None:
    """A factor does not matter: gamma takes it up."""
    scores = torch.randn(400, 2, generator=generator)
    found = frontier(
        scores, 0.0, kl=[1.0], methods=["raw", "clip"], options={"clip": {"low": -99.0, "high": 99.0}}
    )
    scaled = frontier(scores, 0.0, kl=[1.0], methods=["raw"], weights=torch.tensor([7.0, 7.0]))
    raw, clip = found.points
    assert raw.p_good == pytest.approx(clip.p_good)
    assert raw.p_good == pytest.approx(scaled.points[0].p_good)


def test_frontier_takes_formula_weights_and_missing(scores: Tensor) -> None:
    formula = lk.prop("a") | lk.prop("b")
    with_holes = scores.clone()
    with_holes[1, 100:, 0] = math.nan
    found = frontier(
        with_holes, REFERENCE, kl=[1.0], methods=["raw", "lsc"], names=["a", "b"], formula=formula
    )
    assert found.samples == 400 and found.prompts == 4
    kept = [row[~row.isnan().any(-1)] for row in with_holes]
    p_any = [1 - (1 - lk.lsc_transform(row, REFERENCE).exp()).prod(-1) for row in kept]
    assert found.base.p_all == pytest.approx(np.mean([p.mean().item() for p in p_any]))


def test_budgets_beyond_the_samples_are_left_out(scores: Tensor) -> None:
    found = frontier(scores[:, :8], REFERENCE, kl=[0.5, 1.0, 3.0])
    assert {point.kl for point in found.points} == {0.5, 1.0}
    assert found.reach == pytest.approx(math.log(8))
    default = frontier(scores, REFERENCE)
    assert max(point.kl for point in default.points) == pytest.approx(math.log(500 / 4))


# ---- diagnose -------------------------------------------------------------------------------------


def test_diagnosis_of_a_table_small_enough_to_count() -> None:
    scores = torch.tensor([[1.0, -2.0], [9.0, 0.5], [-1.0, math.nan], [3.0, 1.0]])
    found = diagnose(scores, torch.tensor([1.0, 0.0]), names=["a", "b"], scale=torch.tensor([1.0, 0.5]))
    z = [[0.0, 8.0, -2.0, 2.0], [-4.0, 1.0, 2.0]]
    for one, margins in zip(found.properties, z, strict=True):
        slope = [1 / (1 + math.exp(x)) for x in margins]
        assert one.mean_z == pytest.approx(np.mean(margins)) and one.median_z == pytest.approx(
            np.median(margins)
        )
        assert one.underfit == np.mean([x < 0 for x in margins])
        assert one.saturated == np.mean([x > SATURATED for x in margins])
        assert one.marginal_utility == pytest.approx(np.mean(slope), rel=1e-6)
        assert one.p_good == pytest.approx(1 - np.mean(slope), rel=1e-6)
        assert one.gain_uniformity == pytest.approx(
            sum(slope) ** 2 / (len(slope) * sum(s**2 for s in slope)), rel=1e-6
        )
    a, b = found.properties
    assert (a.missing, b.missing, b.samples) == (0, 1, 3)
    assert (a.binds, b.binds) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
    )  # where both pull alike, the first
    p = 1 / (1 + np.exp(-np.array([[0, -4], [8, 1], [2, 2]], float)))
    assert found.dependence.joint == pytest.approx(p.prod(1).mean(), rel=1e-6)
    assert found.dependence.product == pytest.approx(p.mean(0).prod(), rel=1e-6)
    assert found.dependence.weakest == pytest.approx(p.min(1).mean(), rel=1e-6)
    assert found.dependence.all_above == pytest.approx(2 / 3)
    assert found.dependence.all_above_if_independent == pytest.approx(2 / 3 * 2 / 3)


def test_weights_and_floor_move_the_pull() -> None:
    scores = torch.tensor([[-1.0, 1.0]] * 3)
    assert [one.binds for one in diagnose(scores, 0.0).properties] == [1.0, 0.0]
    heavy = diagnose(scores, 0.0, weights=torch.tensor([1.0, 5.0]))
    assert [one.binds for one in heavy.properties] == [0.0, 1.0]
    floored = diagnose(torch.tensor([[-20.0]]), 0.0, floor=0.1).properties[0]
    assert floored.p_good == pytest.approx(0.1, rel=1e-6) and floored.marginal_utility < 1e-6


def test_uniformity_is_one_for_the_raw_reward_and_small_for_few_that_pull() -> None:
    far_below = diagnose(torch.full((50, 1), -30.0), 0.0)
    assert far_below.properties[0].gain_uniformity == pytest.approx(1)
    one_pulls = diagnose(torch.tensor([[-30.0]] + [[30.0]] * 9), 0.0)
    assert one_pulls.properties[0].gain_uniformity == pytest.approx(0.1)


@given(columns=hnp.arrays(np.float64, (8, 3), elements=st.integers(-3, 3).map(float)))
@settings(deadline=None)
def test_rank_correlation_is_spearmans(columns: np.ndarray) -> None:
    found = rank_correlation(torch.from_numpy(columns)).numpy()
    ranks = [[(column < x).sum() + (column <= x).sum() for x in column] for column in columns.T]
    for i, j in itertools.product(range(3), repeat=2):
        constant = len(set(ranks[i])) == 1 or len(set(ranks[j])) == 1
        wanted = float(i == j) if constant else np.corrcoef(ranks[i], ranks[j])[0, 1]
        assert found[i, j] == pytest.approx(wanted, abs=1e-9)


def test_findings_name_what_ranks_alike_and_what_is_at_odds(generator: torch.Generator) -> None:
    first, noise = torch.randn(2, 2000, generator=generator)
    scores = torch.stack([first, first + 0.1 * noise, -first + noise], -1)
    told = " ".join(diagnose(scores, 0.0, names=["kind", "polite", "brief"]).findings())
    assert "kind and polite rank alike" in told and "weakest(kind, polite)" in told
    assert "kind and brief are at odds" in told
    high = diagnose(scores + torch.tensor([9.0, -9.0, 0.0]), 0.0, names=["kind", "polite", "brief"])
    told = " ".join(high.findings())
    assert "kind is saturated on 100%" in told and "polite is below its reference on 100%" in told


def test_group_zscore_undoes_saturation() -> None:
    """Groups of eight around +6: the utilities differ by 2e-3, and z-scores bring the raw order and size back."""
    centred = torch.linspace(-1, 1, 8, dtype=torch.float64)
    scores = (6 + centred).repeat(5)[:, None]
    assert lk.lsc_transform(scores[:8], 0.0).std().item() == pytest.approx(2e-3, rel=0.05)
    found = diagnose(scores, 0.0, group=8).group
    assert found is not None and found.groups == 5
    assert found.correlation == pytest.approx(0.95, abs=0.02)
    assert found.saturated == 1.0 and found.eps_decides == 0.0
    at_twelve = diagnose(scores + 6, 0.0, group=8).group
    assert at_twelve is not None and at_twelve.eps_decides == 1.0


def test_group_effect_by_hand(generator: torch.Generator) -> None:
    scores = torch.cat(
        [torch.randn(8, 2, generator=generator), 8 + torch.randn(8, 2, generator=generator)]
    ).double()
    ids = torch.tensor([7] * 4 + [3] * 4 + [9] * 7 + [1])
    found = diagnose(scores, 0.0, group=ids).group
    assert found is not None and (found.groups, found.alone) == (3, 1)
    u, total = lk.aggregate_rewards(scores, 0.0), scores.sum(1)
    correlations, plain, zscored = [], {}, {}
    for name in (7, 3, 9):
        group = u[ids == name]
        correlations.append(np.corrcoef(group, total[ids == name])[0, 1])
        plain[name] = (group - group.mean()).abs().sum().item()
        zscored[name] = ((group - group.mean()) / (group.std() + EPS)).abs().sum().item()
    assert found.correlation == pytest.approx(np.mean(correlations))
    assert found.saturated == pytest.approx(1 / 3)
    assert found.saturated_share == pytest.approx(plain[9] / sum(plain.values()))
    assert found.saturated_share_zscored == pytest.approx(zscored[9] / sum(zscored.values()))
    assert "33% of the groups have nothing left to gain" in " ".join(
        diagnose(scores, 0.0, group=ids).findings()
    )


# ---- what results can do --------------------------------------------------------------------------


def results(scores: Tensor) -> list:
    flat = scores.flatten(0, 1)
    u = lk.aggregate_rewards(scores, REFERENCE)
    good = lk.lsc_transform(scores, REFERENCE).exp()
    return [
        tilt(u, 0.5, p_good=good, names=["helpful", "harmless"]),
        frontier(scores, REFERENCE, names=["helpful", "harmless"], kl=[0.5, 1.0]),
        diagnose(flat, REFERENCE, names=["helpful", "harmless"], group=500),
    ]


def test_results_as_plain_values(scores: Tensor) -> None:
    for result in results(scores):
        plain = result.as_dict()
        json.dumps(plain)
        assert all(isinstance(value, (int, float, str, type(None))) for value in plain.values())
    tilted, bought, found = (result.as_dict() for result in results(scores))
    assert tilted["best_of/0/n"] == 2 and tilted["p_good/1"] > 0
    assert "points/lsc/kl=0.5/p_all" in bought and "properties/harmless/binds" in found


def test_results_as_tables(scores: Tensor) -> None:
    rich = pytest.importorskip("rich.console")
    words = (["best of 2", "win rate"], ["raw", "lsc", "0.5"], ["helpful", "uniformity"])
    for result, expected in zip(results(scores), words, strict=True):
        console = rich.Console(width=140, record=True, quiet=False, file=open("/dev/null", "w"))
        console.print(result.table())
        text = console.export_text()
        assert all(word in text for word in expected), text


def test_names_that_look_like_markup(generator: torch.Generator) -> None:
    rich = pytest.importorskip("rich.console")
    names = ["[/a]", "[red]b"]
    console = rich.Console(width=140, record=True, file=open("/dev/null", "w"))
    console.print(diagnose(torch.randn(50, 2, generator=generator), 1.0, names=names).table())
    text = console.export_text()
    assert all(name in text for name in names), text


def test_results_as_figures(scores: Tensor) -> None:
    pytest.importorskip("matplotlib")
    for result in results(scores):
        figure = result.figure()
        for axes in figure.axes:
            assert axes.get_title()
            if not axes.images:
                assert axes.get_xlabel(), "an axis without a name"
        figure.canvas.draw()


@pytest.fixture(params=[1, 4, 9])
def crowded(request: pytest.FixtureRequest, generator: torch.Generator) -> tuple[Tensor, list[str]]:
    """Scores of more properties than fit easily, with long names."""
    names = [f"a property with a long name, {k}" for k in range(request.param)]
    return 3 * torch.randn(500, len(names), generator=generator), names


def test_tables_cut_no_number(crowded: tuple[Tensor, list[str]]) -> None:
    rich = pytest.importorskip("rich.console")
    scores, names = crowded
    found = diagnose(scores, 1.0, names=names)
    bought = frontier(scores, 1.0, names=names, kl=[0.5], methods=list(lk.TRANSFORMS))
    for result, numbers in (
        (found, [f"{one.mean_z:.2f}" for one in found.properties]),
        (bought, [percent(min(point.p_good)).rstrip("%") for point in bought.points]),
    ):
        console = rich.Console(width=80, record=True, file=open("/dev/null", "w"))
        console.print(result.table())
        text = console.export_text()
        assert "…" not in text and all(number in text for number in numbers), text


def test_nothing_overlaps_in_figures(crowded: tuple[Tensor, list[str]]) -> None:
    pytest.importorskip("matplotlib")
    scores, names = crowded
    good = lk.lsc_transform(scores, 1.0).exp()
    utility = lk.aggregate_rewards(scores, 1.0)
    for result in (
        diagnose(scores, 1.0, names=names),
        frontier(scores, 1.0, names=names, kl=[0.5, 1.0], methods=list(lk.TRANSFORMS)),
        tilt(utility, 4.0, p_good=good, names=names),
    ):
        figure = result.figure()
        figure.canvas.draw()
        inside = figure.bbox.padded(1.0)
        for axes in figure.axes:
            told = [text.get_window_extent() for text in axes.texts]
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                shown = [label.get_window_extent() for place, label in ticks if low <= place <= high]
                assert not any(one.overlaps(other) for one, other in itertools.pairwise(shown)), (
                    axes.get_title()
                )
            assert not any(one.overlaps(other) for one, other in itertools.combinations(told, 2)), (
                axes.get_title()
            )
            legend = axes.get_legend()
            if legend is not None:
                box = legend.get_window_extent()
                assert not box.overlaps(axes.get_window_extent()), axes.get_title()
                assert inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1), axes.get_title()


def test_import_needs_neither_rich_nor_matplotlib() -> None:
    code = (
        "import sys; sys.modules.update({name: None for name in ('rich', 'matplotlib', 'pyarrow', 'duckdb')}); "
        "import torch; from lsc_kernels.analysis import tilt; result = tilt(torch.randn(9), 1.0); result.as_dict()\n"
        "try: result.table()\nexcept ModuleNotFoundError as error: print(error)\n"
        "try: result.figure()\nexcept ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lsc-kernels[reference]" in done.stdout and "lsc-kernels[plot]" in done.stdout
