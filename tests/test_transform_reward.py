"""transform_reward and ensemble_reward: values, the properties their tables claim, gradients, bad input."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk

PAGE = Path(__file__).parent.parent / "docs" / "mathematics.md"
NEEDED: dict[str, dict[str, Any]] = {
    "lsc": {"reference_reward": 0.3},
    "sigmoid": {"reference_reward": 0.3},
    "tanh": {"reference_reward": 0.3},
    **{name: {"samples": torch.linspace(-5, 5, 64)} for name in ("quantile", "log_quantile", "exp_quantile")},
}


def transformed(reward: Tensor, method: str, **options: Any) -> Tensor:
    return lk.transform_reward(reward, method, **{**NEEDED.get(method, {}), **options})


def test_the_names_of_the_contract() -> None:
    assert list(lk.TRANSFORMS) == [
        *("raw", "lsc", "sigmoid", "zscore", "clip", "minmax", "tanh"),
        *("quantile", "log_quantile", "exp_quantile"),
    ]


@pytest.mark.parametrize("table", [lk.TRANSFORMS, lk.ENSEMBLES], ids=["transforms", "ensembles"])
def test_entries_tell_what_they_are(table: Any) -> None:
    with pytest.raises(TypeError):
        table["mine"] = None
    for name, entry in table.items():
        assert entry.name == name and "arXiv:" in entry.source
        assert all(text in repr(entry) for text in (entry.formula, entry.keeps, entry.loses))
        assert "function=" not in repr(entry)
        with pytest.raises(dataclasses.FrozenInstanceError):
            entry.formula = "r"
    assert all(f"``{name}``" in (lk.transform_reward.__doc__ or "") for name in lk.TRANSFORMS)


def test_the_docstring_tells_every_option_and_default() -> None:
    for function, table in ((lk.transform_reward, lk.TRANSFORMS), (lk.ensemble_reward, lk.ENSEMBLES)):
        rows = {line.split("``")[1]: line for line in (function.__doc__ or "").splitlines() if "``  " in line}
        for name, entry in table.items():
            for option, default in entry.options.items():
                assert f"``{option}``" in rows[name], (name, option)
                if default not in (None, inspect.Parameter.empty):
                    assert str(default) in rows[name].replace("1e-4", "0.0001"), (name, option)


@pytest.mark.skipif(not PAGE.exists(), reason="only in the repository")
def test_the_page_on_the_mathematics_shows_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, table in (("transforms", lk.TRANSFORMS), ("ensembles", lk.ENSEMBLES)):
        rows = [
            f"| `{entry.name}` | `{entry.formula}` | {entry.keeps} | {entry.loses} | {entry.source} |"
            for entry in table.values()
        ]
        (shown,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
        assert shown.splitlines()[2:] == rows


def test_values(generator: Generator) -> None:
    r = torch.randn(50, generator=generator, dtype=torch.float64) * 6
    z = (r - 0.5) / 2
    expected = {
        "raw": r,
        "lsc": torch.nn.functional.logsigmoid(z),
        "sigmoid": 1 / (1 + torch.exp(-z)),
        "tanh": 2 / (1 + torch.exp(-2 * z)) - 1,
        "zscore": (r - r.mean()) / (((r - r.mean()) ** 2).sum() / 49).sqrt(),
        "minmax": (r - r.min()) / (r.max() - r.min()),
    }
    options: dict[str, dict[str, Any]] = {
        **{name: {"reference_reward": 0.5, "scale": 2.0} for name in ("lsc", "sigmoid", "tanh")},
        "zscore": {"eps": 0.0},
    }
    for method, truth in expected.items():
        for dtype in (torch.float64, torch.float32):
            got = lk.transform_reward(r.to(dtype), method, **options.get(method, {}))
            assert got.dtype is dtype
            torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=2e-6)
    clipped = lk.transform_reward(r, "clip", reference_reward=1.0, low=-2.0, high=3.0)
    assert torch.equal(clipped, torch.minimum(torch.maximum(r - 1.0, torch.tensor(-2.0)), torch.tensor(3.0)))


@pytest.mark.parametrize("method", ["zscore", "minmax"])
def test_a_narrow_gradient_is_rounded_once(method: str, generator: Generator) -> None:
    upstream = torch.randn(3, generator=generator)
    narrow = torch.randn(3, generator=generator).bfloat16().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    for reward in (narrow, wide):
        lk.transform_reward(reward, method).backward(upstream.to(reward.dtype))
    exact = torch.autograd.grad(lk.transform_reward(wide, method), wide, upstream.bfloat16().double())[0]
    assert narrow.grad is not None and torch.equal(narrow.grad, exact.bfloat16())


@pytest.mark.parametrize("method", lk.TRANSFORMS)
def test_order_is_kept(method: str, generator: Generator) -> None:
    r = (torch.rand(200, generator=generator) * 9 - 4.5).sort().values
    assert bool((transformed(r, method).diff() >= 0).all())


def test_bounds_that_are_claimed() -> None:
    r = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    assert transformed(r, "sigmoid").aminmax() == (0.0, 1.0)
    assert transformed(r, "tanh").aminmax() == (-1.0, 1.0)
    assert transformed(r, "clip").aminmax() == (-10.0, 10.0)
    assert transformed(r, "minmax").aminmax() == (0.0, 1.0)
    assert transformed(r, "quantile").aminmax() == pytest.approx((1 / 65, 64 / 65))
    assert bool(transformed(r, "log_quantile").isfinite().all())


def test_a_group_of_good_outputs_looks_like_a_group_of_bad_ones_to_zscore_and_minmax() -> None:
    groups = torch.tensor([[-7.0, -6.0, -5.0], [5.0, 6.0, 7.0]])
    for method in ("zscore", "minmax"):
        bad, good = lk.transform_reward(groups, method, dim=-1)
        torch.testing.assert_close(bad, good)


def test_quantile_is_the_distribution_of_the_samples(generator: Generator) -> None:
    samples = torch.randn(9, generator=generator, dtype=torch.float64)
    ordered = samples.sort().values
    ranks = torch.arange(1, 10, dtype=torch.float64) / 10
    torch.testing.assert_close(lk.transform_reward(ordered, "quantile", samples=samples), ranks)
    between = (ordered[1:] + ordered[:-1]) / 2
    torch.testing.assert_close(
        lk.transform_reward(between, "quantile", samples=samples), (ranks[1:] + ranks[:-1]) / 2
    )
    for function in (torch.exp, lambda x: x**3):  # only the order counts, at the samples
        torch.testing.assert_close(
            lk.transform_reward(function(ordered), "quantile", samples=function(samples)), ranks
        )


def test_quantile_takes_the_middle_of_a_tie() -> None:
    samples = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert lk.transform_reward(torch.tensor([2.0]), "quantile", samples=samples).item() == pytest.approx(0.5)


def test_quantiles_of_samples_that_are_missing_or_infinite() -> None:
    def quantile(reward: list[float], samples: Any) -> list[float]:
        return lk.transform_reward(torch.tensor(reward), "quantile", samples=torch.tensor(samples)).tolist()

    some = [math.nan, -1.0, math.nan, 0.0, 1.0]
    rewards = [-9.0, -0.5, 0.0, 5.0, math.inf]
    assert quantile(rewards, some) == quantile(rewards, [-1.0, 0.0, 1.0]) == [0.25, 0.375, 0.5, 0.75, 0.75]
    assert quantile([0.5, 0.5], [some, [math.nan] * 5])[0] == 0.625
    assert math.isnan(quantile([0.5, 0.5], [some, [math.nan] * 5])[1])
    assert quantile([-9.0, 0.0, 9.0], [-math.inf, 0.0, math.inf]) == [0.5, 0.5, 0.5]
    reward = torch.tensor([-9.0, 0.5], requires_grad=True)
    lk.transform_reward(reward, "quantile", samples=torch.tensor([-math.inf, 0.0, 1.0])).sum().backward()
    assert reward.grad is not None and reward.grad.tolist() == [0.0, 0.25]


def test_quantiles_of_each_prompts_own_samples(generator: Generator) -> None:
    samples, reward = (torch.randn(shape, generator=generator) for shape in ((3, 1, 16), (3, 4)))
    got = lk.transform_reward(reward, "log_quantile", samples=samples)
    for prompt in range(3):
        alone = lk.transform_reward(reward[prompt], "log_quantile", samples=samples[prompt, 0])
        assert torch.equal(got[prompt], alone)
    each = samples.expand(3, 4, 16)
    assert torch.equal(got, lk.transform_reward(reward, "log_quantile", samples=each))
    exponential = lk.transform_reward(reward, "exp_quantile", samples=samples, t=-3.0)
    torch.testing.assert_close(exponential, -torch.exp(-3 * got.exp()))


def test_what_is_promised_of_quantiles_of_many_samples(generator: Generator) -> None:
    """The quantile of a fresh sample of the same distribution is uniform."""
    base, fresh = (torch.randn(20_000, generator=generator) for _ in range(2))
    got = lk.transform_reward(fresh, "quantile", samples=base).sort().values
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    assert (got - uniform).abs().max() < 1.95 * math.sqrt(2 / 20_000)  # Kolmogorov-Smirnov, p = 1e-3


@pytest.mark.parametrize("method", lk.TRANSFORMS)
def test_gradients(method: str, generator: Generator) -> None:
    reward = (torch.randn(7, generator=generator, dtype=torch.float64) * 2).requires_grad_()
    options = {
        name: value.double() if isinstance(value, Tensor) else value
        for name, value in NEEDED.get(method, {}).items()
    }
    assert torch.autograd.gradcheck(lambda r: lk.transform_reward(r, method, **options), [reward])


@pytest.mark.parametrize("method", lk.TRANSFORMS)
def test_dtypes_nan_and_empty(method: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert transformed(torch.tensor([0.5, 1.5], dtype=dtype), method).dtype is torch.float32
    samples = {"samples": torch.arange(5.0)} if "samples" in lk.TRANSFORMS[method].options else {}
    got = transformed(torch.tensor([torch.nan, 1.0]), method, **samples)
    assert got.isnan().tolist() == [True, False]
    assert transformed(torch.zeros(0, 3), method, **samples).shape == (0, 3)
    if method in ("zscore", "minmax"):  # an empty batch that is its own statistics
        assert lk.transform_reward(torch.zeros(0, 3), method).shape == (0, 3)
        assert lk.transform_reward(torch.zeros(0, 3), method, dim=0).shape == (0, 3)


def test_scale_and_reference_broadcast(generator: Generator) -> None:
    reward, reference = torch.randn(4, 3, generator=generator), torch.randn(3, generator=generator)
    scale = torch.rand(4, 1, generator=generator) + 0.5
    for method in ("lsc", "sigmoid", "tanh"):
        got = lk.transform_reward(reward, method, reference_reward=reference, scale=scale)
        for i in range(4):
            for k in range(3):
                one = lk.transform_reward(
                    reward[i, k], method, reference_reward=reference[k].item(), scale=scale[i].item()
                )
                torch.testing.assert_close(got[i, k], one)


def test_ensembles(generator: Generator) -> None:
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mean = scores.sum(-1) / 4
    variance = ((scores - mean.unsqueeze(-1)) ** 2).sum(-1) / 4
    expected = {
        "mean": (mean, {}),
        "worst_case": (scores.sort(-1).values[:, 0], {}),
        "mean_minus_variance": (mean - 0.7 * variance, {"penalty": 0.7}),
    }
    assert list(expected) == list(lk.ENSEMBLES)
    for method, (truth, options) in expected.items():
        torch.testing.assert_close(lk.ensemble_reward(scores, method, **options), truth)
        assert lk.ensemble_reward(scores.half(), method, **options).dtype is torch.float32
        leaf = scores.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda s, m=method, o=options: lk.ensemble_reward(s, m, **o), [leaf])
    one = torch.tensor([[2.5]])
    assert lk.ensemble_reward(one, "mean_minus_variance", penalty=9.0).item() == 2.5


def test_compile() -> None:
    reward = torch.randn(8)
    for method in lk.TRANSFORMS:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda r, m=method: transformed(r, m), fullgraph=True, dynamic=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(reward), transformed(reward, method))
    torch._dynamo.reset()
    scores = torch.randn(5, 4)
    compiled = torch.compile(
        lambda s: lk.ensemble_reward(s, "worst_case"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(scores), lk.ensemble_reward(scores, "worst_case"))
    torch._dynamo.reset()


R = torch.zeros(3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.transform_reward([1.0], "raw"), TypeError, "reward must be a tensor; got list"),
    (lambda: lk.transform_reward(R, "softplus"), ValueError, "method must be one of raw, lsc, .*'softplus'"),
    (lambda: lk.transform_reward(R, "raw", scale=1.0), TypeError, "raw has no options; got 'scale'"),
    (lambda: lk.transform_reward(R, "tanh", floor=1.0), TypeError, "tanh has scale; got 'floor'"),
    (lambda: lk.transform_reward(R, "lsc"), ValueError, "reference_reward: lsc needs one"),
    (lambda: lk.transform_reward(R, "sigmoid"), ValueError, "reference_reward: sigmoid needs one"),
    (lambda: lk.transform_reward(R, "tanh", reference_reward=0.0, scale=0.0), ValueError, "scale must be"),
    (lambda: lk.transform_reward(R, "clip", low=1.0, high=0.0), ValueError, "low, high must be"),
    (lambda: lk.transform_reward(R, "quantile"), TypeError, "quantile needs samples"),
    (lambda: lk.transform_reward(R, "quantile", samples=R[:0]), ValueError, "samples must be .* n > 0"),
    (
        lambda: lk.transform_reward(R, "quantile", samples=torch.zeros(4, 9)),
        ValueError,
        r"samples must be \[..., n\], broadcasting against reward, \[3\]; got \[4, 9\]",
    ),
    (lambda: lk.transform_reward(R, "exp_quantile", samples=R, t=0.0), ValueError, "t must not be 0"),
    (lambda: lk.transform_reward(R[:1], "zscore"), ValueError, "zscore needs two rewards or more"),
    (lambda: lk.transform_reward(R, "minmax", samples=R[:0]), ValueError, "samples must not be empty"),
    (lambda: lk.transform_reward(R, ["raw"]), ValueError, "method must be one of"),  # type: ignore[arg-type]
    (
        lambda: lk.transform_reward(R, "clip", reference_reward=torch.zeros(4)),
        ValueError,
        r"\[3\]; got \[4\]",
    ),
    (
        lambda: lk.transform_reward(R, "tanh", reference_reward=0.0, scale=torch.ones(4)),
        ValueError,
        "scale must",
    ),
    (lambda: lk.transform_reward(R, "minmax", dim=1), ValueError, r"dim must be .* of \[3\]; got 1"),
    (lambda: lk.transform_reward(R, "zscore", dim="0"), TypeError, "dim must be an int or None; got str"),
    (lambda: lk.transform_reward(R, "zscore", eps=-1.0), ValueError, "eps must be >= 0; got -1"),
    (
        lambda: lk.transform_reward(torch.zeros(2, 3), "minmax", samples=torch.zeros(5, 7), dim=-1),
        ValueError,
        r"samples must broadcast against reward, \[2, 3\].*got \[5, 7\]",
    ),
    (lambda: lk.ensemble_reward(R, "median"), ValueError, "method must be one of mean, worst_case"),
    (lambda: lk.ensemble_reward(R, "mean_minus_variance"), TypeError, "mean_minus_variance needs penalty"),
    (
        lambda: lk.ensemble_reward(R, "mean_minus_variance", penalty=-1.0),
        ValueError,
        "penalty must be >= 0; got -1",
    ),
    (lambda: lk.ensemble_reward(torch.tensor(1.0)), ValueError, r"scores must be \[..., M\]"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
