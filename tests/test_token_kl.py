"""token_kl on every backend: values, gradients, and what surrounds them."""

from __future__ import annotations

import functools
import math

import _tolerances as tolerances
import _truth as truth
import mpmath
import pytest
import torch
from _cases import (
    DTYPES,
    KINDS,
    REGIMES,
    SAMPLED_KINDS,
    VOCABULARIES,
    few,
    interpreted,
    logit_pair,
    rows_for,
    sampled_actions,
    some,
)
from _check import check_token_kl, check_token_kl_gradients, check_values
from _modes import compile_once, needs_native, peak_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk


def inputs(
    generator: Generator, regime: str, rows: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    policy, ref = logit_pair(generator, regime, (rows, vocabulary), dtype)
    return policy, ref, sampled_actions(generator, policy)


def textbook(policy: Tensor, ref: Tensor, actions: Tensor, kl: str) -> lk.TokenKL:
    """What people write, at the dtype of the logits."""
    log_p, log_q = torch.log_softmax(policy, -1), torch.log_softmax(ref, -1)
    logprobs, ref_logprobs = (log.gather(-1, actions.unsqueeze(-1)).squeeze(-1) for log in (log_p, log_q))
    d = logprobs - ref_logprobs
    values = {
        "k1": lambda: d,
        "abs": lambda: d.abs(),
        "k2": lambda: d * d / 2,
        "k3": lambda: torch.exp(-d) - 1 + d,
        "full": lambda: (log_p.exp() * (log_p - log_q)).sum(-1),
        "full_reverse": lambda: (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    return lk.TokenKL(values[kl](), logprobs, ref_logprobs, -(log_p.exp() * log_p).sum(-1))


class TestTruth:
    """The fp64 truth is far more exact than what is promised, checked with 60 digits."""

    @pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-5])
    def test_against_60_digits(self, generator: Generator, size: float) -> None:
        policy = 3 * torch.randn(1, 50, generator=generator)
        ref = policy + size * torch.randn(1, 50, generator=generator) + 100 * size
        with mpmath.workdps(60):
            x, y = [mpmath.mpf(v) for v in policy[0].tolist()], [mpmath.mpf(v) for v in ref[0].tolist()]
            log_zx, log_zy = (mpmath.log(mpmath.fsum(mpmath.exp(v) for v in row)) for row in (x, y))
            log_p, log_q = [v - log_zx for v in x], [v - log_zy for v in y]
            pairs = list(zip(log_p, log_q, strict=True))
            exact = {
                "full": mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in pairs),
                "full_reverse": mpmath.fsum(mpmath.exp(q) * (q - p) for p, q in pairs),
                "k1": log_p[3] - log_q[3],
                "k3": mpmath.exp(log_q[3] - log_p[3]) - 1 + log_p[3] - log_q[3],
            }
            for kind, value in exact.items():
                found = truth.token_kl(policy.double(), ref.double(), torch.tensor([3]), kl=kind).kl.item()
                error = abs(mpmath.mpf(found) - value)
                allowed = 1e-9 * abs(value) if kind.startswith("full") else 1e-14
                assert error <= allowed, f"{kind}: {found} is off by {mpmath.nstr(error, 3)}"


class TestValues:
    @pytest.mark.parametrize("kl", KINDS)
    @pytest.mark.parametrize("regime", REGIMES)
    def test_regimes(self, backend: str, generator: Generator, regime: str, kl: str) -> None:
        for dtype in DTYPES[:2]:
            for vocabulary in (7, 4999):
                policy, ref, actions = inputs(
                    generator, regime, few(24 if vocabulary == 7 else 8), vocabulary, dtype
                )
                check_token_kl(policy, ref, actions, kl=kl, name=f"{regime} V={vocabulary} {dtype} {kl}")

    @pytest.mark.parametrize("vocabulary", VOCABULARIES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_vocabularies(
        self, backend: str, generator: Generator, vocabulary: int, dtype: torch.dtype
    ) -> None:
        for regime in some(generator, ("independent", "near_1e-2", "near_1e-5", "confident_near")):
            policy, ref, actions = inputs(generator, regime, rows_for(vocabulary), vocabulary, dtype)
            for kl in some(generator, ("k3", "full", "full_reverse")):
                check_token_kl(policy, ref, actions, kl=kl, name=f"{regime} V={vocabulary} {dtype} {kl}")

    @pytest.mark.parametrize("kl", ["k1", "full", "full_reverse"])
    def test_largest_logit_unlike_the_others_and_one_more_like_it(
        self, backend: str, generator: Generator, kl: str
    ) -> None:
        """The largest logit's log ratio is no centre, for all that one more column is near it."""
        policy = 0.1 * torch.randn(32, 240, generator=generator)
        policy[:, 3], policy[:, 70] = 0.5, policy.logsumexp(-1) + math.log(0.0014)
        ref = policy + 1e-5 * torch.randn(32, 240, generator=generator)
        ref[:, 3] += 0.68
        ref[:, 70] += 0.8
        for dtype in DTYPES[:2]:
            check_token_kl(policy.to(dtype), ref.to(dtype), torch.arange(32), kl=kl, name=f"{kl} {dtype}")

    @pytest.mark.parametrize("backend", ["native", "cuda-emulated"], indirect=True)
    @pytest.mark.parametrize("regime", REGIMES)
    def test_many_rows_of_a_few_tiles(self, backend: str, generator: Generator, regime: str) -> None:
        """What is decided while a row is read, in one row of twenty."""
        policy, ref, actions = inputs(generator, regime, 96, 5001)
        for kl, temperature in (("full", 0.7), ("full_reverse", 1.0)):
            check_token_kl(policy, ref, actions, kl=kl, temperature=temperature, name=f"{regime} {kl}")

    @pytest.mark.parametrize("backend", ["native", "cuda-emulated"], indirect=True)
    @pytest.mark.parametrize("regime", REGIMES)
    def test_long_rows(self, backend: str, generator: Generator, regime: str) -> None:
        """Rows of many tiles and two chunks: what the first ones say of the others may be wrong."""
        for dtype, temperature in ((torch.float32, 1.0), (torch.float32, 1.7), (torch.bfloat16, 0.7)):
            policy, ref, actions = inputs(generator, regime, 3, 70001, dtype)
            for kl in ("k1", "full", "full_reverse"):
                name = f"{regime} {dtype} {kl} T={temperature}"
                check_token_kl(policy, ref, actions, kl=kl, temperature=temperature, name=name)

    @pytest.mark.parametrize(
        "dtypes",
        [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.bfloat16)],
    )
    def test_mixed_dtypes(
        self, backend: str, generator: Generator, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", few(12), 3001)
        policy, ref = policy.to(dtypes[0]), ref.to(dtypes[1])
        for kl in KINDS:
            check_token_kl_gradients(
                policy, ref, actions, generator, kl=kl, combinations=(("kl",),), name=f"{dtypes} {kl}"
            )

    @pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, "per row"])
    @pytest.mark.parametrize(
        "regime",
        ["independent", "near_1e-4", "confident", "shift_1e4", "shift_ref_777", "outlier_at_largest"],
    )
    def test_temperature(
        self, backend: str, generator: Generator, regime: str, temperature: float | str
    ) -> None:
        for dtype in DTYPES[:2]:
            policy, ref, actions = inputs(generator, regime, few(9), 2500, dtype)
            tau: float | Tensor
            tau = (
                torch.rand(few(9), generator=generator) * 2 + 0.1
                if isinstance(temperature, str)
                else temperature
            )
            for kl in some(generator, KINDS):
                check_token_kl(policy, ref, actions, kl=kl, temperature=tau, name=f"{regime} {dtype} {kl}")

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equal_logits_give_exactly_zero(
        self, backend: str, generator: Generator, dtype: torch.dtype
    ) -> None:
        for vocabulary in VOCABULARIES:
            for scale, temperature in ((3.0, 1.0), (12.0, 0.7)):
                policy = (scale * torch.randn(rows_for(vocabulary), vocabulary, generator=generator)).to(
                    dtype
                )
                actions = sampled_actions(generator, policy)
                for kl in KINDS:
                    leaf = policy.clone().requires_grad_()
                    got = lk.token_kl(leaf, policy.clone(), actions, kl=kl, temperature=temperature)
                    assert bool((got.kl == 0).all()), f"{kl} V={vocabulary}: {got.kl.abs().max()}"
                    assert torch.equal(got.logprobs, got.ref_logprobs)

    def test_common_shift_of_one_model_changes_nothing(self, backend: str, generator: Generator) -> None:
        """Logits on a grid, so that the shift rounds nothing."""
        policy = (torch.randn(few(16), 3001, generator=generator) * 3 * 256).round() / 256
        actions = sampled_actions(generator, policy)
        for shift in (777.0, -1e4):
            for kl in KINDS:
                assert float(lk.token_kl(policy, policy + shift, actions, kl=kl).kl.abs().max()) <= 1e-14

    def test_no_worse_than_twice_pytorch(self, backend: str, generator: Generator) -> None:
        """Worst error over many rows, beyond the rounding of the result."""
        for regime in some(
            generator, ("independent", "near_1e-1", "near_1e-3", "confident", "spike", "shift_777")
        ):
            for dtype in some(generator, (torch.float32, torch.bfloat16, torch.float16)):
                policy, ref, actions = inputs(generator, regime, 64, 2000, dtype)
                for kl in KINDS:
                    t = truth.token_kl(policy.double(), ref.double(), actions, kl=kl)
                    got = lk.token_kl(policy, ref, actions, kl=kl)
                    for name, plain in textbook(policy, ref, actions, kl)._asdict().items():
                        true = getattr(t, name)
                        last_digit = (true.float().double() - true).abs()
                        fits = last_digit.isfinite()
                        error, pytorch = (
                            torch.where(fits, (output.double() - true).abs(), 0.0)
                            .nan_to_num(nan=torch.inf)
                            .max()
                            for output in (getattr(got, name), plain)
                        )
                        limit = 2 * pytorch + torch.where(fits, last_digit, 0.0).max()
                        assert error <= limit, (
                            f"{regime} {dtype} {kl} {name}: {error:.3g}, PyTorch {pytorch:.3g}"
                        )


