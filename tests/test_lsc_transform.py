"""lsc_transform: the promised accuracy for every z, gradients, broadcasting, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import _upstream
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from _modes import compile_once, needs_native
from _reward_side import (
    DTYPES,
    check_against_fp64,
    close,
    instruction_set,
    instruction_sets,
    relative_error,
    with_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch._subclasses import FakeTensorMode

import lsc_kernels as lk

PROMISE = 4e-7
FLOORS = (0.0, 0.05, 0.5, 0.999, 1e-6, 1e-30, 1e-300)


def every_z() -> Tensor:
    """Bit patterns all over fp32, subnormals included, and the range where u changes its form, densely."""
    patterns = torch.arange(1, 0x7F800000, 40009, dtype=torch.int64).to(torch.int32).view(torch.float32)
    positive = torch.cat(
        [torch.zeros(1), patterns, torch.linspace(0, 110, 20001), torch.linspace(0, 2, 10001)]
    )
    return torch.cat([positive, -positive])


def exact(z: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """u and du/dz in fp64, in a form of its own for each side of 0."""
    e = torch.exp(-z.abs())
    below = z < 0
    if floor == 0.0:
        return torch.where(below, z, 0.0) - torch.log1p(e), torch.where(below, 1.0, e) / (1 + e)
    odds_against = torch.where(below, (1 - floor) / (floor + e), (1 - floor) * e / (1 + floor * e))
    share = torch.where(below, torch.sigmoid(z - math.log(floor)), e / (1 + floor * e))  # fp64 ends at e^-745
    slope = (1 - floor) * share / (1 + e)
    return -torch.log1p(odds_against), slope


@pytest.mark.parametrize("floor", FLOORS)
def test_accuracy_for_every_z(backend: str, floor: float) -> None:
    z = every_z()
    u, slope = exact(z.double(), floor)
    for name in instruction_sets(backend):
        with instruction_set(name):
            got, (got_slope,) = with_gradients(
                lambda r: lk.lsc_transform(r, 0.0, floor=floor), torch.ones_like(z), [z]
            )
        assert relative_error(got, u) <= PROMISE, name
        assert got_slope is not None and relative_error(got_slope, slope) <= PROMISE, name
        assert (got <= 0).all() and (got_slope >= 0).all() and (got_slope <= 1).all()


@pytest.mark.parametrize("scale", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_the_difference_is_not_rounded(
    backend: str, generator: Generator, scale: float, floor: float
) -> None:
    """u is about -e^-z for large z, so a z that was rounded to fp32 shows: an ulp of 80 is 8e-6."""
    reward = torch.randn(4000, generator=generator) * 30
    elementwise = torch.randn(4000, generator=generator) * 30
    scalar = float(torch.randn((), generator=generator, dtype=torch.float64) * 100)
    for reference in (elementwise, scalar, torch.tensor(scalar, dtype=torch.float32)):
        wide = reference.double() if isinstance(reference, Tensor) else reference
        u, slope = exact((reward.double() - wide) / scale, floor)
        for name in instruction_sets(backend):
            with instruction_set(name):
                got, (to_reward,) = with_gradients(
                    lambda r, reference=reference: lk.lsc_transform(r, reference, scale=scale, floor=floor),
                    torch.ones_like(reward),
                    [reward],
                )
            assert relative_error(got, u) <= PROMISE, name
            normal = slope >= torch.finfo(torch.float32).tiny  # the promise is for du/dz
            assert to_reward is not None
            assert relative_error(to_reward[normal], (slope / scale)[normal]) <= PROMISE, name


def test_ends(backend: str) -> None:
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan])
    for floor in (0.0, 0.25, torch.tensor([0.0, 0.0, 0.25])):
        got, (slope,) = with_gradients(
            lambda r, f=floor: lk.lsc_transform(r, 0.0, floor=f), torch.ones(3), [ends]
        )
        lowest = math.log(floor) if isinstance(floor, float) and floor > 0 else -math.inf
        assert slope is not None
        assert got[0].item() == pytest.approx(lowest) and slope[0].item() == (
            1.0 if lowest == -math.inf else 0.0
        )
        assert got[1].item() == 0.0 and slope[1].item() == 0.0
        assert got[2].isnan() and slope[2].isnan()


def test_definition() -> None:
    """The eager definition is the formula, and it does not end where the formula does."""
    z = torch.linspace(-15, 15, 301, dtype=torch.float64)
    for floor in (0.0, 0.1, 0.9):
        literal = torch.log(floor + (1 - floor) * torch.sigmoid(z))
        # the formula taken literally is itself off by an ulp of 1
        close(lk.lsc_transform(z, 0.0, floor=floor), literal, 1e-12, 1e-15)
    one = torch.tensor(100.0, dtype=torch.float64)
    assert lk.lsc_transform(one, 0.0).item() == pytest.approx(-math.exp(-100.0), rel=1e-15)


@pytest.mark.parametrize("floor", [0.0, 0.1, torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)])
def test_gradcheck(generator: Generator, floor: float | Tensor) -> None:
    def double(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = [double(3, 4) * 5, double(4), double(3, 1).exp()]
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, ref, s: lk.lsc_transform(r, ref, scale=s, floor=floor), inputs)


@pytest.mark.cpu
def test_operands_without_values(backend: str, generator: Generator) -> None:
    """Where nothing can be looked at: fake tensors, and vmap over a scale."""
    reward, scale = torch.randn(4, 3, generator=generator), torch.rand(4, generator=generator) + 0.5
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(each) for each in (reward, scale)]
        assert lk.lsc_transform(fake[0], 0.0, scale=fake[1][:3]).shape == (4, 3)
        assert lk.aggregate_rewards(fake[0], 0.0, weights=fake[1][:3]).shape == (4,)
    mapped = torch.vmap(lambda r, s: lk.lsc_transform(r, 0.0, scale=s))(reward, scale)
    assert torch.equal(mapped, lk.lsc_transform(reward, 0.0, scale=scale.unsqueeze(-1)))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_is_refused(backend: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, dtype=dtype)
    with forward_ad.dual_level():
        assert lk.lsc_transform(x, 0.0).shape == (2,), "no tangent, no error"
        with pytest.raises(NotImplementedError, match="lsc_transform has no forward-mode derivative"):
            lk.lsc_transform(forward_ad.make_dual(x, torch.ones_like(x)), 0.0)
    with pytest.raises(NotImplementedError, match="lsc_transform has no forward-mode derivative"):
        torch.func.jacfwd(lambda r: lk.lsc_transform(r, 0.0))(x)


SHAPES = [
    ((5, 3), (), ()),
    ((5, 3), (3,), (3,)),
    ((5, 3), (5, 1), (5, 3)),
    ((3,), (5, 3), ()),
    ((2, 1, 3), (4, 1), (1,)),
    ((), (), ()),
    ((), (3,), ()),
    ((7,), (7,), (7,)),
    ((0, 3), (3,), ()),
    ((4, 0), (), (4, 1)),
    ((4, 0), (0,), (4, 0)),
    ((0, 0), (), (0,)),
    ((300, 2), (2,), (2,)),
    ((2, 700), (700,), (700,)),
    ((1, 3), (3,), ()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reward_shape, reference_shape, scale_shape", SHAPES)
def test_broadcasting(
    backend: str,
    generator: Generator,
    dtype: torch.dtype,
    reward_shape: tuple[int, ...],
    reference_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
) -> None:
    reward = torch.randn(reward_shape, generator=generator) * 4
    reference = torch.randn(reference_shape, generator=generator)
    scale = torch.rand(scale_shape, generator=generator) + 0.5
    shape = torch.broadcast_shapes(reward_shape, reference_shape, scale_shape)
    upstream = torch.randn(shape, generator=generator)
    for floor in (0.0, torch.rand(shape, generator=generator)):
        check_against_fp64(
            lambda r, ref, s, f=floor: lk.lsc_transform(r, ref, scale=s, floor=f),
            upstream,
            [reward.to(dtype), reference.to(dtype), scale.to(dtype)],
            1e-6,
            full=shape,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(backend: str, generator: Generator, dtype: torch.dtype, reference_dtype: torch.dtype) -> None:
    reward = (torch.randn(40, 5, generator=generator) * 6).to(dtype)
    reference = torch.randn(5, generator=generator).to(reference_dtype)
    upstream = torch.randn(40, 5, generator=generator)
    check_against_fp64(lk.lsc_transform, upstream, [reward, reference], 1e-6, full=(40, 5))
    number = lk.lsc_transform(reward, 0.5)
    assert number.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert relative_error(number, exact(reward.double() - 0.5, 0.0)[0]) <= PROMISE


def layouts(tensor: Tensor) -> list[Tensor]:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    wide[..., ::2] = tensor
    return [tensor.mT.contiguous().mT, wide[..., ::2], tensor[:1].expand(tensor.shape), tensor.flip(0)]


def test_any_strides(backend: str, generator: Generator) -> None:
    reward, reference = (torch.randn(6, 5, generator=generator) for _ in range(2))
    upstream = torch.randn(6, 5, generator=generator).mT.contiguous().mT
    for strided_reward, strided_reference in zip(layouts(reward), layouts(reference), strict=True):
        plain = with_gradients(
            lk.lsc_transform, upstream, [strided_reward.contiguous(), strided_reference.contiguous()]
        )
        before = strided_reward.clone()
        value = lk.lsc_transform(strided_reward, strided_reference)
        assert torch.equal(value, plain[0]) and torch.equal(strided_reward, before)
        leaf = strided_reward.detach().requires_grad_()
        lk.lsc_transform(leaf, strided_reference).backward(upstream)
        assert leaf.grad is not None and torch.equal(leaf.grad, plain[1][0])


def test_a_row_depends_on_nothing_beside_it(backend: str, generator: Generator) -> None:
    reward = torch.randn(1000, 3, generator=generator) * 9
    reference = torch.randn(3, generator=generator)
    for options in ({}, {"scale": 0.7}, {"floor": 0.1}):
        whole = lk.lsc_transform(reward, reference, **options)
        assert torch.equal(whole, lk.lsc_transform(reward, reference, **options))
        assert torch.equal(whole[501:503], lk.lsc_transform(reward[501:503], reference, **options))


def test_nan_that_nobody_asked_about_leaves_gradients_alone(backend: str) -> None:
    reward = torch.tensor([1.0, torch.nan, 2.0])
    scale = torch.tensor(2.0)
    _, gradients = with_gradients(
        lambda r, s: lk.lsc_transform(r, 0.0, scale=s), torch.tensor([1.0, 0.0, 1.0]), [reward, scale]
    )
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@given(
    reward=st.floats(-1e4, 1e4, width=32),
    reference=st.floats(-1e4, 1e4),
    scale=st.floats(1e-2, 1e2),
    floor=st.floats(0.0, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_any_numbers(reward: float, reference: float, scale: float, floor: float) -> None:
    z = (torch.tensor([reward], dtype=torch.float64) - reference) / scale
    got = lk.lsc_transform(torch.tensor([reward]), reference, scale=scale, floor=floor)
    assert relative_error(got, exact(z, floor)[0]) <= PROMISE


def test_modes(backend: str, generator: Generator) -> None:
    reward = torch.randn(4, 3, generator=generator, requires_grad=True)
    reference = torch.randn(3, generator=generator)
    expected = lk.lsc_transform(reward, reference)
    with torch.inference_mode():
        assert torch.equal(lk.lsc_transform(reward, reference), expected)
    with torch.no_grad():
        assert not lk.lsc_transform(reward, reference).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lk.lsc_transform(reward, reference), expected)
    (first,) = torch.autograd.grad(expected.sum(), reward, create_graph=True)
    with pytest.raises(RuntimeError, match="lsc_transform has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    reference = torch.randn(3, generator=generator)
    calls = [
        (torch.randn(n, 3, generator=generator).requires_grad_(), reference.clone().requires_grad_())
        for n in (4, 7, 5)
    ]
    compile_once(lambda r, ref: [lk.lsc_transform(r, ref, scale=2.0, floor=0.1)], calls)
    compile_once(lambda r, ref: [lk.lsc_transform(r, 0.5) + ref.sum()], calls)


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    reward, reference, scale = torch.randn(3, *_upstream.SHAPE, generator=generator)
    _upstream.check(
        lambda r, f, s: lk.lsc_transform(r, f, scale=s, floor=0.1),
        (reward, reference, scale.exp()),
        generator,
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    reward = torch.randn(4, 3, generator=generator)
    column, full = torch.rand(3, generator=generator), torch.rand(4, 3, generator=generator)
    ops = torch.ops.lsc_kernels
    for operands in ((None, 0.5, None, 2.0, None, 0.1), (column, 0.0, full, 0.0, column / 2, 0.0)):
        torch.library.opcheck(ops.lsc_transform_forward, (reward, *operands))
        for wanted in ((False, False), (True, True)):
            torch.library.opcheck(ops.lsc_transform_backward, (full, reward.bfloat16(), *operands, *wanted))


R = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.lsc_transform([1.0], 0.0), TypeError, "reward must be a tensor; got list"),
    (lambda: lk.lsc_transform(R.long(), 0.0), TypeError, "reward must be float32.*got torch.int64"),
    (
        lambda: lk.lsc_transform(R, None),
        TypeError,
        "reference_reward must be a float or a tensor; got NoneType",
    ),
    (lambda: lk.lsc_transform(R, True), TypeError, "reference_reward must be a float or a tensor; got bool"),
    (lambda: lk.lsc_transform(R, R.int()), TypeError, "reference_reward must be float32.*got torch.int32"),
    (lambda: lk.lsc_transform(R, math.nan), ValueError, "reference_reward must be finite; got nan"),
    (lambda: lk.lsc_transform(R, math.inf), ValueError, "reference_reward must be finite; got inf"),
    (
        lambda: lk.lsc_transform(R, torch.zeros(4)),
        ValueError,
        r"reference_reward must broadcast against reward, \[2, 3\]; got \[4\]",
    ),
    (lambda: lk.lsc_transform(R, 0.0, scale=torch.ones(2)), ValueError, "scale must broadcast"),
    (lambda: lk.lsc_transform(R, 0.0, floor=torch.zeros(2)), ValueError, "floor must broadcast"),
    (
        lambda: lk.lsc_transform(R, torch.zeros(3, device="meta")),
        ValueError,
        "reference_reward must be on cpu; got meta",
    ),
    (lambda: lk.lsc_transform(R, 0.0, scale="1"), TypeError, "scale must be a float or a tensor; got str"),
    *(
        (lambda s=s: lk.lsc_transform(R, 0.0, scale=s), ValueError, "scale must be finite and > 0; got")
        for s in (0.0, -1, math.nan, math.inf)
    ),
    *(
        (
            lambda s=s: lk.lsc_transform(R, 0.0, scale=torch.tensor([1.0, s, 2.0])),
            ValueError,
            "scale must be finite and > 0; got",
        )
        for s in (0.0, -1.0, math.nan, math.inf)
    ),
    *(
        (lambda f=f: lk.lsc_transform(R, 0.0, floor=f), ValueError, r"floor must be in \[0, 1\); got")
        for f in (-0.1, 1.0, 2, math.nan)
    ),
    *(
        (
            lambda f=f: lk.lsc_transform(R, 0.0, floor=torch.tensor([0.5, f, 0.0])),
            ValueError,
            r"floor must be in \[0, 1\); got",
        )
        for f in (-0.1, 1.0, math.nan)
    ),
    (
        lambda: lk.lsc_transform(R, 0.0, floor=torch.zeros(3, requires_grad=True)),
        ValueError,
        "floor has no gradient",
    ),
    (lambda: lk.lsc_transform(R, 0.0, 1.0), TypeError, "positional"),
]


@pytest.mark.cpu
@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
