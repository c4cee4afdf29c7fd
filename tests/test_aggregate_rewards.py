"""aggregate_rewards: values, gradients, weights, missing scores, broadcasting, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _modes import compile_once, needs_native
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

PROMISE = 1e-5


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
    with pytest.raises(ValueError, match=r"scores has NaN .* the first is scores\[0, 1\]"):
        lk.aggregate_rewards(scores, reference, missing="raise")
    lk.aggregate_rewards(scores[2:], reference, missing="raise")


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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(whole, lk.aggregate_rewards(scores, 0.1))
    finally:
        torch.set_num_threads(threads)


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
    torch._dynamo.reset()
    checked = torch.compile(
        lambda r: lk.aggregate_rewards(r, 0.0, missing="raise"), fullgraph=True, backend="aot_eager"
    )
    checked(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="scores has NaN"):
        checked(torch.tensor([[0.0, torch.nan]]))
    torch._dynamo.reset()


@needs_native
def test_opcheck(generator: Generator) -> None:
    scores, upstream = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    column = torch.rand(3, generator=generator)
    ops = torch.ops.lsc_kernels
    for operands in (
        (None, 0.5, None, 2.0, None, 0.1, None, True),
        (column, 0.0, column, 0.0, column / 2, 0.0, column, False),
    ):
        torch.library.opcheck(ops.aggregate_rewards_forward, (scores, *operands))
        for wanted in ((False, False, False), (True, True, True)):
            torch.library.opcheck(
                ops.aggregate_rewards_backward, (upstream, scores.half(), *operands, *wanted)
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
        "formula: this version has only None",
    ),
    (
        lambda: lk.aggregate_rewards(S, 0.0, names=["a", "b"]),
        ValueError,
        "names must have K = 3 entries.*got 2",
    ),
    (lambda: lk.aggregate_rewards(S, 0.0, names=["a", "b", "a"]), ValueError, "names must differ"),
    (lambda: lk.aggregate_rewards(S, 0.0, names="abc"), TypeError, "names must be a sequence of strings"),
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


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