class TestGradients:
    @pytest.mark.parametrize("backend", ["native"], indirect=True)
    @pytest.mark.parametrize("vocabulary", [7, 13, 29])
    def test_many_short_rows(self, backend: str, generator: Generator, vocabulary: int) -> None:
        """Where the reference is sure of the action, 1 - q is what the smallest weights leave beside the largest."""
        policy, ref, actions = inputs(generator, "independent", 3000, vocabulary)
        check_token_kl_gradients(policy, ref, actions, generator, kl="k3", combinations=(("kl",),))

    @pytest.mark.parametrize("kl", KINDS)
    @pytest.mark.parametrize("grad", ["autograd", "straight_through"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_each_output_and_all(
        self, backend: str, generator: Generator, dtype: torch.dtype, grad: str, kl: str
    ) -> None:
        for regime in some(generator, ("independent", "near_1e-2", "confident", "equal")):
            for vocabulary in (1, 2, 7, 2500):
                policy, ref, actions = inputs(generator, regime, few(6), vocabulary, dtype)
                check_token_kl_gradients(
                    policy, ref, actions, generator, kl=kl, grad=grad, name=f"{regime} V={vocabulary} {kl}"
                )

    @pytest.mark.parametrize("dtypes", [DTYPES[:2], (DTYPES[1], DTYPES[1])], ids=str)
    def test_a_reference_that_backward_does_not_read_is_not_kept(
        self, backend: str, generator: Generator, dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        """What becomes of its memory after the forward pass is nothing to the gradient."""
        policy, ref, actions = inputs(generator, "near_1e-1", few(6), 777, DTYPES[0])
        policy, ref = policy.to(dtypes[0]), ref.to(dtypes[1])
        options = {"temperature": 0.7, "old_logprobs": -torch.rand(actions.shape, generator=generator)}
        for kl in KINDS:

            def gradient(policy: Tensor, ref: Tensor, kl: str = kl) -> tuple[Tensor, int]:
                kept = []
                leaf = policy.clone().requires_grad_()
                with torch.autograd.graph.saved_tensors_hooks(
                    lambda saved: kept.append(saved) or saved, lambda saved: saved
                ):
                    out = lk.token_kl(leaf, ref, actions, kl=kl, **options)
                wide = sum(saved.shape == policy.shape for saved in kept)
                if wide == 1:
                    ref.detach().fill_(torch.nan)
                (out.kl.sum() + out.entropy.sum() + out.logprobs.sum()).backward()
                return leaf.grad, wide

            expected, all_kept = gradient(policy, ref.clone().requires_grad_())
            got, kept = gradient(policy, ref.clone())
            assert (all_kept, kept) == (2, 2 if kl.startswith("full") else 1), kl
            assert torch.equal(got, expected), kl

    @pytest.mark.parametrize("regime", REGIMES)
    def test_regimes(self, backend: str, generator: Generator, regime: str) -> None:
        for dtype in DTYPES[:2]:
            policy, ref, actions = inputs(generator, regime, few(6), 4999, dtype)
            for kl in some(generator, KINDS):
                check_token_kl_gradients(
                    policy,
                    ref,
                    actions,
                    generator,
                    kl=kl,
                    combinations=(("kl",), ("kl", "entropy")),
                    name=f"{regime} {dtype} {kl}",
                )

    @pytest.mark.parametrize("vocabulary", VOCABULARIES[3:])
    def test_vocabularies(self, backend: str, generator: Generator, vocabulary: int) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", rows_for(vocabulary), vocabulary)
        for kl in ("k3", "full", "full_reverse"):
            check_token_kl_gradients(
                policy, ref, actions, generator, kl=kl, combinations=(("kl", "logprobs", "entropy"),)
            )

    @pytest.mark.parametrize("temperature", [0.7, "per row"])
    def test_temperature(self, backend: str, generator: Generator, temperature: float | str) -> None:
        for regime in ("near_1e-3", "confident", "shift_ref_777"):
            policy, ref, actions = inputs(generator, regime, few(7), 2500)
            tau = (
                torch.rand(few(7), generator=generator) * 2 + 0.1
                if isinstance(temperature, str)
                else temperature
            )
            for kl in KINDS:
                check_token_kl_gradients(
                    policy, ref, actions, generator, kl=kl, temperature=tau, name=f"{regime} {kl}"
                )

    def test_reference_gets_a_gradient_only_if_asked(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", 5, 300)
        for wants_policy, wants_ref in ((True, False), (False, True)):
            x, y = policy.clone().requires_grad_(wants_policy), ref.clone().requires_grad_(wants_ref)
            outputs = lk.token_kl(x, y, actions, kl="full")
            torch.autograd.backward([output.sum() for output in outputs])
            assert (x.grad is not None, y.grad is not None) == (wants_policy, wants_ref)
        check_token_kl_gradients(policy, ref, actions, generator, ref_grad=False, kl="k3")

    def test_unused_outputs_cost_nothing(self, backend: str, generator: Generator) -> None:
        """An infinite k3 that nobody differentiates leaves the other gradients alone."""
        policy, ref = torch.zeros(1, 3), torch.zeros(1, 3)
        policy[0, 0] = -250.0
        leaf = policy.requires_grad_()
        got = lk.token_kl(leaf, ref, torch.tensor([0]))
        assert got.kl.isinf().all()
        got.logprobs.sum().backward()
        assert leaf.grad is not None and bool(leaf.grad.isfinite().all())

    def test_overflowing_k3(self, backend: str) -> None:
        """d = -199: value inf, gradient -inf; clamped before exp: finite, gradient exactly 0."""
        policy, ref, action = (
            torch.tensor([[-199.0, 0.0]], requires_grad=True),
            torch.tensor([[0.0, -90.0]]),
            torch.tensor([0]),
        )
        got = lk.token_kl(policy, ref, action)
        assert got.kl.item() == torch.inf
        (gradient,) = torch.autograd.grad(got.kl.sum(), policy)
        assert gradient[0, 0].item() == -torch.inf
        clamped = lk.token_kl(policy, ref, action, log_ratio_clamp=(-20.0, 20.0))
        assert clamped.kl.item() == pytest.approx(485165174.4, rel=1e-6)
        assert torch.autograd.grad(clamped.kl.sum(), policy)[0].tolist() == [[0.0, 0.0]]
        after = lk.token_kl(policy, ref, action, kl_clamp=(0.0, 10.0))
        assert after.kl.item() == 10.0
        assert torch.autograd.grad(after.kl.sum(), policy)[0].tolist() == [[0.0, 0.0]]

    def test_gradcheck(self, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "independent", 3, 5, torch.float64)
        policy, ref = policy.requires_grad_(), ref.requires_grad_()
        old = torch.log_softmax(policy.detach(), -1).gather(-1, actions[:, None])[:, 0] + 0.1
        for kl in KINDS:
            for options in (
                {},
                {"temperature": 0.7},
                {"mask": torch.tensor([1, 0, 1])},
                {"old_logprobs": old},
            ):
                op = functools.partial(lk.token_kl, actions=actions, kl=kl, **options)
                assert torch.autograd.gradcheck(
                    lambda x, y, op=op: tuple(op(x, y)), (policy, ref), fast_mode=True
                )

    def test_second_derivative_raises(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", 3, 9)
        policy.requires_grad_()
        (gradient,) = torch.autograd.grad(
            lk.token_kl(policy, ref, actions).kl.sum(), policy, create_graph=True
        )
        with pytest.raises(RuntimeError, match="token_kl.*(first derivative|twice)"):
            gradient.sum().backward()


class TestOptions:
    @pytest.mark.parametrize("kl", KINDS)
    @pytest.mark.parametrize("grad", ["autograd", "straight_through"])
    @pytest.mark.parametrize("weighted", [False, True], ids=["", "old_logprobs"])
    @pytest.mark.parametrize("clamps", ["log_ratio", "kl", "both"])
    def test_clamps_and_ratio(
        self, backend: str, generator: Generator, kl: str, grad: str, weighted: bool, clamps: str
    ) -> None:
        if kl.startswith("full") and clamps != "kl":
            pytest.skip("a full divergence has no log ratio to clamp")
        for regime in some(generator, ("near_1", "near_1e-2", "independent")):
            policy, ref, actions = inputs(generator, regime, 24, 501)
            t = truth.token_kl(policy.double(), ref.double(), actions, kl=kl)
            options: dict[str, object] = {"kl": kl, "grad": grad}
            if clamps != "kl":
                options["log_ratio_clamp"] = tuple(
                    torch.quantile(t.d, torch.tensor([0.2, 0.7]).double()).tolist()
                )
            if clamps != "log_ratio":
                options["kl_clamp"] = tuple(torch.quantile(t.kl, torch.tensor([0.2, 0.8]).double()).tolist())
            if weighted:
                options["old_logprobs"] = (t.logprobs + 0.5 * torch.randn(24, generator=generator)).float()
            check_token_kl_gradients(
                policy,
                ref,
                actions,
                generator,
                combinations=(("kl",), ("kl", "logprobs", "entropy")),
                name=regime,
                **options,
            )

    @pytest.mark.parametrize("weighted", [False, True], ids=["", "old_logprobs"])
    def test_clamped_element_has_exactly_no_gradient(
        self, backend: str, generator: Generator, weighted: bool
    ) -> None:
        policy, ref, actions = inputs(generator, "independent", 64, 33)
        d = truth.token_kl(policy.double(), ref.double(), actions).d
        old = torch.randn(64, generator=generator) - 3 if weighted else None
        for kl in SAMPLED_KINDS:
            for grad in ("autograd", "straight_through"):
                x, y = policy.clone().requires_grad_(), ref.clone().requires_grad_()
                lk.token_kl(
                    x, y, actions, kl=kl, grad=grad, log_ratio_clamp=(-0.5, 0.5), old_logprobs=old
                ).kl.sum().backward()
                outside = d.abs() > 0.501
                assert outside.any() and x.grad is not None and y.grad is not None
                assert bool((x.grad[outside] == 0).all()) and bool((y.grad[outside] == 0).all()), (kl, grad)
                if not weighted:  # the two terms of a weighted slope may cancel
                    assert bool((x.grad[d.abs() < 0.499] != 0).any(-1).all()), (kl, grad)
        for kl in KINDS:
            x = policy.clone().requires_grad_()
            out = lk.token_kl(x, ref, actions, kl=kl, kl_clamp=(1.0, 2.0), old_logprobs=old).kl
            out.sum().backward()
            value = truth.token_kl(policy.double(), ref.double(), actions, kl=kl).kl
            outside = (value < 0.999) | (value > 2.001)
            assert outside.any() and x.grad is not None and bool((x.grad[outside] == 0).all()), kl

    def test_old_logprobs_get_no_gradient(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", 4, 50)
        old = torch.zeros(4, requires_grad=True)
        lk.token_kl(policy.requires_grad_(), ref, actions, old_logprobs=old).kl.sum().backward()
        assert old.grad is None

    @pytest.mark.parametrize("kl", KINDS)
    def test_straight_through_is_the_value_of_kl_with_the_slope_of_k2(
        self, backend: str, generator: Generator, kl: str
    ) -> None:
        policy, ref, actions = inputs(generator, "near_1", 8, 100)
        x, y = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        straight = lk.token_kl(x, ref, actions, kl=kl, grad="straight_through")
        assert torch.equal(straight.kl, lk.token_kl(policy, ref, actions, kl=kl).kl)
        straight.kl.sum().backward()
        lk.token_kl(y, ref, actions, kl="k2").kl.sum().backward()
        assert (
            x.grad is not None and y.grad is not None and torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-7)
        )


class TestMasks:
    @pytest.mark.parametrize(
        "mask_dtype", [torch.bool, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16]
    )
    def test_holes_with_nan_and_inf_under_them(
        self, backend: str, generator: Generator, mask_dtype: torch.dtype
    ) -> None:
        shape = (few(5), 9)
        policy, ref = logit_pair(generator, "near_1", (*shape, 40))
        actions = sampled_actions(generator, policy)
        mask = torch.rand(shape, generator=generator) < 0.5
        mask[0, :2] = torch.tensor([True, False])
        old = torch.randn(shape, generator=generator)
        poison = torch.tensor([torch.nan, torch.inf, -torch.inf])
        for under in poison:
            policy[~mask], ref[~mask], old[~mask] = under, under, under
            actions[~mask] = 10**9
            for kl in some(generator, KINDS):
                x, y = policy.clone().requires_grad_(), ref.clone().requires_grad_()
                counted = (mask * torch.tensor([3.0])).to(mask_dtype)
                got = lk.token_kl(x, y, actions, kl=kl, mask=counted, old_logprobs=old)
                for output in got:
                    assert bool((output[~mask] == 0).all()) and bool(output.isfinite().all())
                # an upstream gradient of NaN at a left-out position must not come through either
                upstream = torch.where(mask, 1.0, torch.nan)
                torch.autograd.backward(tuple(got), [upstream] * 4)
                for leaf in (x, y):
                    assert (
                        leaf.grad is not None
                        and bool((leaf.grad[~mask] == 0).all())
                        and bool(leaf.grad.isfinite().all())
                    )
                inside = lk.token_kl(policy[mask], ref[mask], actions[mask], kl=kl, old_logprobs=old[mask])
                for output, alone in zip(got, inside, strict=True):
                    assert torch.equal(output[mask], alone)

    def test_ignore_index_is_a_masked_position(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1", 8, 40)
        policy[2], ref[5] = torch.nan, torch.inf
        actions[[2, 5]] = -100
        x = policy.requires_grad_()
        mask = torch.ones(8)
        mask[0] = 0
        got = lk.token_kl(x, ref, actions.int(), mask=mask)
        torch.autograd.backward([output.sum() for output in got])
        left_out = torch.tensor([0, 2, 5])
        assert all(bool((output[left_out] == 0).all()) for output in got)
        assert x.grad is not None and bool((x.grad[left_out] == 0).all()) and bool(x.grad.isfinite().all())
        assert bool((x.grad[1] != 0).any())

    def test_everything_left_out(self, backend: str, generator: Generator) -> None:
        policy = torch.full((3, 4), torch.nan, requires_grad=True)
        got = lk.token_kl(policy, torch.full((3, 4), torch.inf), torch.full((3,), -100))
        torch.autograd.backward([output.sum() for output in got])
        assert all(output.tolist() == [0.0] * 3 for output in got)
        assert policy.grad is not None and policy.grad.tolist() == [[0.0] * 4] * 3


class TestInfinities:
    def rows(self, generator: Generator, vocabulary: int = 5000) -> tuple[Tensor, Tensor, Tensor]:
        policy, ref, _ = inputs(generator, "near_1e-1", 6, vocabulary)
        return policy, ref, torch.full((6,), 17)

    @pytest.mark.parametrize("vocabulary", [1, 9, 1500])
    def test_a_row_masked_all_over_with_the_lowest_number_is_level(
        self, backend: str, generator: Generator, vocabulary: int
    ) -> None:
        masked = torch.full((2, vocabulary), torch.finfo(torch.float32).min)
        actions = torch.randint(0, vocabulary, (2,), generator=generator)
        check_token_kl(masked, masked.clone(), actions, kl="full")

    @pytest.mark.parametrize("vocabulary", [40, 5000])
    def test_column_missing_in_both_counts_for_nothing(
        self, backend: str, generator: Generator, vocabulary: int
    ) -> None:
        policy, ref, actions = self.rows(generator, vocabulary)
        for dead in (
            torch.rand(vocabulary, generator=generator) < 0.5,
            torch.arange(vocabulary) < vocabulary * 0.9,
        ):
            dead[17] = False
            x, y = policy.masked_fill(dead, -torch.inf), ref.masked_fill(dead, -torch.inf)
            for kl in KINDS:
                check_token_kl_gradients(x, y, actions, generator, kl=kl, name=kl)
                leaf = x.clone().requires_grad_()
                lk.token_kl(leaf, y, actions, kl=kl).kl.sum().backward()
                assert leaf.grad is not None and bool((leaf.grad[:, dead] == 0).all())

    @pytest.mark.parametrize("vocabulary", [40, 5000])
    def test_column_missing_in_the_policy_alone(
        self, backend: str, generator: Generator, vocabulary: int
    ) -> None:
        policy, ref, actions = self.rows(generator, vocabulary)
        policy[:, 4::7] = -torch.inf
        for kl in ("k1", "abs", "k2", "k3", "full"):
            check_token_kl_gradients(policy, ref, actions, generator, kl=kl, ref_grad=False, name=kl)
        got = check_token_kl(policy, ref, actions, kl="full_reverse")
        assert bool((got.kl == torch.inf).all())

    @pytest.mark.parametrize("vocabulary", [40, 5000])
    def test_column_missing_in_the_reference_alone(
        self, backend: str, generator: Generator, vocabulary: int
    ) -> None:
        policy, ref, actions = self.rows(generator, vocabulary)
        ref[:, 4::7] = -torch.inf
        assert bool((check_token_kl(policy, ref, actions, kl="full").kl == torch.inf).all())
        for kl in (*SAMPLED_KINDS, "full_reverse"):
            check_token_kl(policy, ref, actions, kl=kl, name=kl)

    @pytest.mark.parametrize("where", ["policy", "ref", "both"])
    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    def test_masked_with_the_smallest_number(
        self, backend: str, generator: Generator, dtype: torch.dtype, where: str
    ) -> None:
        """Hugging Face masks with finfo.min: the columns left are no worse for it."""
        policy, ref, actions = inputs(generator, "near_1e-1", 6, 5000, dtype)
        masked = torch.arange(5000) % 3 == 2
        actions = actions - actions % 3
        lowest = torch.finfo(dtype).min
        x = policy.masked_fill(masked, lowest) if where != "ref" else policy
        y = ref.masked_fill(masked, lowest) if where != "policy" else ref
        kinds = {"policy": ("full",), "ref": ("full_reverse",), "both": ("full", "full_reverse")}
        for kl in (*SAMPLED_KINDS, *kinds[where]):
            x64, y64 = (torch.where(logits == lowest, -torch.inf, logits.double()) for logits in (x, y))
            t = truth.token_kl(x64, y64, actions, kl=kl)
            got = lk.token_kl(x, y, actions, kl=kl)
            # the distance to the masked columns is no measure of an error
            finite = (
                torch.where(masked, -torch.inf, policy.double()),
                torch.where(masked, -torch.inf, ref.double()),
            )
            check_values(kl, got, t._replace(x=finite[0], y=finite[1]), {"kl": kl})

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_ref_masked_alone_with_the_smallest_number(
        self, backend: str, generator: Generator, temperature: float
    ) -> None:
        """The KL is some part of the largest number, which divided by a temperature may be no float any more."""
        policy, ref, actions = inputs(generator, "near_1e-1", few(12), 5000)
        masked = ref.masked_fill(torch.arange(5000) % 3 == 2, torch.finfo(torch.float32).min)
        assert bool(
            (lk.token_kl(policy, masked, actions, kl="full", temperature=temperature).kl > 1e30).all()
        )
        assert bool(
            (lk.token_kl(masked, policy, actions, kl="full_reverse", temperature=temperature).kl > 1e30).all()
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_action_masked_with_the_smallest_number(
        self, backend: str, generator: Generator, dtype: torch.dtype
    ) -> None:
        """In one model: the other's log-probability is not lost beside it."""
        policy, ref, _ = inputs(generator, "near_1e-1", 6, 5000, dtype)
        actions = torch.arange(6) * 3 + 2
        masked = torch.arange(5000) % 3 == 2
        lowest = torch.finfo(dtype).min / 2
        for x, y in ((policy.masked_fill(masked, lowest), ref), (policy, ref.masked_fill(masked, lowest))):
            got = lk.token_kl(x, y, actions, kl="k1")
            t = truth.token_kl(x.double(), y.double(), actions, kl="k1")
            for name in ("logprobs", "ref_logprobs"):
                true = getattr(t, name)
                tolerances.check(name, getattr(got, name), true, tolerances.logprob(true))

    @pytest.mark.parametrize("backend", ["native", "triton"], indirect=True)
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_reference_masked_all_over(self, backend: str, generator: Generator, temperature: float) -> None:
        """With a number beside which the policy's logits are nothing: the reference is uniform."""
        policy, ref, actions = inputs(generator, "near_1e-1", 2, 5000)
        for mask in (-1e13, -1e30, torch.finfo(torch.float32).min):
            for kl in ("k1", "full"):
                name = f"{mask} {kl}"
                got = lk.token_kl(policy, torch.full_like(ref, mask), actions, kl=kl, temperature=temperature)
                t = truth.token_kl(
                    policy.double(), torch.zeros_like(ref).double(), actions, kl=kl, temperature=temperature
                )
                check_values(name, got, t, {"kl": kl})

    @pytest.mark.parametrize("above", [0.0, 100.0, 2000.0])
    @pytest.mark.parametrize("best", [None, 4500])
    def test_missing_at_the_largest_logit(
        self, backend: str, generator: Generator, above: float, best: int | None
    ) -> None:
        """The column that carries a model, the centre of its tile, is impossible in the other."""
        policy, ref, actions = self.rows(generator)
        column = policy.argmax(-1, keepdim=True) if best is None else torch.full((len(policy), 1), best)
        sure, without = (
            policy.scatter(-1, column, policy.amax(-1, keepdim=True) + above),
            ref.scatter(-1, column, -torch.inf),
        )
        for temperature in (1.0, 0.1):
            for kl in ("k1", "k3", "full"):
                check_token_kl(
                    sure, without, actions, kl=kl, temperature=temperature, name=f"{kl} T={temperature}"
                )
            for kl in ("full", "full_reverse"):
                name = f"in the policy {kl} T={temperature}"
                check_token_kl(without, sure, actions, kl=kl, temperature=temperature, name=name)

    @pytest.mark.parametrize("above", [0.0, 100.0, 500.0])
    @pytest.mark.parametrize("level", [0.0, -500.0])
    def test_first_half_missing(self, backend: str, generator: Generator, above: float, level: float) -> None:
        """Tiles that one model excludes say nothing of how it lies beside the other, which has its largest there."""
        policy, ref, actions = self.rows(generator, 9000)
        first_half = torch.arange(9000) < 4500
        sure = policy.index_add(-1, torch.tensor([3]), torch.full((len(policy), 1), above + 20))
        without = (ref + level).masked_fill(first_half, -torch.inf)
        for kl in ("k1", "full"):
            check_token_kl(sure, without, actions, kl=kl, name=kl)
            check_token_kl(without, sure, actions, kl=kl, name=f"in the policy {kl}")
        check_token_kl(without, sure, actions, kl="full_reverse", name="in the policy full_reverse")

    @pytest.mark.parametrize("shift", [0.0, 300.0])
    @pytest.mark.parametrize(("part", "vocabulary"), [(3000, 9000), (33000, 40000)])
    def test_first_part_missing_with_little_weight(
        self, backend: str, generator: Generator, part: int, vocabulary: int, shift: float
    ) -> None:
        """What the first columns lack leaves the others as near as they are, wherever those lie."""
        policy, ref, actions = self.rows(generator, vocabulary)
        first = torch.arange(vocabulary) < part
        policy = policy - 20 * first
        near = (policy + 0.1 * (ref - policy) - shift).masked_fill(first, -torch.inf)
        for temperature in (1.0, 0.7):
            name = f"T={temperature}"
            check_token_kl(policy, near, actions + part, kl="k1", temperature=temperature, name=name)
            check_token_kl(
                near, policy, actions + part, kl="k1", temperature=temperature, name=f"in the policy {name}"
            )

    def test_masked_with_the_lowest_number_beside_columns_that_one_model_has(
        self, backend: str, generator: Generator
    ) -> None:
        """Columns without weight that are the largest of a tile: of one model, and nothing to the other."""
        policy, ref, actions = self.rows(generator, 4500)
        lowest, column = torch.finfo(torch.float32).min, torch.arange(4500)
        sure = policy.masked_fill((column >= 30) & (column < 3000), lowest)
        without = ref.masked_fill((column >= 30) & (column < 3000), lowest).masked_fill(
            column < 30, -torch.inf
        )
        for end in (3000, 4500):
            for temperature in (1.0, 0.1):
                for kl in ("k1", "full", "full_reverse"):
                    x, y, name = sure[:, :end], without[:, :end], f"{kl} T={temperature} to {end}"
                    check_token_kl(x, y, actions, kl=kl, temperature=temperature, name=name)
                    check_token_kl(
                        y, x, actions, kl=kl, temperature=temperature, name=f"in the policy {name}"
                    )

    def test_tiny_probability_where_the_reference_has_none(self, backend: str) -> None:
        """p > 0, if only 1e-35 of the largest: +inf, as in exact arithmetic."""
        policy, ref = torch.zeros(1, 8), torch.zeros(1, 8)
        policy[0, 5], ref[0, 5] = -80.0, -torch.inf
        assert lk.token_kl(policy, ref, torch.tensor([0]), kl="full").kl.item() == torch.inf

    def test_action_impossible(self, backend: str) -> None:
        policy, ref = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
        action = torch.tensor([1])
        missing = torch.tensor([[0.0, -torch.inf, 2.0]])
        in_policy = {kl: lk.token_kl(missing, ref, action, kl=kl) for kl in KINDS}
        assert {kl: out.kl.item() for kl, out in in_policy.items() if kl != "full"} == {
            "k1": -torch.inf, "abs": torch.inf, "k2": torch.inf, "k3": torch.inf, "full_reverse": torch.inf,
        }  # fmt: skip
        assert 0 < in_policy["full"].kl.item() < 10
        assert all(out.logprobs.item() == -torch.inf for out in in_policy.values())
        in_ref = {kl: lk.token_kl(policy, missing, action, kl=kl).kl.item() for kl in SAMPLED_KINDS}
        assert in_ref == dict.fromkeys(SAMPLED_KINDS, torch.inf)
        in_both = {kl: lk.token_kl(missing, missing.clone(), action, kl=kl) for kl in KINDS}
        assert all(out.kl.item() == 0 and out.logprobs.item() == -torch.inf for out in in_both.values())

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("where", ["policy", "ref"])
    @pytest.mark.parametrize("vocabulary", [1, 7, 5000])
    def test_a_bad_row_is_nan_alone(
        self, backend: str, generator: Generator, bad: float, where: str, vocabulary: int
    ) -> None:
        policy, ref, _ = inputs(generator, "near_1e-1", 6, vocabulary)
        actions = torch.zeros(6, dtype=torch.int64)
        for column in sorted({0, vocabulary // 2, vocabulary - 1}):
            x, y = policy.clone(), ref.clone()
            (x if where == "policy" else y)[2, column] = bad
            others = torch.arange(6) != 2
            for kl in KINDS:
                leaf = x.clone().requires_grad_()
                got = lk.token_kl(leaf, y, actions, kl=kl)
                clean = lk.token_kl(policy, ref, actions, kl=kl)
                spoilt = {"policy": ("kl", "logprobs", "entropy"), "ref": ("kl", "ref_logprobs")}[where]
                for name in ("kl", "logprobs", "ref_logprobs", "entropy"):
                    output = getattr(got, name)
                    assert torch.equal(output[others], getattr(clean, name)[others])
                    if name in spoilt:
                        assert output[2].isnan(), f"{kl} {name} with {bad} at column {column}: {output[2]}"
                    else:
                        true = getattr(truth.token_kl(policy.double(), ref.double(), actions, kl=kl), name)[2]
                        bound = tolerances.entropy if name == "entropy" else tolerances.logprob
                        tolerances.check(f"{kl} {name} of the clean model", output[2], true, bound(true))
                got.kl.sum().backward()
                assert leaf.grad is not None and bool(leaf.grad[others].isfinite().all())

    @pytest.mark.parametrize("vocabulary", [1, 7, 5000])
    def test_a_row_without_any_possible_token_is_nan(
        self, backend: str, generator: Generator, vocabulary: int
    ) -> None:
        policy, ref, _ = inputs(generator, "near_1e-1", 3, vocabulary)
        actions = torch.zeros(3, dtype=torch.int64)
        policy[1] = -torch.inf
        for kl in KINDS:
            got = lk.token_kl(policy, ref, actions, kl=kl)
            assert (
                got.kl.isnan().tolist()
                == got.logprobs.isnan().tolist()
                == got.entropy.isnan().tolist()
                == [False, True, False]
            )
            assert bool(got.ref_logprobs.isfinite().all())


@pytest.mark.usefixtures("unchecked_actions")
class TestActionsOutside:
    """Nobody waits for a GPU, so nobody raises."""

    @pytest.mark.parametrize("kl", KINDS)
    @pytest.mark.parametrize("vocabulary", [1, 100])
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
    def test_their_rows_are_nan(
        self, backend: str, generator: Generator, kl: str, vocabulary: int, dtype: torch.dtype
    ) -> None:
        policy, ref = logit_pair(generator, "near_1e-1", (8, vocabulary))
        leaves = policy.requires_grad_(), ref.requires_grad_()
        actions = torch.tensor([0, vocabulary, -1, -101, 2**31 - 1, -100, -1, 0], dtype=dtype)
        mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1])
        outside = torch.tensor([0, 1, 1, 1, 1, 0, 0, 0]).bool()
        expected = lk.token_kl(*leaves, actions.masked_fill(outside, -100), kl=kl, mask=mask)
        out = lk.token_kl(*leaves, actions, kl=kl, mask=mask)
        for name, output, without in zip(out._fields, out, expected, strict=True):
            gradients = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
            others = torch.autograd.grad(without.sum(), leaves, retain_graph=True)
            for got, want in zip((output, *gradients), (without, *others), strict=True):
                assert got[outside].isnan().all(), name
                assert torch.equal(got[~outside], want[~outside]), name


class TestLayouts:
    def test_strides(self, backend: str, generator: Generator) -> None:
        policy, ref = logit_pair(generator, "near_1e-1", (4, 6, 301))
        actions = sampled_actions(generator, policy)

        def transposed(t: Tensor) -> Tensor:
            return t.transpose(0, 1).contiguous().transpose(0, 1)

        def vocabulary_first(t: Tensor) -> Tensor:
            return t.movedim(-1, 0).contiguous().movedim(0, -1)

        def every_third(t: Tensor) -> Tensor:
            wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), torch.nan)
            wide[..., 1::3] = t
            return wide[..., 1::3]

        def padded(t: Tensor) -> Tensor:
            """A slice of a wider tensor: rows start at odd addresses."""
            wide = torch.full((t.shape[0], t.shape[1] + 1, t.shape[2] + 5), torch.nan)
            wide[:, :-1, 3:-2] = t
            return wide[:, :-1, 3:-2]

        layouts = (transposed, vocabulary_first, every_third, padded)
        for kl in ("k3", "full"):
            x, y = policy.clone().requires_grad_(), ref.clone().requires_grad_()
            plain = lk.token_kl(x, y, actions, kl=kl)
            torch.autograd.backward([output.sum() for output in plain])
            for layout in layouts:
                for other in (layout, padded):
                    a, b = layout(policy).requires_grad_(), other(ref).requires_grad_()
                    got = lk.token_kl(a, b, layout(actions.unsqueeze(-1).float())[..., 0].long(), kl=kl)
                    for output, expected in zip(got, plain, strict=True):
                        assert torch.allclose(output, expected, rtol=1e-6, atol=1e-9), layout.__name__
                    check_token_kl(a, b, actions, kl=kl, name=layout.__name__)
                    gradients = torch.autograd.grad([output.sum() for output in got], (a, b))
                    for gradient, leaf in zip(gradients, (x, y), strict=True):
                        assert leaf.grad is not None and gradient.shape == leaf.grad.shape
                        assert torch.allclose(gradient, leaf.grad, rtol=1e-5, atol=1e-8), layout.__name__

    def test_shifted_slices_as_trainers_take_them(self, backend: str, generator: Generator) -> None:
        policy, ref = logit_pair(generator, "near_1e-2", (3, 8, 777), torch.bfloat16)
        ids = torch.randint(0, 777, (3, 8), generator=generator)
        mask = (torch.arange(8) < torch.tensor([[8], [5], [6]])).int()
        check_token_kl_gradients(
            policy[:, :-1], ref[:, :-1], ids[:, 1:], generator, kl="full", mask=mask[:, 1:]
        )

    def test_expanded(self, backend: str, generator: Generator) -> None:
        policy, ref = logit_pair(generator, "near_1e-1", (1, 301))
        actions = torch.tensor(5).expand(4)
        for x, y in (
            (policy.expand(4, 301), ref.expand(4, 301)),
            (torch.randn(4, 1, generator=generator).expand(4, 301), ref.expand(4, 301)),
        ):
            for kl in KINDS:
                check_token_kl_gradients(x, y, actions, generator, kl=kl, mask=torch.tensor(True).expand(4))

    @pytest.mark.parametrize("shape", [(5,), (0, 5), (3, 0, 5), (2, 3, 5), (2, 1, 3, 5)])
    def test_leading_dimensions(self, backend: str, generator: Generator, shape: tuple[int, ...]) -> None:
        policy, ref = logit_pair(generator, "near_1", shape)
        actions = torch.randint(0, 5, shape[:-1], generator=generator)
        for kl in KINDS:
            check_token_kl_gradients(policy, ref, actions, generator, kl=kl)

    def test_int32_actions(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1", 9, 70)
        for output, expected in zip(
            lk.token_kl(policy, ref, actions.int()), lk.token_kl(policy, ref, actions), strict=True
        ):
            assert torch.equal(output, expected)

    def test_inputs_are_left_as_they_were(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1", 9, 70)
        mask, old = torch.rand(9, generator=generator) < 0.7, torch.randn(9, generator=generator)
        before = [tensor.clone() for tensor in (policy, ref, actions, mask, old)]
        x, y = policy.requires_grad_(), ref.requires_grad_()
        got = lk.token_kl(x, y, actions, mask=mask, old_logprobs=old, kl="full")
        torch.autograd.backward([output.sum() for output in got])
        assert all(torch.equal(a, b) for a, b in zip(before, (policy, ref, actions, mask, old), strict=True))


class TestReproducible:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("vocabulary", [7, 5003, 40961])
    def test_bitwise_the_same_alone_and_in_a_batch(
        self, backend: str, generator: Generator, vocabulary: int, dtype: torch.dtype
    ) -> None:
        """Run to run, whatever rows stand beside a row, in whatever order, with one thread or two."""
        policy, ref, actions = inputs(generator, "near_1e-1", 9, vocabulary, dtype)
        upstream = torch.randn(9, generator=generator)

        def run(rows: Tensor, kl: str) -> tuple[Tensor, ...]:
            x, y = policy[rows].requires_grad_(), ref[rows].requires_grad_()
            got = lk.token_kl(x, y, actions[rows], kl=kl)
            gradients = torch.autograd.grad(list(got), (x, y), [upstream[rows].to(got.kl.dtype)] * 4)
            return *(output.detach() for output in got), *gradients

        everything = torch.arange(9)
        for kl in ("k3", "full", "full_reverse"):
            first = run(everything, kl)
            try:
                for threads in (1,) if interpreted() else (2, 1):
                    torch.set_num_threads(threads)
                    for rows in (
                        everything,
                        everything.flip(0),
                        torch.tensor([4]),
                        torch.tensor([3, 8]),
                        torch.tensor([8, 0, 1]),
                    ):
                        poison = torch.full((9 * vocabulary,), torch.nan)  # freed memory that must not show
                        del poison
                        for name, a, b in zip(
                            ("kl", "logprobs", "ref_logprobs", "entropy", "dx", "dy"),
                            first,
                            run(rows, kl),
                            strict=True,
                        ):
                            assert torch.equal(a[rows], b), (
                                f"{kl} {name}: rows {rows.tolist()} with {threads} threads differ"
                            )
            finally:
                torch.set_num_threads(2)


class TestModes:
    def test_no_grad_and_inference_mode(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1e-1", 6, 301)
        policy.requires_grad_()
        expected = lk.token_kl(policy, ref, actions)
        assert all(output.requires_grad for output in expected)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = lk.token_kl(policy, ref, actions)
                fresh = lk.token_kl(
                    policy.clone(),
                    ref.clone(),
                    actions.clone(),
                    mask=torch.ones(6),
                    temperature=torch.ones(6),
                )
            assert not any(output.requires_grad for output in got)
            for a, b, c in zip(expected, got, fresh, strict=True):
                assert torch.equal(a, b) and torch.equal(a, c)

    def test_autocast_changes_nothing(self, backend: str, generator: Generator) -> None:
        policy, ref, actions = inputs(generator, "near_1e-2", 6, 301)
        x = policy.clone().requires_grad_()
        y = policy.clone().requires_grad_()
        expected = lk.token_kl(x, ref, actions, kl="full")
        expected.kl.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = lk.token_kl(y, ref, actions, kl="full")
            got.kl.sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)

    @pytest.mark.parametrize(("kl", "options"), [("k3", "plain"), ("full", "everything")])
    def test_compile(self, backend: str, generator: Generator, kl: str, options: str) -> None:
        def run(
            policy: Tensor, ref: Tensor, actions: Tensor, mask: Tensor, old: Tensor, tau: Tensor
        ) -> tuple[Tensor, ...]:
            if options == "plain":
                return tuple(lk.token_kl(policy, ref, actions, kl=kl))
            return tuple(
                lk.token_kl(
                    policy,
                    ref,
                    actions,
                    kl=kl,
                    mask=mask,
                    old_logprobs=old,
                    temperature=tau,
                    kl_clamp=(0.0, 5.0),
                )
            )

        def call(batch: int, length: int) -> tuple[Tensor, ...]:
            policy, ref = logit_pair(generator, "near_1", (batch, length, 40))
            return (
                *(policy.requires_grad_(), ref.requires_grad_(), sampled_actions(generator, policy)),
                *(
                    torch.rand(batch, length, generator=generator) < 0.6,
                    torch.randn(batch, length, generator=generator),
                ),
                torch.rand(batch, length, generator=generator) + 0.5,
            )

        compile_once(run, [call(3, 5), call(3, 8), call(2, 13), call(4, 2)])

    @pytest.mark.slow
    def test_compile_with_inductor(self, backend: str, generator: Generator) -> None:
        calls = []
        for length in (5, 8, 13):
            policy, ref = logit_pair(generator, "near_1", (3, length, 40))
            calls.append((policy.requires_grad_(), ref, sampled_actions(generator, policy)))
        compile_once(lambda policy, ref, actions: tuple(lk.token_kl(policy, ref, actions)), calls, "inductor")

    @needs_native
    @pytest.mark.parametrize("kl", ["k3", "full_reverse"])
    def test_opcheck(self, generator: Generator, kl: str) -> None:
        policy, ref = logit_pair(generator, "near_1", (3, 4, 40), torch.bfloat16)
        actions = sampled_actions(generator, policy)
        mask = torch.rand(3, 4, generator=generator) < 0.5
        per_row, old = torch.ones(3, 4, dtype=torch.float64), torch.zeros(3, 4)
        options = (list(KINDS).index(kl), False, None, (0.0, torch.inf))
        ops = torch.ops.lsc_kernels
        for arguments in (
            (policy, ref, actions, None, None, None, 0.7, *options),
            (policy, ref.float(), actions.int(), mask, old, per_row, 1.0, *options),
            (policy.transpose(0, 1), ref.transpose(0, 1), actions.T, None, None, None, 1.0, *options),
        ):
            torch.library.opcheck(ops.token_kl_forward.default, arguments)
            *outputs, state = ops.token_kl_forward(*arguments)
            upstream = [torch.randn(output.shape, generator=generator) for output in outputs]
            for grads in (upstream, (upstream[0], None, None, upstream[3])):
                for wanted in ((True, True), (True, False)):
                    torch.library.opcheck(ops.token_kl_backward.default, (*grads, *arguments, state, *wanted))


@needs_native
class TestMemory:
    SETUP = """
        lk.set_backend("native")
        def inputs(rows, vocabulary):
            x = 3 * torch.randn(rows, vocabulary)
            y = (x + 0.1 * torch.randn(rows, vocabulary)).{cast}
            return x.{cast}.requires_grad_(), y, torch.randint(0, vocabulary, (rows,))
        for kl in ("k3", "full", "full_reverse"):
            sum(lk.token_kl(*inputs(4, 3000), kl=kl)).sum().backward()
        x, y, actions = inputs(64, 128256)
    """

    @pytest.mark.parametrize("cast", ["float()", "bfloat16()"])
    def test_forward_makes_nothing_as_wide_as_the_vocabulary(self, cast: str) -> None:
        """64 x 128256 logits are 16 or 33 MB a model; a megabyte or two come by chance."""
        extra = peak_memory(
            self.SETUP.format(cast=cast),
            'for kl in ("k3", "full", "full_reverse"): out = lk.token_kl(x, y, actions, kl=kl)',
        )
        assert extra < 3 * 2**20, f"{extra / 2**20:.1f} MB"

    @pytest.mark.parametrize("kl", ["k3", "full"])
    def test_backward_makes_the_gradient_asked_for_alone(self, kl: str) -> None:
        setup = (
            self.SETUP.format(cast="float()") + f'    loss = lk.token_kl(x, y, actions, kl="{kl}").kl.sum()\n'
        )
        extra = peak_memory(setup, "loss.backward()")
        gradient = 64 * 128256 * 4
        assert 0.9 * gradient < extra < gradient + 4 * 2**20, f"{extra / 2**20:.1f} MB"


class TestBeyond31Bits:
    """Offsets that a 32-bit integer cannot hold; memory that is never touched is never taken."""

    def test_rows_and_columns_far_apart(self, backend: str, generator: Generator) -> None:
        far = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
        for shape, strides in (((2, 700), (2**31 + 9, 1)), ((3, 3), (1, 2**30 + 7))):
            policy = far.as_strided(shape, strides)
            near, ref = logit_pair(generator, "near_1e-1", shape, torch.bfloat16)
            policy.copy_(near)
            actions = sampled_actions(generator, near)
            for kl in ("k3", "full"):
                check_token_kl_gradients(policy, ref, actions, generator, kl=kl)
                check_token_kl_gradients(ref, policy, actions, generator, kl=kl)

    @needs_native
    @pytest.mark.slow
    def test_more_than_2_31_logits(self, generator: Generator) -> None:
        """Needs 5 GB for the gradient."""
        lk.set_backend("native")
        vocabulary = 2053
        rows = 2**31 // vocabulary + 3
        x, y = logit_pair(generator, "near_1e-1", (1, vocabulary), torch.bfloat16)
        policy, ref = x.expand(rows, vocabulary).requires_grad_(), y.expand(rows, vocabulary)
        actions = torch.arange(rows) % vocabulary
        got = lk.token_kl(policy, ref, actions, kl="full")
        (gradient,) = torch.autograd.grad(got.kl.sum(), policy)
        ends = torch.cat([torch.arange(5), torch.arange(rows - 5, rows)])
        some = lk.token_kl(policy[ends], ref[ends], actions[ends], kl="full")
        for output, expected in zip(got, some, strict=True):
            assert torch.equal(output[ends], expected)
        assert torch.equal(gradient[ends], torch.autograd.grad(some.kl.sum(), policy)[0][ends])
        lk.set_backend("auto")


class TestAnyInput:
    """Hypothesis looks for the shape, mask, clamp and layout nobody thought of."""

    def test_against_the_truth(self, backend: str) -> None:
        # Triton interprets each, or compiles most of them anew
        @settings(
            max_examples=12 if lk.get_backend() == "triton" else 60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            seed = data.draw(st.integers(0, 2**31), label="seed")
            generator = torch.Generator().manual_seed(seed)
            leading = data.draw(st.lists(st.integers(0, 4), max_size=3), label="leading dimensions")
            vocabulary = data.draw(st.integers(1, 70) | st.sampled_from([2047, 2048, 2049, 4097]), label="V")
            shape = (*leading, vocabulary)
            dtype = data.draw(st.sampled_from(DTYPES[:3]), label="dtype")
            policy, ref = logit_pair(
                generator, data.draw(st.sampled_from(list(REGIMES)), label="regime"), shape, dtype
            )
            actions = (
                sampled_actions(generator, policy)
                if policy.numel()
                else torch.zeros(shape[:-1], dtype=torch.int64)
            )
            options: dict[str, object] = {
                "kl": data.draw(st.sampled_from(KINDS), label="kl"),
                "grad": data.draw(st.sampled_from(["autograd", "straight_through"]), label="grad"),
            }
            interval = st.tuples(st.floats(-5, 5), st.floats(0, 5)).map(
                lambda pair: (pair[0], pair[0] + pair[1])
            )
            if data.draw(st.booleans(), label="masked"):
                options["mask"] = torch.rand(shape[:-1], generator=generator) < 0.5
            if data.draw(st.booleans(), label="clamped value"):
                options["kl_clamp"] = data.draw(interval, label="kl_clamp")
            if data.draw(st.booleans(), label="clamped ratio") and not str(options["kl"]).startswith("full"):
                options["log_ratio_clamp"] = data.draw(interval, label="log_ratio_clamp")
            if data.draw(st.booleans(), label="temperature"):
                options["temperature"] = data.draw(st.floats(0.1, 10), label="temperature")
            if data.draw(st.booleans(), label="transposed") and policy.dim() > 1:
                policy = policy.transpose(0, -1).contiguous().transpose(0, -1)
            check_token_kl_gradients(
                policy, ref, actions, generator, combinations=(("kl", "logprobs", "entropy"),), **options
            )

        check()
