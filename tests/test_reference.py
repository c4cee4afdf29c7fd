"""Reference rewards: quantiles against NumPy, the stream's stated error, the table as a file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels.reference import (
    FallbackWarning,
    ReferenceTable,
    StreamingQuantile,
    leave_one_out_quantile,
    prompt_keys,
    quantile_reference,
)
from lsc_kernels.reference.quantile import METHODS
from lsc_kernels.reference.rows import length_bucket

SCORES = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 3), st.integers(2, 9), st.integers(1, 3)),
    elements=st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)),
)
QUANTILES = st.floats(0.01, 0.99)


def truth(samples: np.ndarray, q: float, method: str) -> np.ndarray:
    """NumPy's quantile over the middle dimension, without NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns without samples
        if method != "gaussian":
            return np.asarray(np.nanquantile(samples, q, axis=1, method=method))
        spread = np.nanstd(samples, axis=1, ddof=1)
        return np.asarray(np.nanmean(samples, axis=1) + NormalDist().inv_cdf(q) * spread)


# ---- quantiles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@given(samples=SCORES, q=QUANTILES)
@settings(deadline=None)
def test_quantile_is_numpys(method: str, samples: np.ndarray, q: float) -> None:
    found = quantile_reference(torch.from_numpy(samples), q, method=method)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), truth(samples, q, method), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(scores=SCORES, q=QUANTILES)
@settings(deadline=None)
def test_left_out_is_the_quantile_of_the_others(method: str, scores: np.ndarray, q: float) -> None:
    found = leave_one_out_quantile(torch.from_numpy(scores), q, method=method).numpy()
    for row in range(scores.shape[1]):
        others = truth(np.delete(scores, row, axis=1), q, method)
        np.testing.assert_allclose(found[:, row], others, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision_is_computed_in_fp32(
    dtype: torch.dtype, method: str, generator: torch.Generator
) -> None:
    samples = torch.randn(4, 9, 2, generator=generator).to(dtype)
    for function in (quantile_reference, leave_one_out_quantile):
        found = function(samples, 0.85, method=method)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(samples.double(), 0.85, method=method).float())


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 1, 2])
def test_any_dimension_holds_the_samples(dim: int, generator: torch.Generator) -> None:
    samples = torch.randn(4, 5, 6, generator=generator)
    torch.testing.assert_close(quantile_reference(samples, 0.3, dim=dim), samples.quantile(0.3, dim=dim))


def test_infinite_scores_order_like_others() -> None:
    samples = torch.tensor([[-math.inf], [-math.inf], [0.0], [1.0], [math.inf]])
    at = [quantile_reference(samples, q).item() for q in (0.0, 0.25, 0.3, 0.5, 0.75, 0.8, 1.0)]
    assert at == [-math.inf, -math.inf, -math.inf, 0.0, 1.0, math.inf, math.inf]


@pytest.mark.parametrize("method", METHODS)
def test_gradients(method: str, generator: torch.Generator) -> None:
    scores = torch.randn(2, 6, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    for function in (quantile_reference, leave_one_out_quantile):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, 0.7, method=method), (scores,))
    with_holes = scores.detach().clone()
    with_holes[0, 1, 0] = math.nan
    with_holes.requires_grad_()
    quantile_reference(with_holes, 0.7, method=method).sum().backward()
    assert with_holes.grad is not None
    assert with_holes.grad[0, 1, 0] == 0
    torch.testing.assert_close(with_holes.grad.sum(1), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_compiles_in_one_graph(method: str, generator: torch.Generator) -> None:
    for function in (quantile_reference, leave_one_out_quantile):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="eager")
        for n in (5, 9):
            scores = torch.randn(3, n, 2, generator=generator)
            torch.testing.assert_close(
                compiled(scores, 0.8, method=method), function(scores, 0.8, method=method)
            )


