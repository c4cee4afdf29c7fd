"""`lsc-kernels calibrate` and the same on a local Ray: the table that ReferenceTable.fit makes, from files."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsc_kernels import cli
from lsc_kernels.errors import UserError
from lsc_kernels.reference import ReferenceTable, StreamingQuantile, fit_ray
from lsc_kernels.reference.quantile import METHODS

pytest.importorskip("duckdb", reason="needs the extra reference")
pa = pytest.importorskip("pyarrow", reason="needs the extra reference")
pq = pytest.importorskip("pyarrow.parquet")
query = pytest.importorskip("lsc_kernels.calibrate.query")

Columns = dict[str, list]


def scores(rows: int, prompts: int, seed: int) -> Columns:
    """A long table: prompts of many lengths, two properties, some scores missing."""
    random = np.random.default_rng(seed)
    texts = ["", "é" * 7, "\N{GRINNING FACE}", 'it\'s "quoted"']
    texts += [f"prompt {number} " * int(random.integers(1, 20)) for number in range(prompts)]
    values = random.normal(size=rows)
    values[random.random(rows) < 0.05] = math.nan
    return {
        "prompt": [texts[at] for at in random.integers(0, len(texts), rows)],
        "property": [("helpful", "harmless")[at] for at in random.integers(0, 2, rows)],
        "score": values.tolist(),
        "topic": [("code", "chat", "maths")[at] for at in random.integers(0, 3, rows)],
    }


def write(path: Path, columns: Columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=500)
    return path


def assert_same(found: ReferenceTable, wanted: ReferenceTable, rtol: float = 2e-7) -> None:
    assert found.properties == wanted.properties
    for level in ("_prompts", "_buckets", "_whole"):
        mine, theirs = getattr(found, level), getattr(wanted, level)
        assert mine.keys.tolist() == theirs.keys.tolist()
        assert mine.samples.tolist() == theirs.samples.tolist()
        assert mine.references.dtype == np.float32
        np.testing.assert_allclose(mine.references, theirs.references, rtol=rtol, atol=1e-6)
    assert found.provenance.samples == wanted.provenance.samples
    assert (found.provenance.quantile, found.provenance.method) == (
        wanted.provenance.quantile,
        wanted.provenance.method,
    )


@pytest.mark.parametrize("min_samples", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_is_the_table_of_fit(method: str, min_samples: int, tmp_path: Path) -> None:
    columns = scores(3000, 200, seed=1)
    path = write(tmp_path / "scores.parquet", columns)
    result = query.calibrate(path, 0.8, method=method, min_samples=min_samples, threads=1)
    assert_same(result.table, ReferenceTable.fit(columns, 0.8, method=method, min_samples=min_samples))
    missing = np.isnan(columns["score"])
    assert result.rows == 3000 and sum(result.missing.values()) == missing.sum() > 0


VALUES = st.one_of(st.none(), st.floats(-50, 50), st.just(math.nan))
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(
    rows=st.lists(st.tuples(TEXTS, VALUES, VALUES), min_size=1, max_size=25).filter(
        lambda rows: all(any(row[k] not in (None,) and row[k] == row[k] for row in rows) for k in (1, 2))
    ),
    q=st.floats(0, 1),
    method=st.sampled_from(["linear", "median_unbiased"]),
)
@settings(deadline=None, max_examples=25)
def test_wide_tables(rows: list, q: float, method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    prompt, helpful, harmless = (list(column) for column in zip(*rows, strict=True))
    columns = {"prompt": prompt, "score_help\"'ful": helpful, "score_harmless": harmless, "utility": prompt}
    path = write(tmp_path_factory.mktemp("wide") / "it's wide.parquet", columns)
    columns.pop("utility")
    result = query.calibrate(path, q, method=method, threads=1)
    assert_same(result.table, ReferenceTable.fit(columns, q, method=method))


def test_buckets(tmp_path: Path) -> None:
    columns = scores(500, 30, seed=2)
    path = write(tmp_path / "scores.parquet", columns)
    named = query.calibrate(path, bucket="column:topic", threads=1).table
    assert_same(named, ReferenceTable.fit(columns, buckets=columns["topic"]))
    assert_same(
        query.calibrate(path, bucket="none", threads=1).table, ReferenceTable.fit(columns, buckets=None)
    )


def test_several_files_of_text(tmp_path: Path) -> None:
    columns = scores(400, 30, seed=3)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [json.dumps({**row, "score": None if math.isnan(row["score"]) else row["score"]}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:150]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[150:]))
    wanted = ReferenceTable.fit(columns, properties=["harmless", "helpful"])
    options = {"properties": ["harmless", "helpful"], "threads": 1}
    assert_same(query.calibrate([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], **options).table, wanted)
    pa_csv = pytest.importorskip("pyarrow.csv")
    pa_csv.write_csv(pa.table(columns), tmp_path / "a.csv")
    assert_same(query.calibrate(tmp_path / "*.csv", **options).table, wanted)


def test_canned(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b", "c"], "score_x": [1.0, 5.0, -2.0]}
    path = write(tmp_path / "canned.parquet", columns)
    assert_same(query.calibrate(path, canned=True).table, ReferenceTable.fit(columns, canned=True))
    twice = write(tmp_path / "twice.parquet", {"prompt": ["a", "a"], "score_x": [1.0, 5.0]})
    with pytest.raises(
        UserError, match="--canned wants one score per prompt and property; some prompt has 2"
    ):
        query.calibrate(twice, canned=True)


def test_larger_than_its_memory(tmp_path: Path) -> None:
    """What does not fit goes to disk, and the references are exact."""
    rows, limit = 2_000_000, "70MB"
    random = np.random.default_rng(4)
    number, values = random.integers(0, 50_000, rows), random.normal(size=rows)
    path = tmp_path / "scores.parquet"
    # a column of a row group takes more than the limit by itself
    table = pa.table({"prompt": [f"prompt {at:>72}" for at in number.tolist()], "score_x": values})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=1_000_000)
    assert path.stat().st_size > 150e6
    told: list[tuple[str, float]] = []
    on_disk = [0]

    def watch(doing: str, share: float) -> None:
        told.append((doing, share))
        for file in tmp_path.glob(".lsc-kernels-*/*"):
            with contextlib.suppress(FileNotFoundError):
                on_disk.append(file.stat().st_size)

    result = query.calibrate(
        path,
        memory=limit,
        threads=2,
        temp=tmp_path,
        bucket="none",
        progress=watch,
    )
    assert max(on_disk) > 1e6, "nothing was kept on disk: the limit is too high for this test"
    assert len(result.table) == len(np.unique(number))
    asked = [0, 7, 49_999]
    wanted = [[np.quantile(values[number == at], 0.85)] for at in asked]
    found = result.table.lookup([f"prompt {at:>72}" for at in asked])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    np.testing.assert_allclose(result.whole.references[0, 0], np.quantile(values, 0.85), rtol=1e-6)
    assert [doing for doing, share in told if share == 1.0] == ["reading", "whole", "prompts"]
    assert any(0 < share < 1 for _, share in told)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".lsc-kernels")] == []


def test_interrupted_query_ends_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "scores.parquet", scores(2000, 50, seed=5))

    def interrupt(doing: str, share: float) -> None:
        if doing == "prompts":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        query.calibrate(path, temp=tmp_path, progress=interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["scores.parquet"]


# ---- the command ----------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = scores(2000, 150, seed=6)
    path, out = write(tmp_path / "scores.parquet", columns), tmp_path / "new" / "refs.parquet"
    command = [
        "calibrate",
        str(path),
        "--quantile",
        "0.9",
        "--model",
        "my-sft",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    told = capsys.readouterr()
    for words in (
        "the 0.9 quantile, linear",
        "helpful",
        "harmless",
        "scores per",
        "written to",
        "biased low",
    ):
        assert words in told.out
    table = ReferenceTable.load(out)
    assert table.provenance.model == "my-sft"
    assert_same(table, ReferenceTable.fit(columns, 0.9))
    assert [file.name for file in out.parent.iterdir()] == ["refs.parquet"]

    assert cli.main(command) == 2
    assert capsys.readouterr().err.endswith("refs.parquet: is there already; --overwrite replaces it\n")
    assert cli.main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize("given", ["scores.parquet", "link.parquet", "*.parquet"])
def test_the_scores_are_not_written_over(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "scores.parquet", {"prompt": ["a"], "score_x": [1.0]})
    (tmp_path / "link.parquet").symlink_to(path)
    before = path.read_bytes()
    assert cli.main(["calibrate", str(tmp_path / given), "--out", str(path), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and f"--out {path}: is what the command reads" in error
    assert path.read_bytes() == before


def test_names_that_look_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "scores.parquet", {"prompt": ["a"], "score_[/b]": [1.0]})
    assert cli.main(["calibrate", str(path), "--out", str(tmp_path / "refs.parquet")]) == 0
    told = capsys.readouterr().out
    assert "[/b]" in told and "1 prompt, 1 score:" in told


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (None, [], "nowhere.parquet: there is no such file"),
        ({"text": ["a"]}, [], "wants columns prompt, property, score, or prompt and score_NAME; has text"),
        ({"prompt": [["a"]], "score_x": [1.0]}, [], "the column prompt wants text; it is VARCHAR[]"),
        ({"prompt": ["a"], "score_x": ["good"]}, [], "scores.parquet: Could not convert string 'good'"),
        ({"prompt": ["a", None], "score_x": [1.0, 2.0]}, [], "scores.parquet: 1 of 2 rows have no prompt"),
        ({"prompt": ["a"], "score_x": [math.nan]}, [], "property 'x' has no score"),
        ({"prompt": ["a"], "score_x": [1.0]}, ["--names", "y"], "no property 'y'; it has x"),
        (
            {"prompt": ["a"], "score_x": [1.0]},
            ["--quantile", "85"],
            "--quantile 85.0: wants a number between",
        ),
        ({"prompt": ["a"], "score_x": [1.0]}, ["--min-samples", "0"], "--min-samples 0: wants at least 1"),
        ({"prompt": ["a"], "score_x": [1.0]}, ["--bucket", "topic"], "wants length, none or column:NAME"),
        (
            {"prompt": ["a"], "score_x": [1.0]},
            ["--bucket", "column:topic"],
            "no such column; there are prompt",
        ),
        (
            {"prompt": ["a"], "score_x": [1.0]},
            ["--memory", "much"],
            "--memory much: wants a size such as 4GB",
        ),
        ({"prompt": ["a"], "score_x": [1.0]}, ["--out", "."], "is a folder"),
        ({"prompt": ["a"], "score_x": [1.0]}, ["--threads", "100000"], "--threads 100000: wants at most"),
        ({"prompt": [], "score_x": []}, [], "prompt wants text; it is"),
    ],
)
def test_mistakes_are_one_line(
    columns: Columns | None,
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "nowhere.parquet"
    if columns is not None:
        write(path := tmp_path / "scores.parquet", columns)
    assert cli.main(["calibrate", str(path), "--out", str(tmp_path / "refs.parquet"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lsc-kernels calibrate: error: ") and len(error.splitlines()) == 1
    assert words in error
    assert not (tmp_path / "refs.parquet").exists()


@pytest.mark.parametrize("command", [["calibrate", "--out", "refs.parquet"], ["plan"]])
def test_missing_extra_is_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert cli.main([*command, "scores.parquet"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "pip install 'lsc-kernels[reference]'" in error


def test_damaged_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "scores.parquet", {"prompt": ["a"], "score_x": [1.0]})
    path.write_bytes(path.read_bytes()[:-20])
    for name in ("scores.parquet", "scores.xlsx"):
        path.rename(tmp_path / name)
        path = tmp_path / name
        assert cli.main(["calibrate", str(path), "--out", str(tmp_path / "refs.parquet")]) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert error.startswith(f"lsc-kernels calibrate: error: {path}: ") and "Error:" not in error


# ---- Ray ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    """A Ray of this machine alone."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'lsc-kernels[ray]'")
    pytest.importorskip("ray.data")
    pytest.importorskip("datasketches")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_same_query_on_ray(ray: object) -> None:
    columns = scores(3000, 200, seed=7)
    properties = ["helpful", "harmless"]
    dataset = ray.data.from_arrow(pa.table(columns)).repartition(3)  # type: ignore[attr-defined]
    found = fit_ray(dataset, 0.8, properties=properties, min_samples=2, model="my-sft", parts=2, k=200)
    wanted = ReferenceTable.fit(columns, 0.8, properties=properties, min_samples=2, model="my-sft")
    assert found._prompts.keys.tolist() == wanted._prompts.keys.tolist()
    assert found._prompts.samples.tolist() == wanted._prompts.samples.tolist()
    np.testing.assert_array_equal(found._prompts.references, wanted._prompts.references)
    assert found.provenance.samples == wanted.provenance.samples
    assert found._buckets.keys.tolist() == wanted._buckets.keys.tolist()
    for level in ("_buckets", "_whole"):
        assert getattr(found, level).samples.tolist() == getattr(wanted, level).samples.tolist()
    for k, name in enumerate(properties):
        values = [
            s for n, s in zip(columns["property"], columns["score"], strict=True) if n == name and s == s
        ]
        rank = np.mean(np.array(values) <= found._whole.references[0, k])
        assert abs(rank - 0.8) < 3 * StreamingQuantile(k=200).rank_error


def test_ray_refuses_what_it_cannot_do() -> None:
    pytest.importorskip("ray.data")
    with pytest.raises(ValueError, match="linear or median_unbiased"):
        fit_ray(None, method="gaussian")  # type: ignore[arg-type]
