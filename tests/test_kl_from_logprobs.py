"""kl_from_logprobs on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import _tolerances as tolerances
import _truth as truth
import _upstream
import pytest
import torch
from _cases import DTYPES, SAMPLED_KINDS
from _modes import compile_once, needs_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels.backends import select
from lsc_kernels.eager.kl_from_logprobs import KLOptions

INF = torch.inf


def pair(
    generator: Generator, shape: tuple[int, ...], size: float = 1.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Log-probabilities from just below 0 to about -20, and others that differ by ``size``."""
    logprobs = -torch.rand(shape, generator=generator) * 20 * torch.rand(shape, generator=generator) - 1e-3
    ref = torch.minimum(logprobs + size * torch.randn(shape, generator=generator), torch.zeros(()))
    return logprobs.to(dtype), ref.to(dtype)


def d_bound(d: Tensor, options: dict[str, Any]) -> Tensor:
    """The inputs are log-probabilities, so nothing but d's own rounding to fp32 is lost."""
    return 1e-6 * d.abs()


def value_bound(logprobs: Tensor, d: Tensor, result: truth.KL, options: dict[str, Any]) -> Tensor:
    low, high = options.get("log_ratio_clamp") or (-INF, INF)
    function = truth.ESTIMATORS[options.get("kl", "k3")]
    bound = tolerances.estimate(lambda ratio: function(ratio.clamp(low, high)), d, d_bound(d, options))
    if options.get("old_logprobs") is not None:
        bound = result.weight * bound + result.kl.abs() * tolerances.logprob(logprobs)
    return bound.nan_to_num(nan=0.0, posinf=0.0) + tolerances.rounding(result.kl, torch.float32)