def test_equal_samples_have_a_gaussian_gradient() -> None:
    samples = torch.ones(1, 4, 1, requires_grad=True)
    quantile_reference(samples, method="gaussian").sum().backward()
    assert samples.grad is not None and samples.grad.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_that_is_not_there_has_no_gradient(method: str) -> None:
    samples = torch.tensor([[[1.0], [2.0], [torch.nan]]], requires_grad=True)
    left_out = leave_one_out_quantile(samples, 0.85, method=method)
    torch.where(left_out.isnan(), 0.0, left_out).sum().backward()
    assert samples.grad is not None and samples.grad.isfinite().all()
    alone = torch.tensor([[[1.0, 1.0], [3.0, torch.nan]]], requires_grad=True)
    found = quantile_reference(alone, 0.85, method=method)
    torch.where(found.isnan(), 0.0, found).sum().backward()
    assert alone.grad is not None and alone.grad.isfinite().all()


def exceeded(quantile: Tensor) -> tuple[float, float]:
    """How often the next standard normal sample exceeds a reference, in percent, and the standard error of that."""
    share = 100 * torch.special.ndtr(-quantile.double())
    return share.mean().item(), (share.std() / math.sqrt(share.numel())).item()


@pytest.mark.parametrize("method", METHODS)
def test_docstring_tells_the_bias_of_few_samples(method: str, generator: torch.Generator) -> None:
    doc = quantile_reference.__doc__ or ""
    (line,) = (line for line in doc.splitlines() if line.strip().startswith(f"{method}  "))
    told = [float(cell.rstrip("%")) for cell in line.split()[1:]]
    for n, percent in zip((5, 8, 16, 64), told, strict=True):
        samples = torch.randn(20_000, n, 1, generator=generator)
        share, error = exceeded(quantile_reference(samples, 0.85, method=method))
        assert abs(share - percent) < 0.5 + 5 * error, (n, share, error)


def test_gaussian_is_wrong_for_skewed_rewards(generator: torch.Generator) -> None:
    rewards = torch.empty(1, 100_000, 1, dtype=torch.float64).exponential_(generator=generator)
    above = (rewards > quantile_reference(rewards, 0.85, method="gaussian")).double().mean().item()
    assert abs(above - 0.13) < 0.005 + 5 * math.sqrt(0.13 * 0.87 / 100_000)
    assert "13%" in (quantile_reference.__doc__ or "")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([1.0],), {}, TypeError, "samples must be a tensor"),
        ((torch.ones(1, 2, 3, dtype=torch.int64),), {}, TypeError, "samples must be float32"),
        ((torch.ones(1, 2, 3), 1.5), {}, ValueError, r"q must be in \[0, 1\]; got 1.5"),
        ((torch.ones(1, 2, 3), "0.5"), {}, TypeError, "q must be a float"),
        ((torch.ones(1, 2, 3),), {"method": "median"}, ValueError, "method must be one of linear"),
        ((torch.ones(1, 2, 3), 1.0), {"method": "gaussian"}, ValueError, r"q must be inside \(0, 1\)"),
        ((torch.ones(1, 1, 3),), {"method": "gaussian"}, ValueError, "two samples"),
        ((torch.ones(1, 0, 3),), {}, ValueError, "a sample along dim -2"),
        ((torch.ones(3),), {}, ValueError, "dim -2"),
        ((torch.ones(1, 2, 3),), {"dim": 1.0}, TypeError, "dim must be an int; got float"),
    ],
)
def test_wrong_arguments(arguments: tuple, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quantile_reference(*arguments, **options)


def test_left_out_wants_a_group() -> None:
    with pytest.raises(ValueError, match=r"scores must be \[P, n, K\]"):
        leave_one_out_quantile(torch.ones(3))
    assert leave_one_out_quantile(torch.ones(2, 1, 3)).isnan().all()
    assert leave_one_out_quantile(torch.ones(0, 4, 3)).shape == (0, 4, 3)


# ---- the stream -----------------------------------------------------------------------------------


@pytest.fixture
def stream() -> StreamingQuantile:
    pytest.importorskip("datasketches")
    return StreamingQuantile(2, k=200)


def rank_errors(stream: StreamingQuantile, seen: Tensor, q: float) -> np.ndarray:
    """How far the rank of the answer is from q, as a share, per property."""
    found = stream.quantile(q).double()
    below, equal = (seen < found).double().mean(0), (seen == found).double().mean(0)
    return (torch.clamp(below - q, min=0) + torch.clamp(q - below - equal, min=0)).numpy()


def test_stream_is_exact_while_it_is_short(stream: StreamingQuantile, generator: torch.Generator) -> None:
    seen = torch.randn(150, 2, generator=generator)
    for part in seen.split(40):
        stream.update(part)
    for q in (0.0, 0.1, 0.5, 0.85, 1.0):
        torch.testing.assert_close(stream.quantile(q), quantile_reference(seen, q))


def test_stream_keeps_its_stated_error(stream: StreamingQuantile, generator: torch.Generator) -> None:
    seen = torch.randn(40_000, 2, generator=generator) ** 3
    others = StreamingQuantile(2, k=200)
    for number, part in enumerate(seen.split(1000)):
        (others if number % 2 else stream).update(part)
    assert stream.merge(others) is stream
    assert stream.count.tolist() == [40_000, 40_000]
    assert 0.01 < stream.rank_error < 0.02
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.85, 0.95]
    # 99% confidence each: three times the bound is beyond it for all of them together
    worst = max(rank_errors(stream, seen.float(), q).max() for q in quantiles)
    assert worst < 3 * stream.rank_error, worst


