"""token_logprobs on every backend."""

from __future__ import annotations

import _tolerances as tolerances
import _truth as truth
import pytest
import torch
from _cases import DTYPES, REGIMES, VOCABULARIES, few, logit_pair, rows_for, sampled_actions, some
from _modes import compile_once, needs_native, peak_memory
from torch import Generator, Tensor

import lsc_kernels as lk

POLICIES = [regime for regime in REGIMES if not regime.startswith(("near_1e", "shift_ref", "outlier"))]


def inputs(
    generator: Generator, regime: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    logits, _ = logit_pair(generator, regime, shape, dtype)
    return logits, sampled_actions(generator, logits)


def check(
    logits: Tensor, actions: Tensor, generator: Generator, *, name: str = "", **options: object
) -> None:
    """Both outputs, and the gradient from each and from both."""
    leaf, leaf64 = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    got = lk.token_logprobs(leaf, actions, **options)  # type: ignore[arg-type]
    true = truth.token_logprobs(leaf64, actions, **options)  # type: ignore[arg-type]
    wanted = torch.float64 if logits.dtype is torch.float64 else torch.float32
    assert got.logprobs.dtype is wanted and got.entropy.dtype is wanted
    kept = truth.row_kept(actions, options.get("mask"))  # type: ignore[arg-type]
    for field, bound in (("logprobs", tolerances.logprob), ("entropy", tolerances.entropy)):
        value = getattr(true, field).detach()
        tolerances.check(f"{name} {field}", getattr(got, field), value, torch.where(kept, bound(value), 0.0))
    for fields in (("logprobs",), ("entropy",), ("logprobs", "entropy")):
        upstream = [torch.randn(actions.shape, generator=generator) for _ in fields]
        outputs, trues = ([getattr(result, field) for field in fields] for result in (got, true))
        (gradient,) = torch.autograd.grad(outputs, leaf, [u.to(wanted) for u in upstream], retain_graph=True)
        (expected,) = torch.autograd.grad(trues, leaf64, [u.double() for u in upstream], retain_graph=True)
        assert gradient.dtype is logits.dtype
        total = torch.stack([u.abs().double() for u in upstream]).sum(0)
        bound_ = tolerances.gradient(
            expected, total, torch.zeros_like(total), options.get("temperature", 1.0), logits.dtype
        )  # type: ignore[arg-type]
        tolerances.check(
            f"{name} d {'+'.join(fields)}", gradient, expected, torch.where(kept.unsqueeze(-1), bound_, 0.0)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", POLICIES)
def test_regimes(backend: str, generator: Generator, regime: str, dtype: torch.dtype) -> None:
    for rows, vocabulary in ((few(24), 7), (few(8), 4999)):
        logits, actions = inputs(generator, regime, (rows, vocabulary), dtype)
        check(logits, actions, generator, name=f"{regime} V={vocabulary}")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabularies(backend: str, generator: Generator, vocabulary: int) -> None:
    for regime in some(generator, ("independent", "confident", "shift_1e4")):
        for dtype in DTYPES[:2]:
            logits, actions = inputs(generator, regime, (rows_for(vocabulary), vocabulary), dtype)
            check(logits, actions, generator, name=f"{regime} V={vocabulary} {dtype}")


@pytest.mark.parametrize("temperature", [0.05, 0.7, 3.0, "per row", "scalar tensor"])
def test_temperature(backend: str, generator: Generator, temperature: float | str) -> None:
    tau: float | Tensor
    for regime in some(generator, ("independent", "confident", "shift_777", "shift_1e4", "spike")):
        for dtype in DTYPES[:2]:
            match temperature:
                case "per row":
                    tau = torch.rand(6, generator=generator) * 2 + 0.1
                case "scalar tensor":
                    tau = torch.tensor(0.7)
                case _:
                    tau = float(temperature)
            logits, actions = inputs(generator, regime, (6, 2500), dtype)
            check(logits, actions, generator, name=f"{regime} {dtype} tau={temperature}", temperature=tau)


def test_fp16_and_bf16_temperature_tensors(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (6, 300))
    for dtype in DTYPES:
        check(logits, actions, generator, temperature=(torch.rand(6, generator=generator) + 0.5).to(dtype))


def test_agrees_with_token_kl(backend: str, generator: Generator) -> None:
    for regime in ("independent", "confident", "ramp_up"):
        policy, ref = logit_pair(generator, regime, (9, 5003))
        actions = sampled_actions(generator, policy)
        alone, both = lk.token_logprobs(policy, actions), lk.token_kl(policy, ref, actions)
        assert torch.allclose(alone.logprobs, both.logprobs, rtol=1e-6, atol=4e-7)
        assert torch.allclose(alone.entropy, both.entropy, rtol=4e-6, atol=2e-6)


def test_uniform_row(backend: str) -> None:
    for vocabulary in (1, 2, 1000, 32001):
        got = lk.token_logprobs(torch.full((1, vocabulary), 7.25), torch.tensor([vocabulary - 1]))
        want = torch.tensor(float(vocabulary), dtype=torch.float64).log().item()
        assert got.logprobs.item() == pytest.approx(-want, rel=4e-7, abs=4e-7)
        assert got.entropy.item() == pytest.approx(want, rel=2e-6, abs=2e-6)


def test_a_bad_row_is_nan_alone(backend: str, generator: Generator) -> None:
    for vocabulary in (1, 7, 5000):
        clean, _ = inputs(generator, "independent", (5, vocabulary))
        actions = torch.zeros(5, dtype=torch.int64)
        expected = lk.token_logprobs(clean, actions)
        others = torch.arange(5) != 2
        for bad in (torch.nan, torch.inf):
            for column in sorted({0, vocabulary // 2, vocabulary - 1}):
                logits = clean.clone()
                logits[2, column] = bad
                leaf = logits.requires_grad_()
                got = lk.token_logprobs(leaf, actions)
                for a, b in zip(got, expected, strict=True):
                    assert a[2].isnan() and torch.equal(a[others], b[others]), (
                        f"V={vocabulary} {bad} at {column}"
                    )
                torch.autograd.backward([output.sum() for output in got])
                assert leaf.grad is not None and bool(leaf.grad[others].isfinite().all())
        logits = clean.clone()
        logits[2] = -torch.inf
        for a, b in zip(lk.token_logprobs(logits, actions), expected, strict=True):
            assert a[2].isnan() and torch.equal(a[others], b[others])


@pytest.mark.usefixtures("unchecked_actions")
def test_a_row_whose_action_is_outside_is_nan(backend: str, generator: Generator) -> None:
    """Nobody waits for a GPU, so nobody raises."""
    logits, _ = inputs(generator, "independent", (4, 100))
    logits.requires_grad_()
    for output in lk.token_logprobs(logits, torch.tensor([3, 100, -1, -100])):
        (gradient,) = torch.autograd.grad(output.sum(), logits, retain_graph=True)
        for each in (output, gradient):
            assert each[0].isfinite().all() and each[1:3].isnan().all() and (each[3] == 0).all()


def test_columns_at_minus_infinity_count_for_nothing(backend: str, generator: Generator) -> None:
    for vocabulary in (9, 5000):
        logits, _ = inputs(generator, "independent", (6, vocabulary))
        dead = torch.rand(vocabulary, generator=generator) < 0.6
        dead[3] = False
        actions = torch.full((6,), 3)
        masked = logits.masked_fill(dead, -torch.inf)
        check(masked, actions, generator)
        for got, alone in zip(
            lk.token_logprobs(masked, actions),
            lk.token_logprobs(logits[:, ~dead], actions - int(dead[:3].sum())),
            strict=True,
        ):
            assert torch.allclose(got, alone, rtol=2e-6, atol=2e-6)
        leaf = masked.requires_grad_()
        torch.autograd.backward([output.sum() for output in lk.token_logprobs(leaf, actions)])
        assert leaf.grad is not None and bool((leaf.grad[:, dead] == 0).all())
    impossible = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    got_ = lk.token_logprobs(impossible, torch.tensor([1]))
    assert got_.logprobs.item() == -torch.inf and 0 < got_.entropy.item() < 1


def test_masks(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (4, 6, 90))
    mask = torch.rand(4, 6, generator=generator) < 0.5
    mask[0, :2] = torch.tensor([True, False])
    for under in (torch.nan, torch.inf, -torch.inf):
        logits[~mask] = under
        check(logits, actions, generator, mask=mask.float())
        ignored = torch.where(mask, actions, -100)
        for dtype in (torch.int32, torch.int64):
            check(logits, ignored.to(dtype), generator)
        leaf = logits.clone().requires_grad_()
        got = lk.token_logprobs(leaf, actions, mask=mask)
        torch.autograd.backward(tuple(got), [torch.where(mask, 1.0, torch.nan)] * 2)
        assert (
            leaf.grad is not None and bool((leaf.grad[~mask] == 0).all()) and bool(leaf.grad.isfinite().all())
        )
        assert all(bool((output[~mask] == 0).all()) for output in got)


def test_layouts(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (3, 8, 301))
    vocabulary_first = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    wide = torch.full((3, 8, 602), torch.nan)
    wide[..., ::2] = logits
    expanded = logits[:, :1].expand(3, 8, 301)
    for layout in (
        logits[:, :-1],
        logits[:, 1:],
        vocabulary_first,
        wide[..., ::2],
        expanded,
        logits.transpose(0, 1),
    ):
        check(layout, sampled_actions(generator, layout), generator, name=str(layout.stride()))
    for shape in ((0, 5), (3, 0, 5), (5,), (2, 1, 3, 5)):
        check(
            torch.randn(shape, generator=generator),
            torch.zeros(shape[:-1], dtype=torch.int64),
            generator,
            name=str(shape),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [7, 5003, 40961])
def test_bitwise_the_same_alone_and_in_a_batch(
    backend: str, generator: Generator, vocabulary: int, dtype: torch.dtype
) -> None:
    logits, actions = inputs(generator, "independent", (9, vocabulary), dtype)
    upstream = torch.randn(9, generator=generator)

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        leaf = logits[rows].requires_grad_()
        got = lk.token_logprobs(leaf, actions[rows])
        return *got, *torch.autograd.grad(tuple(got), leaf, [upstream[rows].to(got.logprobs.dtype)] * 2)

    first = run(torch.arange(9))
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            for rows in (torch.arange(9), torch.arange(9).flip(0), torch.tensor([4]), torch.tensor([8, 0])):
                for name, a, b in zip(("logprobs", "entropy", "gradient"), first, run(rows), strict=True):
                    assert torch.equal(a[rows], b), (
                        f"{name}: rows {rows.tolist()} with {threads} threads differ"
                    )
    finally:
        torch.set_num_threads(2)


def test_inputs_are_left_as_they_were(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (5, 70))
    mask, tau = torch.tensor([1, 0, 1, 1, 0]), torch.rand(5, generator=generator) + 0.5
    before = [tensor.clone() for tensor in (logits, actions, mask, tau)]
    got = lk.token_logprobs(logits.requires_grad_(), actions, mask=mask, temperature=tau)
    torch.autograd.backward([output.sum() for output in got])
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, actions, mask, tau), strict=True))


def test_second_derivative_raises(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (3, 9))
    logits.requires_grad_()
    for output in lk.token_logprobs(logits, actions):
        (gradient,) = torch.autograd.grad(output.sum(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="token_logprobs.*(first derivative|twice)"):
            gradient.sum().backward()


def test_gradcheck(generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (3, 6), torch.float64)
    for options in (
        {},
        {"temperature": 0.7},
        {"temperature": torch.tensor([0.5, 1.0, 2.0])},
        {"mask": torch.tensor([1, 0, 1])},
    ):
        op = lambda x, o=options: tuple(lk.token_logprobs(x, actions, **o))  # noqa: E731
        assert torch.autograd.gradcheck(op, (logits.requires_grad_(),))


def test_modes(backend: str, generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (5, 301))
    logits.requires_grad_()
    expected = lk.token_logprobs(logits, actions)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            got = lk.token_logprobs(logits, actions)
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_compile(backend: str, generator: Generator) -> None:
    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        logits, actions = inputs(generator, "independent", (batch, length, 40))
        return logits.requires_grad_(), actions, torch.rand(batch, length, generator=generator) < 0.6

    compile_once(
        lambda logits, actions, mask: tuple(lk.token_logprobs(logits, actions, mask=mask)),
        [call(3, 5), call(3, 8), call(2, 13), call(4, 2)],
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    logits, actions = inputs(generator, "independent", (3, 4, 40), torch.bfloat16)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    ops = torch.ops.lsc_kernels
    for arguments in (
        (logits, actions, None, None, 0.7),
        (logits.transpose(0, 1), actions.T.int(), mask.T, torch.ones(4, 3, dtype=torch.float64), 1.0),
    ):
        torch.library.opcheck(ops.token_logprobs_forward.default, arguments)
        *outputs, state = ops.token_logprobs_forward(*arguments)
        upstream = [torch.randn(output.shape, generator=generator) for output in outputs]
        for grads in (upstream, (None, upstream[1])):
            torch.library.opcheck(ops.token_logprobs_backward.default, (*grads, *arguments, state))


@needs_native
def test_forward_makes_nothing_as_wide_as_the_vocabulary() -> None:
    setup = """
        lk.set_backend("native")
        small = torch.randn(4, 3000, requires_grad=True)
        lk.token_logprobs(small, torch.zeros(4, dtype=torch.int64)).logprobs.sum().backward()
        x, actions = torch.randn(64, 128256, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    """
    assert peak_memory(setup, "out = lk.token_logprobs(x, actions)") < 2 * 2**20


def test_offsets_beyond_31_bits(backend: str, generator: Generator) -> None:
    far = torch.empty(2**31 + 5000, dtype=torch.bfloat16)
    for shape, strides in (((2, 700), (2**31 + 9, 1)), ((3, 3), (1, 2**30 + 7))):
        logits = far.as_strided(shape, strides)
        logits.copy_(3 * torch.randn(shape, generator=generator))
        check(logits, sampled_actions(generator, logits), generator)