def check(logprobs: Tensor, ref: Tensor, generator: Generator, *, name: str = "", **options: Any) -> None:
    """The value and both gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (logprobs, ref)]
    leaves64 = [tensor.detach().double().requires_grad_() for tensor in (logprobs, ref)]
    got = lk.kl_from_logprobs(*leaves, **options)
    result = truth.kl_from_logprobs(*leaves64, **options)
    kept = torch.ones_like(got, dtype=torch.bool) if options.get("mask") is None else options["mask"] != 0
    assert got.dtype is (torch.float64 if torch.float64 in (logprobs.dtype, ref.dtype) else torch.float32)
    p, q = (torch.where(kept, leaf.detach(), 0.0) for leaf in leaves64)
    d = p - q
    detached = truth.KL(*(field.detach() for field in result))
    bound = value_bound(p, d, detached, options)
    tolerances.check(f"{name} kl", got, detached.kl, torch.where(kept, bound, 0.0))

    # a clamp that hangs on the last bit of d, or of the value, decides nothing here
    sure = torch.ones_like(kept)
    for edge in options.get("log_ratio_clamp") or ():
        sure &= (d - edge).abs() > d_bound(d, options)
    for edge in options.get("kl_clamp") or ():
        sure &= (detached.unclamped - edge).abs() > value_bound(
            p, d, detached, {**options, "old_logprobs": None}
        )
    upstream = torch.randn(got.shape, generator=generator)
    found = torch.autograd.grad(got, leaves, upstream.to(got.dtype))
    wanted = torch.autograd.grad(result.kl, leaves64, upstream.double())
    for leaf, which, gradient, true in zip(leaves, ("logprobs", "ref_logprobs"), found, wanted, strict=True):
        assert gradient.dtype is leaf.dtype
        # a row of one column: its largest |truth| is itself
        total = upstream.abs() * detached.weight
        allowed = tolerances.gradient(true.unsqueeze(-1), total, d, 1.0, leaf.dtype).squeeze(-1)
        if options.get("old_logprobs") is not None:
            allowed = allowed + tolerances.logprob(p) * true.abs() + upstream.abs() * bound
        keep = kept & sure
        tolerances.check(
            f"{name} d kl / d {which}",
            torch.where(sure, gradient, 0.0),
            torch.where(sure, true, 0.0),
            torch.where(keep, allowed, 0.0),
        )


@pytest.mark.parametrize("kl", SAMPLED_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(backend: str, generator: Generator, dtype: torch.dtype, kl: str) -> None:
    for size in (0.0, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 0.5, 1.0, 5.0):
        check(*pair(generator, (1000,), size, dtype), generator, kl=kl, name=f"size {size}")


@pytest.mark.parametrize("kl", SAMPLED_KINDS)
def test_the_whole_range_of_d(backend: str, generator: Generator, kl: str) -> None:
    d = torch.cat(
        [torch.logspace(-30, 2.2, 2000), -torch.logspace(-30, 2.2, 2000), torch.linspace(-2, 2, 2001)]
    )
    check(d, torch.zeros_like(d), generator, kl=kl)


@pytest.mark.parametrize("kl", SAMPLED_KINDS)
@pytest.mark.parametrize("grad", ["autograd", "straight_through"])
@pytest.mark.parametrize("clamps", ["", "log_ratio", "kl", "both"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "old_logprobs"])
def test_options(backend: str, generator: Generator, kl: str, grad: str, clamps: str, weighted: bool) -> None:
    for size in (1e-2, 1.0):
        logprobs, ref = pair(generator, (5, 100), size)
        d = logprobs.double() - ref.double()
        quantiles = torch.tensor([0.2, 0.7], dtype=torch.float64)
        options: dict[str, Any] = {
            "kl": kl,
            "grad": grad,
            "mask": torch.rand(5, 100, generator=generator) < 0.8,
        }
        if clamps in ("log_ratio", "both"):
            options["log_ratio_clamp"] = tuple(torch.quantile(d, quantiles).tolist())
        if clamps in ("kl", "both"):
            options["kl_clamp"] = tuple(torch.quantile(truth.ESTIMATORS[kl](d), quantiles).tolist())
        if weighted:
            options["old_logprobs"] = logprobs + 0.5 * torch.randn(5, 100, generator=generator)
        check(logprobs, ref, generator, **options)


def test_clamped_element_has_exactly_no_gradient(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (400,), 2.0)
    d = logprobs.double() - ref.double()
    outside_ratio = d.abs() > 0.5001
    for kl, grad, old in itertools.product(
        SAMPLED_KINDS, ("autograd", "straight_through"), (None, logprobs - 0.3)
    ):
        x, y = logprobs.clone().requires_grad_(), ref.clone().requires_grad_()
        options: dict[str, Any] = {"kl": kl, "grad": grad, "old_logprobs": old}
        lk.kl_from_logprobs(x, y, log_ratio_clamp=(-0.5, 0.5), **options).sum().backward()
        assert x.grad is not None and y.grad is not None
        assert bool((x.grad[outside_ratio] == 0).all()) and bool((y.grad[outside_ratio] == 0).all()), options
        x.grad = y.grad = None
        lk.kl_from_logprobs(x, y, kl_clamp=(0.1, 0.2), **options).sum().backward()
        value = truth.ESTIMATORS[kl](d)
        outside_value = (value < 0.0999) | (value > 0.2001)
        assert x.grad is not None and y.grad is not None
        assert bool((x.grad[outside_value] == 0).all()) and bool((y.grad[outside_value] == 0).all()), options
        assert bool((y.grad[~outside_value & (value > 0.101) & (value < 0.199)] != 0).all()), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_overflowing_weight_reaches_nobody_else(backend: str, dtype: torch.dtype) -> None:
    logprobs, ref, old = (
        torch.tensor(values, dtype=dtype) for values in ([-1.0, -1.0], [-20.0, -1.5], [-2000.0, -1.0])
    )
    for kl, clamp in (("k1", (-5.0, 5.0)), ("k3", (-5.0, 5.0)), ("k1", None)):
        x, y = logprobs.clone().requires_grad_(), ref.clone().requires_grad_()
        value = lk.kl_from_logprobs(x, y, kl=kl, log_ratio_clamp=clamp, old_logprobs=old)
        assert value[0] == torch.inf
        (value.sum() if clamp else value[1]).backward()
        assert x.grad is not None and y.grad is not None
        assert x.grad[0] == 0 == y.grad[0] and x.grad[1] != 0 != y.grad[1]


def test_old_logprobs_of_fp64_are_not_rounded(backend: str) -> None:
    old = torch.tensor([-300.000011], dtype=torch.float64)
    value = lk.kl_from_logprobs(torch.tensor([-300.0]), torch.tensor([-301.0]), kl="k1", old_logprobs=old)
    assert value.dtype is torch.float32 and value.item() == pytest.approx(math.exp(1.1e-5), rel=1e-7)


def test_overflowing_k3(backend: str) -> None:
    logprobs, ref = torch.tensor([-200.0], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    value = lk.kl_from_logprobs(logprobs, ref)
    assert value.item() == INF
    gradients = torch.autograd.grad(value.sum(), (logprobs, ref))
    assert [gradient.item() for gradient in gradients] == [-INF, INF]
    clamped = lk.kl_from_logprobs(logprobs, ref, log_ratio_clamp=(-20.0, 20.0), kl_clamp=(0.0, 10.0))
    assert clamped.item() == 10.0
    assert [gradient.item() for gradient in torch.autograd.grad(clamped.sum(), (logprobs, ref))] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("logprob", "ref_logprob", "expected"),
    [
        (-INF, -1.0, {"k1": -INF, "abs": INF, "k2": INF, "k3": INF}),
        (-1.0, -INF, {"k1": INF, "abs": INF, "k2": INF, "k3": INF}),
        (-INF, -INF, {"k1": 0.0, "abs": 0.0, "k2": 0.0, "k3": 0.0}),
    ],
)
def test_impossible_actions(
    backend: str, logprob: float, ref_logprob: float, expected: dict[str, float]
) -> None:
    got = {
        kl: lk.kl_from_logprobs(torch.tensor([logprob]), torch.tensor([ref_logprob]), kl=kl).item()
        for kl in expected
    }
    assert got == expected


def test_nan_stays_where_it_is(backend: str) -> None:
    logprobs, ref = torch.tensor([-1.0, torch.nan, -1.0, -1.0]), torch.tensor([-2.0, -1.0, torch.nan, -1.0])
    for kl in SAMPLED_KINDS:
        for options in ({}, {"log_ratio_clamp": (-1.0, 1.0), "kl_clamp": (0.0, 1.0)}):
            got = lk.kl_from_logprobs(logprobs, ref, kl=kl, **options)  # type: ignore[arg-type]
            assert got.isnan().tolist() == [False, True, True, False] and got[3] == 0


def test_holes_in_the_mask(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (6, 50))
    old = logprobs + 0.1
    mask = torch.rand(6, 50, generator=generator) < 0.5
    for under in (torch.nan, INF, -INF):
        for tensor in (logprobs, ref, old):
            tensor[~mask] = under
        for kl, dtype in itertools.product(SAMPLED_KINDS, (torch.bool, torch.int64, torch.float32)):
            x, y = logprobs.clone().requires_grad_(), ref.clone().requires_grad_()
            got = lk.kl_from_logprobs(x, y, kl=kl, mask=mask.to(dtype), old_logprobs=old)
            got.backward(torch.where(mask, 1.0, torch.nan))
            assert bool((got[~mask] == 0).all()) and bool(got.isfinite().all())
            for leaf in (x, y):
                assert (
                    leaf.grad is not None
                    and bool((leaf.grad[~mask] == 0).all())
                    and bool(leaf.grad.isfinite().all())
                )


def test_layouts_and_dtypes(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (6, 40), 0.1)
    for x, y in (
        (logprobs[:, :-1], ref[:, 1:]),
        (logprobs.T, ref.T),
        (logprobs.T.contiguous().T, ref),
        (logprobs[::2, ::3], ref[::2, ::3]),
        (logprobs[:1].expand(6, 40), ref),
        (torch.tensor(-1.0).expand(6, 40), ref),
        (logprobs.bfloat16(), ref),
        (logprobs, ref.half()),
        (logprobs.double(), ref.bfloat16()),
        (logprobs[:0], ref[:0]),
        (logprobs[0, 0], ref[0, 0]),
    ):
        for kl in SAMPLED_KINDS:
            check(x, y, generator, kl=kl, mask=torch.ones(x.shape), name=f"{x.stride()} {x.dtype} {y.dtype}")


def test_gradient_only_where_asked(backend: str, generator: Generator) -> None:
    for wants in ((True, False), (False, True)):
        x, y = (
            tensor.requires_grad_(want) for tensor, want in zip(pair(generator, (9,)), wants, strict=True)
        )
        lk.kl_from_logprobs(x, y, old_logprobs=torch.zeros(9, requires_grad=True)).sum().backward()
        assert (x.grad is not None, y.grad is not None) == wants


@pytest.mark.parametrize("weighted", [False, True], ids=["", "old_logprobs"])
def test_each_gradient_alone_is_the_one_of_both(backend: str, generator: Generator, weighted: bool) -> None:
    given = pair(generator, (5, 7))
    mask = torch.rand(5, 7, generator=generator) < 0.7
    old = given[0] + 0.1 * torch.randn(5, 7, generator=generator) if weighted else None

    def gradients(wanted: tuple[bool, bool]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(given, wanted, strict=True)]
        kl = lk.kl_from_logprobs(*leaves, mask=mask, old_logprobs=old)
        return list(torch.autograd.grad(kl.sum(), [leaf for leaf in leaves if leaf.requires_grad]))

    to_logprobs, to_ref = gradients((True, True))
    assert torch.equal(gradients((True, False))[0], to_logprobs)
    assert torch.equal(gradients((False, True))[0], to_ref)


def test_an_unwanted_gradient_is_not_made(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (3, 7))
    kernels = select("kl_from_logprobs", logprobs, ref)
    for wanted in itertools.product((True, False), repeat=2):
        made = kernels.backward(torch.ones(3, 7), logprobs, ref, None, None, KLOptions("k3"), *wanted)
        assert tuple(gradient is not None for gradient in made) == wanted


def test_weighted_k3_keeps_its_slope_far_below_the_reference(backend: str) -> None:
    """d (w (exp(-d) - 1 + d)) / d log pi = w d, of which the two parts are as large as exp(-d)."""
    d = torch.tensor([-1e-3, -5.0, -30.0, -60.0, -200.0, 3.0])
    logprobs = torch.full((6,), -250.0).requires_grad_()
    lk.kl_from_logprobs(
        logprobs, logprobs.detach() - d, kl="k3", old_logprobs=logprobs.detach() - 0.5
    ).sum().backward()
    exact = (logprobs.detach().double() - (logprobs.detach() - d).double()) * math.exp(0.5)
    torch.testing.assert_close(logprobs.grad.double(), exact, rtol=1e-6, atol=0)


def test_agrees_with_token_kl(backend: str, generator: Generator) -> None:
    policy = 3 * torch.randn(20, 100, generator=generator)
    ref = policy + torch.randn(20, 100, generator=generator)
    actions = policy.argmax(-1)
    for kl in SAMPLED_KINDS:
        both = lk.token_kl(policy, ref, actions, kl=kl, log_ratio_clamp=(-1.0, 0.5), kl_clamp=(-0.5, 0.8))
        alone = lk.kl_from_logprobs(
            both.logprobs, both.ref_logprobs, kl=kl, log_ratio_clamp=(-1.0, 0.5), kl_clamp=(-0.5, 0.8)
        )
        assert torch.allclose(both.kl, alone, rtol=1e-4, atol=4e-6)


def test_bitwise_the_same_alone_and_among_others(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (70_001,))
    old = logprobs - 0.1
    for kl in SAMPLED_KINDS:

        def run(x: Tensor, y: Tensor, old: Tensor, kl: str = kl) -> tuple[Tensor, ...]:
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            got = lk.kl_from_logprobs(x, y, kl=kl, old_logprobs=old)
            return got, *torch.autograd.grad(got.sum(), (x, y))

        whole = run(logprobs, ref, old)
        try:
            for threads, part in itertools.product(
                (2, 1), (slice(0, 70_001), slice(3, 20), slice(69_990, 70_001))
            ):
                torch.set_num_threads(threads)
                for a, b in zip(whole, run(logprobs[part], ref[part], old[part]), strict=True):
                    assert torch.equal(a[part], b)
        finally:
            torch.set_num_threads(2)


def test_inputs_are_left_as_they_were(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (30,))
    old, mask = logprobs - 0.1, torch.rand(30, generator=generator) < 0.5
    before = [tensor.clone() for tensor in (logprobs, ref, old, mask)]
    x, y = logprobs.requires_grad_(), ref.requires_grad_()
    lk.kl_from_logprobs(x, y, old_logprobs=old, mask=mask, log_ratio_clamp=(-0.1, 0.1)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (logprobs, ref, old, mask), strict=True))


def test_second_derivative_raises(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (4,))
    logprobs.requires_grad_()
    (gradient,) = torch.autograd.grad(lk.kl_from_logprobs(logprobs, ref).sum(), logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="kl_from_logprobs.*(first derivative|twice)"):
        gradient.sum().backward()


@pytest.mark.parametrize("kl", SAMPLED_KINDS)
def test_gradcheck(generator: Generator, kl: str) -> None:
    logprobs, ref = (tensor.requires_grad_() for tensor in pair(generator, (7,), 1.0, torch.float64))
    for options in (
        {},
        {"old_logprobs": logprobs.detach() - 0.2},
        {"mask": torch.tensor([1, 0, 1, 1, 0, 1, 1])},
    ):
        op = lambda x, y, o=options: lk.kl_from_logprobs(x, y, kl=kl, **o)  # noqa: E731
        assert torch.autograd.gradcheck(op, (logprobs, ref))


def test_modes(backend: str, generator: Generator) -> None:
    logprobs, ref = pair(generator, (5, 30))
    logprobs.requires_grad_()
    expected = lk.kl_from_logprobs(logprobs, ref)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(expected, lk.kl_from_logprobs(logprobs, ref))


def test_compile(backend: str, generator: Generator) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        logprobs, ref = pair(generator, (batch, length))
        return (
            logprobs.requires_grad_(),
            ref.requires_grad_(),
            torch.rand(batch, length, generator=generator) < 0.6,
        )

    def run(logprobs: Tensor, ref: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (
            lk.kl_from_logprobs(
                logprobs, ref, mask=mask, old_logprobs=logprobs.detach(), kl_clamp=(0.0, 1.0)
            ),
        )

    compile_once(run, [call(3, 5), call(3, 8), call(2, 13), call(4, 2)])


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    mask = torch.rand(_upstream.SHAPE, generator=generator) < 0.8
    _upstream.check(
        lambda p, q: lk.kl_from_logprobs(p, q, mask=mask), pair(generator, _upstream.SHAPE), generator
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    logprobs, ref = pair(generator, (3, 7))
    mask = torch.rand(3, 7, generator=generator) < 0.5
    options = (3, False, (-1.0, 1.0), None)
    ops = torch.ops.lsc_kernels
    for arguments in (
        (logprobs, ref, None, None, *options),
        (logprobs.T, ref.T, mask.T, logprobs.T, *options),
    ):
        torch.library.opcheck(ops.kl_from_logprobs_forward.default, arguments)
        upstream = torch.randn(arguments[0].shape, generator=generator)
        for wanted in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(ops.kl_from_logprobs_backward.default, (upstream, *arguments, *wanted))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_clamp_and_ratio(backend: str, data: st.DataObject) -> None:
    ratios = data.draw(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40), label="d")
    d = torch.tensor(ratios)
    interval = st.none() | st.tuples(st.floats(-70, 70), st.floats(0, 70)).map(
        lambda pair: (pair[0], pair[0] + pair[1])
    )
    check(
        d,
        torch.zeros_like(d),
        torch.Generator().manual_seed(0),
        kl=data.draw(st.sampled_from(SAMPLED_KINDS)),
        grad=data.draw(st.sampled_from(["autograd", "straight_through"])),
        log_ratio_clamp=data.draw(interval),
        kl_clamp=data.draw(interval),
        mask=torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(ratios), max_size=len(ratios)))),
    )