def test_docstring_tells_the_error_of_k(stream: StreamingQuantile) -> None:
    doc = StreamingQuantile.__doc__ or ""
    for k in (200, 800, 3200):
        one = StreamingQuantile(k=k)
        one.update(torch.randn(1_000_000))
        (row,) = (line.split() for line in doc.splitlines() if line.strip().startswith(f"{k}  "))
        assert abs(float(row[1].rstrip("%")) - 100 * one.rank_error) < 0.006
        assert float(row[2]) == pytest.approx(len(one.state_dict()["sketches"][0]) / 1000, rel=0.2)


def test_stream_leaves_out_the_missing(stream: StreamingQuantile) -> None:
    stream.update(torch.tensor([[1.0, math.nan], [3.0, math.nan]], dtype=torch.bfloat16))
    assert stream.count.tolist() == [2, 0]
    assert stream.quantile(0.5)[0] == 2 and stream.quantile(0.5)[1].isnan()
    assert StreamingQuantile().quantile(0.5).isnan()


def test_stream_takes_any_numbers(stream: StreamingQuantile) -> None:
    for values in (torch.tensor([[1, 2]]), np.array([[3.0, 4.0]]), [[5.0, 6.0]], torch.zeros(0, 2)):
        stream.update(values)  # type: ignore[arg-type]
    assert stream.quantile(0.5).tolist() == [3.0, 4.0] and stream.count.tolist() == [3, 3]


def test_state_survives_a_safe_file(
    stream: StreamingQuantile, tmp_path: Path, generator: torch.Generator
) -> None:
    stream.update(torch.randn(5000, 2, generator=generator))
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    again = StreamingQuantile(2, k=200)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.count.tolist() == stream.count.tolist()
    for q in (0.1, 0.85):
        assert torch.equal(again.quantile(q), stream.quantile(q))


def test_state_that_does_not_fit(stream: StreamingQuantile) -> None:
    state = stream.state_dict()
    with pytest.raises(ValueError, match="'k': 800"):
        StreamingQuantile(2).load_state_dict(state)
    with pytest.raises(ValueError, match="version"):
        stream.load_state_dict({**state, "version": 7})
    for sketches in (
        [state["sketches"][0][:3]] * 2,
        [torch.full((8,), 255, dtype=torch.uint8)] * 2,
        [None] * 2,
    ):
        with pytest.raises(ValueError, match="damaged"):
            stream.load_state_dict({**state, "sketches": sketches})


