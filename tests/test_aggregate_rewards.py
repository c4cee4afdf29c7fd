"""aggregate_rewards: values, gradients, weights, missing scores, broadcasting, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _upstream
import mpmath
import pytest
import torch
from _cases import few
from _formulas import DIGITS, formulas, gradient, utility
from _modes import compile_once, needs_native, on_one_thread
from _reward_side import (
    DTYPES,
    SMALLEST,
    check_against_fp64,
    instruction_set,
    instruction_sets,
    relative_error,
    with_gradients,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import lsc_kernels as lk
from lsc_kernels.formula import Formula

PROMISE = 1e-5
PROMISED_DOWN_TO = 1e-30


def by_hand(scores: Tensor, reference: Tensor | float, weights: Tensor | None = None) -> Tensor:
    """sum_k w_k log sigmoid(score_k - reference_k) in fp64."""
    z = scores.double() - (reference.double() if isinstance(reference, Tensor) else reference)
    u = torch.nn.functional.logsigmoid(z)
    return (u if weights is None else u * weights.double()).sum(-1)


@pytest.mark.parametrize("properties", [1, 2, 3, 4, 5, 32, 300, 1000])
def test_values(backend: str, generator: Generator, properties: int) -> None:
    scores = torch.randn(97, properties, generator=generator) * 12
    scores[0] = 60.0  # every property is nearly certain: the utility is about -K e^-60
    reference = torch.randn(properties, generator=generator)
    weights = torch.rand(properties, generator=generator)
    for name in instruction_sets(backend):
        with instruction_set(name):
            assert (
                relative_error(lk.aggregate_rewards(scores, reference), by_hand(scores, reference)) <= PROMISE
            )
            weighted = lk.aggregate_rewards(scores, 0.5, weights=weights)
        assert relative_error(weighted, by_hand(scores, 0.5, weights)) <= PROMISE


def test_one_property_is_lsc_transform(backend: str, generator: Generator) -> None:
    scores = torch.randn(1000, 1, generator=generator) * 20
    for options in ({}, {"scale": 0.5}, {"floor": 0.1}):
        assert torch.equal(
            lk.aggregate_rewards(scores, 0.3, **options), lk.lsc_transform(scores, 0.3, **options).squeeze(-1)
        )


def test_gradcheck(generator: Generator) -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [double(3, 4) * 4, double(4), double(4).exp(), double(3, 1).exp()]
    for tensor in inputs:
        tensor.requires_grad_()
    floor = torch.rand(4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda r, ref, s, w: lk.aggregate_rewards(r, ref, scale=s, weights=w, floor=floor), inputs
    )


SHAPES = [
    ((6, 3), (3,), (3,), (3,)),
    ((6, 3), (), (), (6, 1)),
    ((6, 3), (6, 3), (6, 3), (6, 3)),
    ((2, 5, 3), (2, 1, 3), (), (3,)),
    ((2, 1, 3), (4, 3), (1,), ()),
    ((3,), (3,), (), (3,)),
    ((3,), (5, 3), (), ()),
    ((6, 1), (1,), (6, 1), (1,)),
    ((0, 3), (3,), (3,), (3,)),
    ((40, 2), (2,), (40, 1), (2,)),
    ((3, 300), (300,), (3, 1), (300,)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("missing", ["propagate", "ignore"])
def test_broadcasting(
    backend: str, generator: Generator, shapes: tuple[tuple[int, ...], ...], missing: str
) -> None:
    scores, reference, scale, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    scores, scale = scores * 5, scale.exp()
    if scores.numel() > 4:
        scores.view(-1)[4] = torch.nan
    shape = torch.broadcast_shapes(*shapes)
    upstream = torch.randn(shape[:-1], generator=generator)
    floor = torch.rand(shape[-1], generator=generator)
    floor[0] = 0.0

    def aggregate(r: Tensor, ref: Tensor, s: Tensor, w: Tensor) -> Tensor:
        return lk.aggregate_rewards(r, ref, scale=s, weights=w.abs(), floor=floor, missing=missing)

    assert aggregate(scores, reference, scale, weights).shape == shape[:-1]
    check_against_fp64(aggregate, upstream, [scores, reference, scale, weights], 3e-6, full=shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, generator: Generator, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    scores = (torch.randn(50, 3, generator=generator) * 6).to(dtype)
    reference = torch.randn(3, generator=generator).to(torch.float16)
    weights = torch.rand(3, generator=generator).to(weights_dtype)
    upstream = torch.randn(50, generator=generator)
    check_against_fp64(
        lambda r, ref, w: lk.aggregate_rewards(r, ref, weights=w),
        upstream,
        [scores, reference, weights],
        3e-6,
    )


def test_weight_zero_counts_for_nothing(backend: str) -> None:
    scores = torch.tensor([[1.0, -torch.inf], [1.0, torch.nan], [torch.nan, 2.0]])
    weights = torch.tensor([0.5, 0.0])
    value, (to_scores,) = with_gradients(
        lambda r: lk.aggregate_rewards(r, 0.0, weights=weights), torch.ones(3), [scores]
    )
    half = 0.5 * math.log(1 / (1 + math.exp(-1)))
    assert value[:2].tolist() == pytest.approx([half, half], rel=PROMISE) and value[2].isnan()
    assert to_scores is not None and to_scores[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert to_scores[:2, 0].isfinite().all()


def test_missing(backend: str) -> None:
    scores = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [1.0, 2.0]])
    reference = torch.tensor([0.0, 0.0])
    assert lk.aggregate_rewards(scores, reference).isnan().tolist() == [True, True, False]
    value, (to_scores, to_reference) = with_gradients(
        lambda r, ref: lk.aggregate_rewards(r, ref, missing="ignore"), torch.ones(3), [scores, reference]
    )
    alone = lk.lsc_transform(torch.tensor([1.0]), 0.0).item()
    assert value[0].item() == pytest.approx(alone) and value[1].item() == 0.0
    assert to_scores is not None and to_reference is not None and to_reference.isfinite().all()
    assert to_scores[0, 1].item() == 0.0 and to_scores[1].tolist() == [0.0, 0.0]


@pytest.mark.cpu
def test_missing_can_raise(backend: str) -> None:
    scores = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan, torch.nan, 2.0], [1.0, 2.0, torch.inf]])
    with pytest.raises(ValueError, match=r"scores has NaN .* the first is scores\[0, 1\]"):
        lk.aggregate_rewards(scores, 0.0, missing="raise")
    assert lk.aggregate_rewards(scores[2:], 0.0, missing="raise").isfinite()
    with pytest.raises(ValueError, match=r"the first is scores\[0, 1\]"):
        lk.aggregate_rewards(scores[:1], 0.0, formula="0 | ~1", missing="raise")
    assert lk.aggregate_rewards(scores[:1], 0.0, formula="0 | ~2", missing="raise").isfinite()
    torch._dynamo.reset()
    checked = torch.compile(
        lambda r: lk.aggregate_rewards(r, 0.0, missing="raise"), fullgraph=True, backend="aot_eager"
    )
    checked(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="scores has NaN"):
        checked(torch.tensor([[0.0, torch.nan]]))
    torch._dynamo.reset()


def test_a_nan_reference_is_not_a_missing_score(backend: str) -> None:
    value = lk.aggregate_rewards(torch.zeros(2), torch.tensor([0.0, torch.nan]), missing="ignore")
    assert value.isnan()


def test_nan_that_nobody_asked_about_leaves_gradients_alone(backend: str) -> None:
    scores = torch.tensor([[1.0, torch.nan], [1.0, 2.0]])
    _, gradients = with_gradients(
        lambda r, ref, w: lk.aggregate_rewards(r, ref, weights=w),
        torch.tensor([0.0, 1.0]),
        [scores, torch.zeros(2), torch.ones(2)],
    )
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_any_strides(backend: str, generator: Generator) -> None:
    scores = torch.randn(3, 8, generator=generator)
    upstream = torch.randn(1, generator=generator).expand(8)
    for strided in (scores.mT, scores.mT.flip(0), scores[:1].mT.expand(8, 3), scores.mT.contiguous()[:, ::2]):
        expected = with_gradients(lambda r: lk.aggregate_rewards(r, 0.0), upstream, [strided.contiguous()])
        leaf = strided.detach().requires_grad_()
        value = lk.aggregate_rewards(leaf, 0.0)
        value.backward(upstream)
        assert torch.equal(value, expected[0]) and leaf.grad is not None and expected[1][0] is not None
        assert torch.equal(leaf.grad, expected[1][0])


def test_a_row_depends_on_nothing_beside_it(backend: str, generator: Generator) -> None:
    scores = torch.randn(2000, 3, generator=generator) * 9
    whole = lk.aggregate_rewards(scores, 0.1)
    assert torch.equal(whole, lk.aggregate_rewards(scores, 0.1))
    assert torch.equal(whole[1001:1003], lk.aggregate_rewards(scores[1001:1003], 0.1))
    with on_one_thread():
        assert torch.equal(whole, lk.aggregate_rewards(scores, 0.1))


@given(rows=st.integers(0, 70), properties=st.integers(1, 40), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_shape(rows: int, properties: int, seed: int) -> None:
    scores = torch.randn(rows, properties, generator=torch.Generator().manual_seed(seed)) * 8
    assert relative_error(lk.aggregate_rewards(scores, 0.25), by_hand(scores, 0.25)) <= PROMISE


def test_modes(backend: str, generator: Generator) -> None:
    scores = torch.randn(4, 3, generator=generator, requires_grad=True)
    reference = torch.randn(3, generator=generator)
    expected = lk.aggregate_rewards(scores, reference, names=["a", "b", "c"])
    with torch.inference_mode():
        assert torch.equal(lk.aggregate_rewards(scores, reference), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lk.aggregate_rewards(scores, reference), expected)
    (first,) = torch.autograd.grad(expected.sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="aggregate_rewards has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    reference, weights = (torch.rand(3, generator=generator) for _ in range(2))
    calls = [
        (
            torch.randn(n, 3, generator=generator).requires_grad_(),
            *(t.clone().requires_grad_() for t in (reference, weights)),
        )
        for n in (4, 7, 5)
    ]
    compile_once(
        lambda r, ref, w: [lk.aggregate_rewards(r, ref, weights=w, missing="ignore", names=["a", "b", "c"])],
        calls,
    )


@pytest.mark.parametrize("formula", [None, "0 & ~1 | 2"])
def test_any_gradient_from_above(backend: str, generator: Generator, formula: str | None) -> None:
    scores = torch.randn(*_upstream.SHAPE, 3, generator=generator)
    _upstream.check(
        lambda s, r: lk.aggregate_rewards(s, r, formula=formula),
        (scores, torch.randn(3, generator=generator)),
        generator,
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    scores, upstream = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    column = torch.rand(3, generator=generator)
    ops = torch.ops.lsc_kernels
    for operands in (
        (None, 0.5, None, 2.0, None, 0.1, None, True, None),
        (column, 0.0, column, 0.0, column / 2, 0.0, column, False, None),
        (column, 0.0, None, 2.0, None, 0.1, column, True, [0, 2, 0, 0, 0, 0, 1, 0, 0, 3, 2, 0]),
    ):
        torch.library.opcheck(ops.aggregate_rewards_forward, (scores, *operands))
        for wanted in ((False, False, False), (True, True, True)):
            torch.library.opcheck(
                ops.aggregate_rewards_backward, (upstream, scores.half(), *operands, *wanted)
            )


PROPERTIES = tuple(map(lk.prop, range(7)))


@st.composite
def judged_formulas(draw: st.DrawFn) -> tuple[Formula, Tensor, Tensor]:
    """A formula over K columns in any order, scores, some of them far out, and weights."""
    columns = draw(st.integers(1, len(PROPERTIES)))
    formula = draw(formulas(PROPERTIES[:columns]))
    number = st.one_of(
        st.floats(-4, 4, width=32), st.floats(-40, 40, width=32), st.floats(-100, 100, width=32)
    )
    weight = st.one_of(st.just(1.0), st.floats(0.015625, 4.0, width=32))
    return (
        formula,
        torch.tensor(draw(st.lists(number, min_size=columns, max_size=columns))),
        torch.tensor(draw(st.lists(weight, min_size=columns, max_size=columns))),
    )


def check_truth(got: Tensor, truth: mpmath.mpf, what: str, smallest: float = PROMISED_DOWN_TO) -> None:
    if abs(truth) > smallest:
        error = abs((mpmath.mpf(got.item()) - truth) / truth)
        assert error <= PROMISE, (
            f"{what}: {got.item()} is off {mpmath.nstr(truth, 12)} by {mpmath.nstr(error, 3)}"
        )
    else:
        assert abs(got.item()) <= 2 * smallest, f"{what}: {got.item()}, want {mpmath.nstr(truth, 12)}"


def test_formulas_against_every_outcome(backend: str) -> None:
    @given(judged=judged_formulas())
    @settings(max_examples=few(150), deadline=None)
    def check(judged: tuple[Formula, Tensor, Tensor]) -> None:
        formula, scores, weights = judged
        with mpmath.workdps(DIGITS):
            exact = [{k: mpmath.mpf(x) for k, x in enumerate(each.tolist())} for each in (scores, weights)]
            value = lk.aggregate_rewards(scores, 0.0, formula=formula, weights=weights)
            check_truth(value, utility(formula, *exact), str(formula))
            complement = lk.aggregate_rewards(scores, 0.0, formula=~formula, weights=weights)
            check_truth(complement, utility(~formula, *exact), f"~({formula})")

    check()


def spread_out(scores: list[float]) -> bool:
    """No two are equal in size: there the weakest of two has no derivative."""
    return len({abs(x) for x in scores}) == len(scores)


def test_gradients_of_formulas_against_every_outcome(backend: str) -> None:
    @given(judged=judged_formulas().filter(lambda judged: spread_out((judged[1] * judged[2]).tolist())))
    @settings(max_examples=few(40), deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
    def check(judged: tuple[Formula, Tensor, Tensor]) -> None:
        formula, scores, weights = judged
        _, gradients = with_gradients(
            lambda r, w: lk.aggregate_rewards(r, 0.0, formula=formula, weights=w),
            torch.tensor(1.0),
            [scores, weights],
        )
        with mpmath.workdps(DIGITS):
            exact = [{k: mpmath.mpf(x) for k, x in enumerate(each.tolist())} for each in (scores, weights)]
            for name, found, wanted in zip("zw", gradients, gradient(formula, *exact), strict=True):
                assert found is not None
                for k in wanted:
                    what = f"d ({formula}) / d {name}_{k} at {scores}, {weights}"
                    check_truth(found[k], wanted[k], what, 1e-36)

    check()


def test_formulas_of_scores_far_out(backend: str) -> None:
    """Where no probability is a number any more, only its logarithm."""
    scores = torch.tensor([1e4, 2e4, -1e4, -3e4])
    for formula, wanted in {
        "~(0 & 1)": -1e4,
        "~0 & ~1": -3e4,
        "2 | 3": -1e4,
        "2 & 3": -4e4,
        "~(2 | ~0)": math.log(1.0),
        "at_least(3, 0, 1, 2, 3)": -1e4,
        "~at_least(1, 0, 2)": -1e4,
        "~weakest(0, 1) | 3": -1e4,
    }.items():
        value, (to_scores,) = with_gradients(
            lambda r, f=formula: lk.aggregate_rewards(r, 0.0, formula=f), torch.tensor(1.0), [scores]
        )
        assert value.item() == pytest.approx(wanted, rel=PROMISE), formula
        assert to_scores is not None and set(to_scores.abs().tolist()) <= {0.0, 1.0}, formula


@pytest.mark.parametrize("certain", [False, True])
def test_at_least_of_many(backend: str, generator: Generator, certain: bool) -> None:
    """Against the coefficients of prod (q_k + p_k x), for every threshold of 32 properties."""
    scores = torch.randn(32, generator=generator) * 6 + 20 * certain
    with mpmath.workdps(DIGITS):
        coefficients = [mpmath.mpf(1)]
        for z in map(mpmath.mpf, scores.tolist()):
            p, q = 1 / (1 + mpmath.exp(-z)), 1 / (1 + mpmath.exp(z))
            shifted = [mpmath.mpf(0), *(p * c for c in coefficients)]
            coefficients = [a + b for a, b in zip(shifted, [*(q * c for c in coefficients), 0], strict=True)]
        for least in range(1, 33, 32 // few(32)):
            got = lk.aggregate_rewards(scores, 0.0, formula=lk.at_least(least, *range(32)))
            check_truth(got, mpmath.log(mpmath.fsum(coefficients[least:])), f"at_least {least}")


def test_at_least_all_is_all_and_at_least_one_is_any(backend: str, generator: Generator) -> None:
    rows = few(50)
    scores = torch.randn(rows, 5, generator=generator) * 10
    a, b, c, d, e = PROPERTIES[:5]
    for same, other in (
        (lk.at_least(5, a, b, c, d, e), a & b & c & d & e),
        (lk.at_least(1, a, b, c, d, e), a | b | c | d | e),
        (lk.at_least(2, a & b, ~c), a & b & ~c),
        (~lk.at_least(4, a, b, ~c, d, e), lk.at_least(2, ~a, ~b, c, ~d, ~e)),
        (~(a & b & c) | (d & ~e), ~(a & b & c & (~d | e))),
        (~lk.weakest(a, b), lk.at_least(1, ~lk.weakest(a, b))),
    ):
        first, second = (
            with_gradients(
                lambda r, f=formula: lk.aggregate_rewards(r, 0.3, formula=f, scale=2.0),
                torch.ones(rows),
                [scores],
            )
            for formula in (same, other)
        )
        torch.testing.assert_close(first[0], second[0], rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(first[1][0], second[1][0], rtol=1e-5, atol=1e-30)


@given(judged=judged_formulas(), column=st.integers(0, 6), step=st.floats(0.01, 5))
@settings(max_examples=100, deadline=None)
def test_a_formula_rises_with_a_property_that_is_not_under_a_complement(
    judged: tuple[Formula, Tensor, Tensor], column: int, step: float
) -> None:
    formula, scores, weights = judged
    column %= len(scores)

    def complements(part: Formula) -> int | None:
        if getattr(part, "name", None) == column:
            return 0
        below = [found for each in part.parts if (found := complements(each)) is not None]
        return below[0] + (str(part).startswith("~") and len(part.parts) == 1) if below else None

    higher = scores.double()
    higher[column] += step
    before, after = (
        lk.aggregate_rewards(z, 0.0, formula=formula, weights=weights) for z in (scores.double(), higher)
    )
    change = (after - before).item() * (-1) ** (complements(formula) or 0)
    assert change >= -1e-13 * max(1.0, abs(before.item()))


def test_weakest_takes_the_smallest_and_of_equals_the_first(backend: str) -> None:
    scores = torch.tensor([[1.0, -1.0, 0.5], [2.0, 2.0, 2.0], [90.0, 800.0, 900.0], [-1e4, -2e4, 0.0]])
    value, (to_scores,) = with_gradients(
        lambda r: lk.aggregate_rewards(r, 0.0, formula=lk.weakest(0, 1, 2)), torch.ones(4), [scores]
    )
    torch.testing.assert_close(value, lk.lsc_transform(scores, 0.0).amin(-1), rtol=1e-6, atol=SMALLEST)
    assert to_scores is not None
    assert [row.nonzero().flatten().tolist() for row in to_scores] == [[1], [0], [0], [1]]
    certain = lk.aggregate_rewards(torch.tensor([900.0, 800.0]), 0.0, formula="~weakest(0, 1)")
    assert certain.item() == pytest.approx(-800.0)


def test_the_and_of_all_columns_is_no_formula(backend: str, generator: Generator) -> None:
    scores = torch.randn(9, 3, generator=generator)
    plain = lk.aggregate_rewards(scores, 0.1)
    assert torch.equal(plain, lk.aggregate_rewards(scores, 0.1, formula="0 & 1 & 2"))
    permuted = lk.aggregate_rewards(scores, 0.1, formula="c & a & b", names=["a", "b", "c"])
    torch.testing.assert_close(permuted, plain, rtol=1e-6, atol=0)
    exponents = torch.tensor([1.0, 0.5, 3.0])
    assert torch.equal(
        lk.aggregate_rewards(scores, 0.1, weights=exponents),
        lk.aggregate_rewards(scores, 0.1, formula="0 & 1 ** 0.5 & 2 ** 3"),
    )
    one = lk.aggregate_rewards(scores, 0.1, formula=lk.prop("b"), names=["a", "b", "c"])
    torch.testing.assert_close(one, lk.lsc_transform(scores[:, 1], 0.1), rtol=1e-6, atol=0)


def test_exponents_times_weights(backend: str, generator: Generator) -> None:
    scores, weights = torch.randn(9, 3, generator=generator), torch.rand(3, generator=generator)
    weights.requires_grad_()
    both = lk.aggregate_rewards(scores, 0.0, formula="0 ** 2 | ~2 ** 0.5", weights=weights)
    folded = lk.aggregate_rewards(
        scores, 0.0, formula="0 | ~2", weights=weights * torch.tensor([2.0, 1.0, 0.5])
    )
    assert torch.equal(both, folded)
    gradients = [torch.autograd.grad(u.sum(), weights)[0] for u in (both, folded)]
    torch.testing.assert_close(*gradients)


def test_columns_that_a_formula_does_not_read_count_for_nothing(backend: str) -> None:
    scores = torch.tensor([[1.0, torch.nan, -2.0], [0.5, torch.inf, 3.0]])
    for missing in ("propagate", "ignore"):
        value, (to_scores,) = with_gradients(
            lambda r, m=missing: lk.aggregate_rewards(r, 0.0, formula="0 | ~2", missing=m),
            torch.ones(2),
            [scores],
        )
        assert value.isfinite().all() and to_scores is not None
        assert to_scores[:, 1].tolist() == [0.0, 0.0] and (to_scores[:, [0, 2]] != 0).all()


def test_missing_scores_in_formulas(backend: str) -> None:
    scores = torch.tensor([[torch.nan, 1.0], [1.0, torch.nan], [torch.nan, torch.nan]])
    for formula in ("0 & ~1", "0 | 1", "at_least(1, 0, 1)", "weakest(0, 1)", "~weakest(1, 0)"):
        assert lk.aggregate_rewards(scores, 0.0, formula=formula).isnan().all(), formula
    expected = {
        "0 | 1": (0.0, 0.0, 0.0),
        "weakest(0, 1)": (*lk.lsc_transform(torch.tensor([1.0, 1.0]), 0.0).tolist(), 0.0),
        "0 & ~1": (lk.lsc_transform(torch.tensor(-1.0), 0.0).item(), -math.inf, -math.inf),
    }
    for formula, wanted in expected.items():
        value, (to_scores,) = with_gradients(
            lambda r, f=formula: lk.aggregate_rewards(r, 0.0, formula=f, missing="ignore"),
            torch.ones(3),
            [scores],
        )
        assert value.tolist() == pytest.approx(wanted)
        assert to_scores is not None and to_scores.isfinite().all()
        assert (to_scores[scores.isnan()] == 0).all()


def test_certain_scores_in_formulas(backend: str) -> None:
    """Infinite scores have a value and a finite gradient under every connective."""
    inf = torch.inf
    scores = torch.tensor([[inf, inf], [inf, -inf], [-inf, inf], [-inf, -inf], [inf, 1.0], [1.0, -inf]])
    for formula, wanted in {
        "0 & 1": (0.0, -inf, -inf, -inf, None, -inf),
        "0 | 1": (0.0, 0.0, 0.0, -inf, 0.0, None),
        "~0 & 1": (-inf, -inf, 0.0, -inf, -inf, -inf),
        "~(0 & 1)": (-inf, 0.0, 0.0, 0.0, None, 0.0),
        "~(0 | ~1)": (-inf, -inf, 0.0, -inf, -inf, -inf),
        "at_least(2, 0, ~1)": (-inf, 0.0, -inf, -inf, None, None),
        "weakest(0, 1)": (0.0, -inf, -inf, -inf, None, -inf),
        "~weakest(0, 1)": (-inf, 0.0, 0.0, 0.0, None, 0.0),
    }.items():
        value, (to_scores,) = with_gradients(
            lambda r, f=formula: lk.aggregate_rewards(r, 0.0, formula=f), torch.ones(6), [scores]
        )
        assert not value.isnan().any() and to_scores is not None and to_scores.isfinite().all(), formula
        for row, expected in enumerate(wanted):
            assert expected is None or value[row].item() == expected, (formula, row)


def test_weight_zero_in_a_formula_is_certainly_good(backend: str) -> None:
    scores = torch.tensor([[1.0, -torch.inf], [1.0, torch.nan]])
    weights = torch.tensor([0.5, 0.0])
    value, (to_scores, _) = with_gradients(
        lambda r, w: lk.aggregate_rewards(r, 0.0, weights=w, formula="weakest(0, 1)"),
        torch.ones(2),
        [scores, weights],
    )
    half = 0.5 * math.log(1 / (1 + math.exp(-1)))
    assert value.tolist() == pytest.approx([half, half], rel=PROMISE)
    assert to_scores is not None and to_scores[:, 1].tolist() == [0.0, 0.0] and (to_scores[:, 0] > 0).all()
    assert lk.aggregate_rewards(scores, 0.0, weights=weights, formula="0 | 1").tolist() == [0.0, 0.0]


def test_floor_in_formulas(backend: str) -> None:
    """The worst and the best score of a judge who is wrong at rate f."""
    scores, f = torch.tensor([[-200.0], [200.0]]), 0.25
    assert lk.aggregate_rewards(scores, 0.0, formula="0", floor=f).tolist() == pytest.approx(
        [math.log(f), 0.0]
    )
    not_good = lk.aggregate_rewards(scores, 0.0, formula="~0", floor=f)
    assert not_good.tolist() == pytest.approx([math.log(1 - f), math.log(1 - f) - 200])
    rows = torch.tensor([[-math.inf, 0.3], [-800.0, -0.2], [-30.0, math.inf], [0.4, 0.1]])

    def step(r: Tensor, s: Tensor) -> Tensor:
        return lk.aggregate_rewards(r, 0.1, formula="0 & 1", floor=f, scale=s)

    value, gradients = with_gradients(step, torch.ones(4), [rows, torch.tensor([1.3, 0.7])])
    truth, true_gradients = with_gradients(
        step, torch.ones(4).double(), [rows.double(), torch.tensor([1.3, 0.7]).double()]
    )
    for got, wanted in zip((value, *gradients), (truth, *true_gradients), strict=True):
        assert got is not None and wanted is not None
        assert got.flatten().tolist() == pytest.approx(wanted.flatten().tolist(), rel=1e-5, abs=1e-9)


FORMULAS = [
    "0 & ~1",
    "0 | 1 ** 0.5 & ~2",
    "~at_least(2, 0, ~1, 2)",
    "at_least(2, 0, 1 ** 3, weakest(2, 3) | ~4, 5 & 6)",
    "weakest(1, ~0) | 2",
]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_formulas_with_every_operand(
    backend: str, generator: Generator, formula: str, dtype: torch.dtype
) -> None:
    rows, columns = few(40), 7
    shapes = ((rows, columns), (columns,), (rows, 1), (rows, columns), (columns,))
    scores, reference, scale, weights, floor = (torch.rand(shape, generator=generator) for shape in shapes)
    scores, floor[0] = ((scores - 0.5) * 40).to(dtype), 0.0
    scores[::5] *= 20  # beyond what probabilities themselves could say
    upstream = torch.randn(rows, generator=generator)
    for name in instruction_sets(backend):
        with instruction_set(name):
            check_against_fp64(
                lambda r, ref, s, w: lk.aggregate_rewards(
                    r, ref, scale=s, weights=w, floor=floor, formula=formula
                ),
                upstream,
                [scores, reference, scale + 0.5, weights],
                3e-6,
                full=(rows, columns),
            )


@pytest.mark.parametrize("formula", FORMULAS)
def test_gradcheck_of_formulas(generator: Generator, formula: str) -> None:
    inputs = [torch.randn(3, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2)]
    inputs += [torch.rand(7, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2)]
    floor = torch.rand(7, generator=generator, dtype=torch.float64) / 2
    assert torch.autograd.gradcheck(
        lambda r, ref, s, w: lk.aggregate_rewards(r, ref, scale=s, weights=w, floor=floor, formula=formula),
        [tensor.requires_grad_() for tensor in inputs],
    )


def test_a_row_of_a_formula_depends_on_nothing_beside_it(backend: str, generator: Generator) -> None:
    rows = 3 * few(1000)
    scores = torch.randn(rows, 7, generator=generator) * 9
    for formula in FORMULAS:
        whole = lk.aggregate_rewards(scores, 0.1, formula=formula)
        some = scores[rows // 3 : rows // 3 + 2]
        assert torch.equal(whole[rows // 3 :][:2], lk.aggregate_rewards(some, 0.1, formula=formula))
        shaped = lk.aggregate_rewards(scores.view(3, rows // 3, 7), 0.1, formula=formula)
        assert torch.equal(whole.view(3, rows // 3), shaped)
    for count in (0, 1):
        assert lk.aggregate_rewards(scores[:count], 0.1, formula=FORMULAS[0]).shape == (count,)


@pytest.mark.parametrize("missing", ["propagate", "ignore"])
def test_a_row_of_a_formula_depends_neither_on_its_place_nor_on_what_is_far_out_beside_it(
    backend: str, generator: Generator, missing: str
) -> None:
    rows = few(301)
    scores = torch.randn(rows, 7, generator=generator) * 5
    scores[1::7] *= 40
    scores[::4, 2], scores[::5, 5], scores[::6, 0] = torch.nan, torch.inf, -torch.inf
    weights = torch.rand(7, generator=generator)

    def both(of: Tensor) -> list[Tensor]:
        value, gradients = with_gradients(
            lambda r, w: lk.aggregate_rewards(r, 0.1, formula=FORMULAS[3], weights=w, missing=missing),
            torch.ones(len(of)),
            [of, weights.expand(of.shape)],
        )
        assert gradients[0] is not None and gradients[1] is not None
        return [value, gradients[0], gradients[1]]

    for name in instruction_sets(backend):
        with instruction_set(name):
            whole = both(scores)
            pieces = [both(piece) for piece in scores.split(few(37))]
            for each, parts in zip(whole, zip(*pieces, strict=True), strict=True):
                assert torch.equal(each.nan_to_num(nan=7.0), torch.cat(parts).nan_to_num(nan=7.0))


@pytest.mark.parametrize("formula", [FORMULAS[3], lk.prop("a") & ~(lk.prop("b") ** 2), None])
def test_compile_with_formulas(backend: str, generator: Generator, formula: Formula | str | None) -> None:
    names = tuple("abcdefg")
    weights = torch.rand(7, generator=generator)
    calls = [
        (torch.randn(n, 7, generator=generator).requires_grad_(), weights.clone().requires_grad_())
        for n in (2, 4, 3)
    ]
    compile_once(lambda r, w: [lk.aggregate_rewards(r, 0.0, weights=w, formula=formula, names=names)], calls)


def test_a_compiled_call_takes_formulas_by_what_they_say(generator: Generator) -> None:
    counter = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    call = torch.compile(
        lambda r, formula: lk.aggregate_rewards(r, 0.0, formula=formula, names=("a", "b")),
        fullgraph=True,
        backend=counter,
    )
    scores = torch.randn(3, 2, generator=generator)
    for formula, graphs in (
        (lk.prop("a") & ~(lk.prop("b") ** 2), 1),
        (lk.prop("a") & ~(lk.prop("b") ** 2), 1),
        (lk.prop("a") & ~(lk.prop("b") ** 3), 2),
        (lk.prop("a") | ~(lk.prop("b") ** 3), 3),
    ):
        expected = lk.aggregate_rewards(scores, 0.0, formula=formula, names=("a", "b"))
        assert torch.equal(call(scores, formula), expected) and counter.frame_count == graphs


@needs_native
@pytest.mark.parametrize(
    "program",
    [
        [],
        [0, 0],
        [0, 3, 0],
        [0, -1, 0],
        [7, 0, 0],
        [2, 2, 0],
        [0, 0, 0, 2, 2, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 4, 2, 3],
        [0, 0, 0] + [1, 0, 0] * 128,
        [0, 0, 0] * 40 + [2, 40, 0],
    ],
    ids=str,
)
def test_a_program_that_would_read_outside_is_refused(program: list[int]) -> None:
    with pytest.raises((ValueError, RuntimeError), match="program: "):
        torch.ops.lsc_kernels.aggregate_rewards_forward(
            torch.zeros(2, 3), None, 0.0, None, 1.0, None, 0.0, None, False, program
        )


S = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.aggregate_rewards([[1.0]], 0.0), TypeError, "scores must be a tensor; got list"),
    (lambda: lk.aggregate_rewards(S.long(), 0.0), TypeError, "scores must be float32.*got torch.int64"),
    (
        lambda: lk.aggregate_rewards(torch.tensor(1.0), 0.0),
        ValueError,
        r"scores must be \[..., K\]; got a scalar",
    ),
    (lambda: lk.aggregate_rewards(torch.zeros(4, 0), 0.0), ValueError, "scores must be .* K > 0"),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="a & b"),
        ValueError,
        "formula names the property 'a', so names must say which column",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="helpfull", names=["helpful", "kind", "brief"]),
        ValueError,
        "'helpfull', which is not in names, .* did you mean 'helpful'",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="0 & 3"),
        ValueError,
        "formula reads column 3, but scores has K = 3",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="b | ~1", names=["a", "b", "c"]),
        ValueError,
        "'b' and 1 are the same property",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="0 & & 1"),
        ValueError,
        r"formula: .*\n  0 & & 1\n      \^",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula=0),
        TypeError,
        "formula must be a formula, a string or None",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="0 | 1", weights=torch.tensor([1.0, -2.0, 1.0])),
        ValueError,
        "weights must be >= 0 with a formula; got -2",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, weights=torch.tensor([1.0, math.nan, 1.0])),
        ValueError,
        "weights must be finite; got nan",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, weights=torch.tensor([[1.0], [-math.inf]])),
        ValueError,
        "weights must be finite; got -inf",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, formula="0 & 1", weights=torch.tensor([1.0, -1.0, math.inf])),
        ValueError,
        "weights must be finite; got inf",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, names=["a", "b"]),
        ValueError,
        "names must have K = 3 entries.*got 2",
    ),
    (lambda: lk.aggregate_rewards(S, 0.0, names=["a", "b", "a"]), ValueError, "names must differ"),
    *(
        (lambda n=n: lk.aggregate_rewards(S, 0.0, names=n), TypeError, "names must be a sequence of strings")
        for n in ("abc", {"a", "b", "c"}, 1.5, (name for name in "abc"))
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, names=["a", "b", 3]),
        TypeError,
        "names must be a sequence of strings",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, missing="drop"),
        ValueError,
        "missing must be one of propagate, ignore, raise; got 'drop'",
    ),
    (
        lambda: lk.aggregate_rewards(S.to("meta"), 0.0, missing="raise"),
        ValueError,
        "missing='raise' .* CPU only; got scores on meta",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, weights=[1.0, 1.0, 1.0]),
        TypeError,
        "weights must be a tensor; got list",
    ),
    (lambda: lk.aggregate_rewards(S, 0.0, weights=torch.ones(3).int()), TypeError, "weights must be float32"),
    (
        lambda: lk.aggregate_rewards(S, 0.0, weights=torch.ones(2)),
        ValueError,
        "weights must broadcast against scores",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, weights=torch.ones(3, device="meta")),
        ValueError,
        "weights must be on the device of scores",
    ),
    (
        lambda: lk.aggregate_rewards(S, torch.zeros(2)),
        ValueError,
        r"reference_reward must broadcast against scores, \[2, 3\]; got \[2\]",
    ),
    (lambda: lk.aggregate_rewards(S, None), TypeError, "reference_reward must be a float or a tensor"),
    (
        lambda: lk.aggregate_rewards(S[:, :1], torch.zeros(3)),
        ValueError,
        "scores must have one column per property",
    ),
    (lambda: lk.aggregate_rewards(S, 0.0, scale=0.0), ValueError, "scale must be finite and > 0; got 0"),
    (
        lambda: lk.aggregate_rewards(S, 0.0, scale=torch.tensor([1.0, -1.0, 1.0])),
        ValueError,
        "scale must be finite and > 0; got -1",
    ),
    (lambda: lk.aggregate_rewards(S, 0.0, floor=1.0), ValueError, r"floor must be in \[0, 1\); got 1.0"),
    (
        lambda: lk.aggregate_rewards(S, 0.0, floor=torch.zeros(3, requires_grad=True)),
        ValueError,
        "floor has no gradient",
    ),
]


@pytest.mark.cpu
@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
