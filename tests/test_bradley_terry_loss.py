"""bradley_terry_loss: values, gradients, margin, penalty, reductions, modes, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _upstream
import pytest
import torch
from _modes import compile_once, needs_native, on_one_thread
from _reward_side import (
    DTYPES,
    check_against_fp64,
    instruction_set,
    instruction_sets,
    relative_error,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk

PROMISE = 4e-7


def by_hand(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    d = chosen.double() - rejected.double() - (margin.double() if isinstance(margin, Tensor) else margin)
    both = chosen.double() + rejected.double()
    return torch.nn.functional.softplus(-d, threshold=800.0) + center * both * both


def scores(generator: Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """Small and large differences, and large scores that nearly agree."""
    chosen, rejected = 12 * torch.randn(2, *shape, generator=generator)
    near = torch.rand(shape, generator=generator) < 0.3
    level = torch.where(near, 1000.0, 0.0)
    return chosen + level, torch.where(near, chosen + 0.01 * rejected, rejected) + level


@pytest.mark.parametrize("margin", [None, 0.7, 10.1, "tensor"])
def test_values(backend: str, generator: Generator, margin: Any) -> None:
    chosen, rejected = scores(generator, 3, 1001)
    if margin == "tensor":
        # as large as the difference itself: what is left of it is all that was rounded away before
        margin = chosen - rejected + torch.randn(3, 1001, generator=generator) * 1e-3
    truth = by_hand(chosen, rejected, 0.0 if margin is None else margin)
    for name in instruction_sets(backend):
        with instruction_set(name):
            each = lk.bradley_terry_loss(chosen, rejected, margin=margin, reduction="none")
            assert each.shape == (3, 1001) and relative_error(each, truth) <= PROMISE
            for reduction, total in (("mean", truth.mean()), ("sum", truth.sum())):
                got = lk.bradley_terry_loss(chosen, rejected, margin=margin, reduction=reduction)
                assert got.shape == () and relative_error(got, total) <= PROMISE


def test_what_rounding_takes_from_a_difference_is_not_lost(backend: str) -> None:
    chosen, rejected = torch.tensor([1e9, 90.0, 1e8]), torch.tensor([-1.0, 1e-6, 3.0])
    margin = torch.tensor([1e9, 0.0, 0.0])
    got = lk.bradley_terry_loss(chosen, rejected, margin=margin, reduction="none")
    assert got[0].item() == pytest.approx(math.log1p(math.exp(-1)), rel=PROMISE)
    assert relative_error(got[1:2], by_hand(chosen, rejected)[1:2]) <= PROMISE
    assert got[2].item() == 0.0


@pytest.mark.parametrize("center", [0.01, 3.0])
def test_the_penalty_keeps_scores_near_zero(backend: str, generator: Generator, center: float) -> None:
    chosen, rejected = scores(generator, 501)
    got = lk.bradley_terry_loss(chosen, rejected, center=center, reduction="none")
    assert relative_error(got, by_hand(chosen, rejected, center=center)) <= PROMISE
    shifted = [score.requires_grad_() for score in (chosen + 5, rejected + 5)]
    lk.bradley_terry_loss(*shifted, center=center).backward()
    pull = sum(score.grad.sum() for score in shifted if score.grad is not None)
    both = (shifted[0] + shifted[1]).double().detach()
    assert float(pull) == pytest.approx(float(4 * center * both.mean()), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("center", [0.0, 0.25])
def test_gradients(
    backend: str, generator: Generator, dtype: torch.dtype, reduction: str, center: float
) -> None:
    chosen, rejected = (torch.randn(9, 37, generator=generator) * 6 for _ in range(2))
    margin = torch.rand(37, generator=generator)
    upstream = torch.randn((9, 37) if reduction == "none" else (), generator=generator)
    check_against_fp64(
        lambda c, r, m: lk.bradley_terry_loss(c, r, margin=m, center=center, reduction=reduction),
        upstream,
        [chosen.to(dtype), rejected.to(dtype), margin],
        3e-6,
        full=(9, 37),
    )


def test_gradients_of_certain_pairs_are_accurate_to_their_own_size(
    backend: str, generator: Generator
) -> None:
    chosen, rejected = torch.rand(1000, generator=generator) * 80, torch.zeros(1000)
    _, (to_chosen, to_rejected) = with_gradients(
        lambda c, r: lk.bradley_terry_loss(c, r, reduction="sum"), torch.tensor(1.0), [chosen, rejected]
    )
    assert to_chosen is not None and to_rejected is not None
    assert relative_error(to_rejected, torch.sigmoid(-chosen.double())) <= PROMISE
    assert torch.equal(to_chosen, -to_rejected)


def test_mixed_dtypes(backend: str, generator: Generator) -> None:
    chosen, rejected = (torch.randn(50, generator=generator) for _ in range(2))
    check_against_fp64(
        lambda c, r: lk.bradley_terry_loss(c, r, margin=0.25),
        torch.tensor(1.0),
        [chosen.bfloat16(), rejected],
        3e-6,
    )


def test_gradcheck(generator: Generator) -> None:
    inputs = [torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda c, r, m, how=reduction: lk.bradley_terry_loss(c, r, margin=m, center=0.3, reduction=how),
            inputs,
        )


@given(rows=st.integers(0, 600), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_any_length(rows: int, seed: int) -> None:
    chosen, rejected = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed)) * 5
    each = lk.bradley_terry_loss(chosen, rejected, reduction="none")
    assert relative_error(each, by_hand(chosen, rejected)) <= PROMISE
    assert (
        relative_error(
            lk.bradley_terry_loss(chosen, rejected, reduction="sum"), by_hand(chosen, rejected).sum()
        )
        <= PROMISE
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_to_one_margin_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """A term alone is below what fp16 holds."""
    margin = torch.zeros((), dtype=dtype, requires_grad=True)
    lk.bradley_terry_loss(torch.full((1 << 18,), 5.0), torch.zeros(1 << 18), margin=margin).backward()
    assert margin.grad is not None and margin.grad.dtype is dtype
    assert margin.grad.item() == pytest.approx(1 / (1 + math.exp(5)), rel=torch.finfo(dtype).eps)


def test_no_pairs(backend: str) -> None:
    empty = torch.zeros(0, requires_grad=True)
    assert lk.bradley_terry_loss(empty, empty).isnan()
    assert lk.bradley_terry_loss(empty, empty, reduction="sum").item() == 0.0
    assert lk.bradley_terry_loss(empty, empty, reduction="none").shape == (0,)
    lk.bradley_terry_loss(empty, torch.zeros(0)).backward()
    assert empty.grad is not None and empty.grad.shape == (0,)


def test_infinite_and_missing_scores(backend: str) -> None:
    inf = torch.inf
    chosen = torch.tensor([inf, -inf, 1.0, 1.0, inf, torch.nan, 1.0])
    rejected = torch.tensor([1.0, 1.0, inf, -inf, inf, 1.0, 1.0])
    got = lk.bradley_terry_loss(chosen, rejected, reduction="none")
    assert got[:4].tolist() == [0.0, inf, inf, 0.0] and got[4:6].isnan().all() and got[6].isfinite()
    _, gradients = with_gradients(
        lambda c, r: lk.bradley_terry_loss(c, r, center=0.1, reduction="none"),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
        [chosen, rejected],
    )
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_any_strides_and_the_same_bits(backend: str, generator: Generator) -> None:
    chosen, rejected = scores(generator, 300, 201)
    expected = lk.bradley_terry_loss(chosen, rejected, center=0.1)
    assert torch.equal(expected, lk.bradley_terry_loss(chosen, rejected, center=0.1))
    strided = [score.T.contiguous().T for score in (chosen, rejected)]
    assert torch.equal(expected, lk.bradley_terry_loss(*strided, center=0.1))
    with on_one_thread():
        assert torch.equal(expected, lk.bradley_terry_loss(chosen, rejected, center=0.1))
    repeated = lk.bradley_terry_loss(chosen[:1].expand(5, 201), rejected[:1].expand(5, 201), reduction="none")
    assert torch.equal(repeated[4], lk.bradley_terry_loss(chosen[0], rejected[0], reduction="none"))


def test_modes(backend: str, generator: Generator) -> None:
    chosen, rejected = scores(generator, 20)
    chosen.requires_grad_()
    expected = lk.bradley_terry_loss(chosen, rejected)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(lk.bradley_terry_loss(chosen, rejected), expected)
    (first,) = torch.autograd.grad(expected, chosen, create_graph=True)
    with pytest.raises(RuntimeError, match="bradley_terry_loss has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    margin = torch.rand(1, generator=generator)
    calls = [
        (*(torch.randn(n, generator=generator).requires_grad_() for _ in range(2)), margin.requires_grad_())
        for n in (4, 7, 5)
    ]
    for reduction in ("mean", "none"):
        compile_once(
            lambda c, r, m, how=reduction: [lk.bradley_terry_loss(c, r, margin=m, center=0.1, reduction=how)],
            calls,
        )


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    pairs = torch.randn(3, *_upstream.SHAPE, generator=generator).unbind()

    def loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        return lk.bradley_terry_loss(chosen, rejected, margin=margin, center=0.1, reduction="none")

    _upstream.check(loss, pairs, generator)


def test_one_score_alone(backend: str, generator: Generator) -> None:
    """What has no gradient is not made, and changes nothing for the other."""
    pairs = torch.randn(2, 300, generator=generator).unbind()
    both = [score.clone().requires_grad_() for score in pairs]
    wanted = torch.autograd.grad(lk.bradley_terry_loss(*both), both)
    for alone in range(2):
        given = [score.clone().requires_grad_(place == alone) for place, score in enumerate(pairs)]
        lk.bradley_terry_loss(*given).backward()
        assert torch.equal(given[alone].grad, wanted[alone]) and given[1 - alone].grad is None


@needs_native
def test_opcheck(generator: Generator) -> None:
    chosen, rejected, margin = (torch.randn(5, generator=generator) for _ in range(3))
    ops = torch.ops.lsc_kernels
    for options in ((None, 0.5, 0.0), (margin, 0.0, 0.1)):
        for reduction in range(3):
            upstream = torch.randn(5) if reduction == 0 else torch.tensor(2.0)
            arguments = (chosen.half(), rejected.half(), *options, reduction)
            torch.library.opcheck(ops.bradley_terry_loss_forward, arguments)
            torch.library.opcheck(
                ops.bradley_terry_loss_backward, (upstream, *arguments, True, reduction == 0, True)
            )


S = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.bradley_terry_loss([1.0], S), TypeError, "chosen must be a tensor; got list"),
    (lambda: lk.bradley_terry_loss(S, S.long()), TypeError, "rejected must be float32.*got torch.int64"),
    (
        lambda: lk.bradley_terry_loss(S, S[0]),
        ValueError,
        r"rejected must have the shape of chosen, \[2, 3\]; got \[3\]",
    ),
    (lambda: lk.bradley_terry_loss(S, S.to("meta")), ValueError, "rejected must be on the device of chosen"),
    (lambda: lk.bradley_terry_loss(S, S, margin="1"), TypeError, "margin must be a float; got str"),
    (lambda: lk.bradley_terry_loss(S, S, margin=math.inf), ValueError, "margin must be finite; got inf"),
    (
        lambda: lk.bradley_terry_loss(S, S, margin=torch.zeros(2)),
        ValueError,
        r"margin must broadcast against chosen, \[2, 3\]; got \[2\]",
    ),
    (
        lambda: lk.bradley_terry_loss(S, S, margin=torch.zeros(3).long()),
        TypeError,
        "margin must be float32",
    ),
    (lambda: lk.bradley_terry_loss(S, S, center=-0.1), ValueError, "center must be >= 0; got -0.1"),
    (lambda: lk.bradley_terry_loss(S, S, center=torch.tensor(0.1)), TypeError, "center must be a float"),
    (
        lambda: lk.bradley_terry_loss(S, S, reduction="max"),
        ValueError,
        "reduction must be one of none, sum, mean; got 'max'",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