def test_stream_wrong_arguments(stream: StreamingQuantile) -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., 2\]; got \[3\]"):
        stream.update(torch.ones(3))
    with pytest.raises(TypeError, match="values must be a tensor"):
        stream.update(["good", "bad"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"\(2, 200\); got \(2, 800\)"):
        stream.merge(StreamingQuantile(2))
    with pytest.raises(TypeError, match="real numbers"):
        stream.update(torch.zeros(3, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="got int"):
        stream.load_state_dict(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="StreamingQuantile; got int"):
        stream.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"k must be in \[8, 65535\]"):
        StreamingQuantile(k=1)
    with pytest.raises(TypeError, match="num_properties must be an int"):
        StreamingQuantile(2.5)  # type: ignore[arg-type]


RANK = """
import sys, torch
from torch import distributed
from lsc_kernels.reference import StreamingQuantile

rank, meeting = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
stream = StreamingQuantile(2, k=64)
seen = torch.arange(20_000.0).reshape(-1, 1).repeat(1, 2)
stream.update(seen[rank::2])
merged = stream.all_merge()
assert stream.count.tolist() == [10_000, 10_000]
print(merged.count.tolist(), merged.rank_error, *merged.quantile(0.85).tolist())
try:
    StreamingQuantile(2, k=64 + rank).all_merge()
except ValueError as problem:
    assert "[(2, 64), (2, 65)]" in str(problem), problem
else:
    raise AssertionError("the ranks differ in k")
distributed.destroy_process_group()
"""


def test_ranks_merge_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("datasketches")
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert told[0] == told[1]
    count, rest = told[0].split("]")
    error, *quantiles = map(float, rest.split())
    assert count == "[20000, 20000"
    for found in quantiles:
        assert abs(found / 20_000 - 0.85) < 3 * error


# ---- the table ------------------------------------------------------------------------------------

PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ROWS = st.lists(
    st.tuples(PROMPTS, st.sampled_from(["helpful", "harmless"]), st.floats(-50, 50)), min_size=1, max_size=40
)


@given(rows=ROWS, q=QUANTILES, method=st.sampled_from(["linear", "median_unbiased"]))
@settings(deadline=None)
def test_table_holds_the_quantile_of_every_level(
    rows: list[tuple[str, str, float]], q: float, method: str
) -> None:
    table = ReferenceTable.fit(rows, q, method=method)
    prompts = sorted({prompt for prompt, _, _ in rows})
    assert len(table) == len(prompts) and table.provenance.samples == len(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found, source = table.lookup(prompts).numpy(), table.sources(prompts).numpy()
    assert found.dtype == np.float32
    for i, prompt in enumerate(prompts):
        for k, name in enumerate(table.properties):
            levels = [
                [s for p, n, s in rows if n == name and p == prompt],
                [s for p, n, s in rows if n == name and length_bucket(p) == length_bucket(prompt)],
                [s for _, n, s in rows if n == name],
            ]
            level = next(number for number, scores in enumerate(levels) if scores)
            assert source[i, k] == level
            want = np.quantile(levels[level], q, method=method)
            np.testing.assert_allclose(found[i, k], want, rtol=1e-6, atol=1e-6)


def test_gaussian_table_is_quantile_reference(generator: torch.Generator) -> None:
    samples = torch.randn(5, 6, 2, generator=generator)
    rows = [
        (f"prompt {p}", name, samples[p, i, k].item())
        for p in range(5)
        for i in range(6)
        for k, name in enumerate("ab")
    ]
    table = ReferenceTable.fit(rows, 0.8, method="gaussian")
    found = table.lookup([f"prompt {p}" for p in range(5)])
    torch.testing.assert_close(found, quantile_reference(samples, 0.8, method="gaussian"))


TRIPLES = [("a", "x", 1.0), ("a", "y", 10.0), ("b", "x", 2.0), ("b", "y", None), ("a", "x", 3.0)]


def forms() -> dict[str, object]:
    pa, pd = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    long = {name: [row[at] for row in TRIPLES] for at, name in enumerate(("prompt", "property", "score"))}
    wide = {"prompt": ["a", "b", "a"], "score_x": [1.0, 2.0, 3.0], "score_y": [10.0, None, None]}
    return {
        "tuples": TRIPLES,
        "generator": (row for row in TRIPLES),
        "mappings": [dict(zip(("prompt", "property", "score"), row, strict=True)) for row in TRIPLES],
        "long columns": long,
        "wide columns": wide,
        "tensors": {
            **wide,
            "score_x": torch.tensor([1.0, 2, 3]),
            "score_y": torch.tensor([10, math.nan, math.nan]),
        },
        "arrow": pa.table(wide),
        "pandas": pd.DataFrame(long),
    }


@pytest.mark.parametrize("form", forms())
def test_rows_of_any_form(form: str) -> None:
    table = ReferenceTable.fit(forms()[form], 0.5)
    assert table.properties == ("x", "y")
    with pytest.warns(FallbackWarning):
        assert table.lookup(["a", "b"]).tolist() == [[2.0, 10.0], [2.0, 10.0]]
    assert table.sources(["a", "b"]).tolist() == [[0, 0], [0, 1]]
    swapped = ReferenceTable.fit(forms()[form], 0.5, properties=["y", "x"])
    assert swapped.lookup(["a"]).tolist() == [[10.0, 2.0]]


@pytest.mark.parametrize(
    ("rows", "options", "error", "words"),
    [
        ([], {}, ValueError, "there are none"),
        (7, {}, TypeError, "got int"),
        ([("a", 1.0)], {}, ValueError, r"row 0 must be \(prompt, property, score\)"),
        ([(["a"], "x", 1.0)], {}, TypeError, "prompt must be text"),
        ([("a", "x", "good")], {}, TypeError, "score must be a number"),
        ([("a", "x", math.nan)], {}, ValueError, "'x' has no score"),
        ({"prompt": ["a"], "text": ["b"]}, {}, ValueError, "score_NAME; got"),
        ({"prompt": ["a"], "score_x": [1.0, 2.0]}, {}, ValueError, "equally long"),
        (TRIPLES, {"properties": ["x"]}, ValueError, "do not have 'y'"),
        (TRIPLES, {"properties": ["x", "x", "y"]}, ValueError, "differ"),
        (TRIPLES, {"properties": "x"}, TypeError, "properties must be a sequence of names; got 'x'"),
        (TRIPLES, {"model": 7}, TypeError, "model must be a text"),
        (TRIPLES, {"buckets": "topic"}, ValueError, "buckets must be 'length'"),
        (TRIPLES, {"buckets": ["topic"]}, ValueError, "one name per row, 5; got 1"),
        (TRIPLES, {"min_samples": 0}, ValueError, "min_samples"),
        (TRIPLES, {"canned": True}, ValueError, "prompt 'a' has 2 scores of 'x'"),
        (TRIPLES, {"method": "mean"}, ValueError, "method must be one of"),
    ],
)
def test_rows_that_cannot_be_fitted(rows: object, options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ReferenceTable.fit(rows, **options)


def test_falls_back_and_says_so() -> None:
    rows = [("short", "x", 1.0), ("brief", "x", 3.0), ("a prompt of another length", "x", 9.0)]
    table = ReferenceTable.fit(rows, 0.5)
    asked = ["short", "tiny", "also of the other length", "x" * 1000]
    with pytest.warns(
        FallbackWarning, match="3 of 4 prompts .* 'tiny'.*: 2 get their bucket's, 1 that of the whole"
    ):
        found = table.lookup(asked)
    assert found.flatten().tolist() == [1.0, 2.0, 9.0, 3.0]
    assert table.sources(asked).flatten().tolist() == [0, 1, 1, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        table.lookup(asked)
    assert table.lookups == {"prompt": 2, "bucket": 4, "whole": 2}
    assert table.lookup([]).shape == (0, 1)


def test_named_buckets() -> None:
    rows = [("a", "x", 1.0), ("b", "x", 3.0), ("c", "x", 7.0)]
    table = ReferenceTable.fit(rows, 0.5, buckets=["code", "code", "chat"])
    with pytest.warns(FallbackWarning):
        found = table.lookup(["?", "!", "a", "-"], buckets=["code", "chat", "chat", "maths"])
    assert found.flatten().tolist() == [2.0, 7.0, 1.0, 3.0]
    assert table.lookup(["?"]).item() == 3.0
    with pytest.raises(ValueError, match="one name per prompt, 1; got 2"):
        table.lookup(["?"], buckets=["a", "b"])
    with pytest.raises(ValueError, match="'none'; pass None"):
        ReferenceTable.fit(rows, buckets=None).lookup(["?"], buckets=["code"])


def test_few_samples_are_no_reference() -> None:
    rows = [("a", "x", 1.0), ("b", "x", 2.0), ("b", "x", 4.0)]
    table = ReferenceTable.fit(rows, 0.5, min_samples=2, buckets=None)
    assert table.sources(["a", "b"]).flatten().tolist() == [2, 0]
    with pytest.warns(FallbackWarning):
        assert table.lookup(["a", "b"]).flatten().tolist() == [2.0, 3.0]


def test_canned_responses() -> None:
    rows = [("a", "x", 1.0), ("b", "x", -2.0), ("c", "x", 5.0)]
    table = ReferenceTable.fit(rows, canned=True)
    assert (table.provenance.quantile, table.provenance.method) == (None, "canned")
    with pytest.warns(FallbackWarning):
        assert table.lookup(["a", "b", "c", "unknown"]).flatten().tolist() == [1.0, -2.0, 5.0, 1.0]


def test_references_go_into_the_ops() -> None:
    table = ReferenceTable.fit([("a", "x", 1.0), ("a", "y", 2.0)])
    utility = lk.aggregate_rewards(torch.tensor([[1.0, 2.0]]), table.lookup(["a"]))
    torch.testing.assert_close(utility, torch.tensor([2 * math.log(0.5)]))


def test_lookup_wants_texts() -> None:
    table = ReferenceTable.fit(TRIPLES)
    for wrong in ("a", [1], [b"a"], 7):
        with pytest.raises(TypeError, match="sequence of texts"):
            table.lookup(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="sequence of texts"):
            table.sources(wrong)  # type: ignore[arg-type]
    assert torch.equal(table.lookup(np.array(["a"])), table.lookup(["a"]))  # type: ignore[arg-type]


@pytest.mark.parametrize("buckets", ["length", None, ["one", "two", "two", "two", "one"]])
def test_saved_and_loaded(tmp_path: Path, buckets: object) -> None:
    pytest.importorskip("pyarrow")
    table = ReferenceTable.fit(TRIPLES, model="my-sft", buckets=buckets)  # type: ignore[arg-type]
    path = tmp_path / "refs.parquet"
    table.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["refs.parquet"]
    again = ReferenceTable.load(path)
    assert (again.properties, again.provenance, len(again)) == (table.properties, table.provenance, 2)
    assert repr(again) == repr(table)
    asked = ["a", "b", "c" * 500]
    names = ["two", "two", "one"] if isinstance(buckets, list) else None
    with pytest.warns(FallbackWarning):
        assert torch.equal(again.lookup(asked, buckets=names), table.lookup(asked, buckets=names))
    assert torch.equal(again.sources(asked, buckets=names), table.sources(asked, buckets=names))


def test_file_can_be_read_by_others(tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    ReferenceTable.fit(TRIPLES, 0.5).save(tmp_path / "refs.parquet")
    query = "SELECT reference_x, samples_x FROM '{}' WHERE prompt_key = ('0x' || substr(md5('a'), 1, 16))::UBIGINT"
    assert duckdb.sql(query.format(tmp_path / "refs.parquet")).fetchall() == [(2.0, 2)]
    assert prompt_keys(["a"]).dtype == np.uint64


def test_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "refs.parquet"
    ReferenceTable.fit(TRIPLES, 0.5).save(path)

    def disk_full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        ReferenceTable.fit([("z", "x", 1.0)], 0.5).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["refs.parquet"]
    assert ReferenceTable.load(path).lookup(["a"]).tolist() == [[2.0, 10.0]]


@given(cut=st.floats(0, 0.999), flip=st.booleans())
@settings(deadline=None, max_examples=60)
def test_damaged_file_is_told(cut: float, flip: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut anywhere, or with a byte of the values changed: an error that names the file, never other values."""
    pytest.importorskip("pyarrow")
    path = tmp_path_factory.mktemp("damaged") / "refs.parquet"
    rows = [(f"prompt {i}", "x", i * 0.37) for i in range(200)]
    table = ReferenceTable.fit(rows)
    table.save(path)
    content = bytearray(path.read_bytes())
    at = int(cut * len(content))
    if flip:
        content[at] ^= 0xFF
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        loaded = ReferenceTable.load(path)
    except ValueError as problem:
        assert str(path) in str(problem)
    else:
        assert flip
        prompts = [row[0] for row in rows]
        assert torch.equal(loaded.lookup(prompts), table.lookup(prompts))


def test_foreign_files(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path)
    with pytest.raises(ValueError, match=r"other\.parquet: is a Parquet file, but no reference table"):
        ReferenceTable.load(path)
    about = b'{"version": 99}'
    pq.write_table(pa.table({"a": [1]}).replace_schema_metadata({"lsc_kernels.reference": about}), path)
    with pytest.raises(ValueError, match=r"version 99; this release reads version 1"):
        ReferenceTable.load(path)
    path.write_text("prompt,score\n")
    with pytest.raises(ValueError, match=r"other\.parquet: is damaged, or no Parquet file"):
        ReferenceTable.load(path)
    with pytest.raises(FileNotFoundError):
        ReferenceTable.load(tmp_path / "nowhere.parquet")


def test_merged_as_if_fitted_together() -> None:
    one = ReferenceTable.fit([("a", "x", 1.0), ("b", "y", 2.0)], 0.5)
    other = ReferenceTable.fit([("c", "y", 8.0), ("a", "x", 4.0), ("a", "x", 4.0), ("d", "x", 0.0)], 0.5)
    assert other.properties == ("y", "x")
    assert one.merge(other) is one
    assert one.properties == ("x", "y") and len(one) == 4 and one.provenance.samples == 6
    assert one.sources(["a", "b", "c", "d"]).tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    with pytest.warns(FallbackWarning):
        found = one.lookup(["a", "b", "c", "d"])
    assert found[0, 0] == 3.0  # 1 once, 4 twice
    assert (found[1, 1], found[2, 1], found[3, 0]) == (2.0, 8.0, 0.0)
    assert found[0, 1] == 5.0  # of the bucket, 2 and 8
    assert found[1, 0] == pytest.approx((1 + 3 * 4) / 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"q": 0.6}, "same quantile, 0.5; got 0.6"),
        ({"q": 0.5, "model": "other"}, "same model, ''; got 'other'"),
        ({"q": 0.5, "method": "median_unbiased"}, "same method"),
        ({"q": 0.5, "buckets": None}, "same buckets, 'length'; got 'none'"),
    ],
)
def test_tables_that_do_not_go_together(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ReferenceTable.fit(TRIPLES, 0.5).merge(ReferenceTable.fit(TRIPLES, **options))
    with pytest.raises(ValueError, match="same properties"):
        ReferenceTable.fit(TRIPLES, 0.5).merge(ReferenceTable.fit(TRIPLES[:1], 0.5))
    with pytest.raises(TypeError, match="ReferenceTable; got dict"):
        ReferenceTable.fit(TRIPLES, 0.5).merge({})  # type: ignore[arg-type]


def test_thousand_of_a_million_in_five_milliseconds() -> None:
    """The best of several: what the code needs, not what else the machine does."""
    prompts = [
        f"prompt number {number} with words until it is as long as a usual one" for number in range(2000)
    ]
    table = ReferenceTable.fit({"prompt": prompts, "score_x": range(2000), "score_y": range(2000)})
    others = np.random.default_rng(0).integers(0, 2**64, 998_000, np.uint64)
    million = np.unique(np.concatenate([table._prompts.keys, others]))
    row = np.searchsorted(million, table._prompts.keys)
    references = np.zeros((len(million), 2), np.float32)
    references[row] = table._prompts.references
    table._prompts = type(table._prompts)(million, references, np.ones_like(references, np.int64))
    assert len(table) > 990_000
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        found = table.lookup(prompts[:1000])
        seconds.append(time.perf_counter() - begin)
    assert found[:, 0].tolist() == list(range(1000))
    assert min(seconds) < 5e-3


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"datasketches is not installed.*'lsc-kernels\[reference\]'"
    ):
        StreamingQuantile()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pyarrow is not installed.*'lsc-kernels\[reference\]'"):
        ReferenceTable.fit(TRIPLES).save("refs.parquet")
