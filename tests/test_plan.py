"""`lsc-kernels plan`: the tables it reads, the references it holds them to, and what it reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lsc_kernels as lk
from lsc_kernels import cli
from lsc_kernels.analysis import frontier
from lsc_kernels.errors import UserError
from lsc_kernels.reference import ReferenceTable

pytest.importorskip("duckdb", reason="needs the extra reference")
pytest.importorskip("rich", reason="needs the extra reference")
pytest.importorskip("matplotlib", reason="needs the extra plot")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from lsc_kernels.plan import read  # noqa: E402
from lsc_kernels.plan.report import make_plan  # noqa: E402

NAMES = ("helpful", "harmless")


def wide(prompts: int, responses: int, seed: int) -> dict[str, list]:
    random = np.random.default_rng(seed)
    quality = random.normal(size=prompts * responses)
    return {
        "prompt": [f"prompt {at // responses}" for at in range(prompts * responses)],
        "score_helpful": (3 * quality + random.normal(size=len(quality))).tolist(),
        "score_harmless": (random.normal(size=len(quality)) - quality).tolist(),
    }


def write(path: Path, columns: dict[str, list]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


# ---- reading --------------------------------------------------------------------------------------

SCORES = st.one_of(st.none(), st.floats(-50, 50))


@given(
    rows=st.lists(st.tuples(st.sampled_from("abc"), SCORES, SCORES), min_size=1, max_size=12).filter(
        lambda rows: all(any(row[k] is not None for row in rows) for k in (1, 2))
    ),
    with_response=st.booleans(),
    shuffled=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=20)
def test_long_and_wide_tables_are_the_same(
    rows: list, with_response: bool, shuffled: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    prompt, helpful, harmless = (list(column) for column in zip(*rows, strict=True))
    whole = write(
        folder / "wide.parquet", {"prompt": prompt, "score_helpful": helpful, "score_harmless": harmless}
    )
    lines = [
        (row[0], name, row[k + 1], number) for number, row in enumerate(rows) for k, name in enumerate(NAMES)
    ]
    if with_response:
        shuffled.shuffle(lines)  # type: ignore[attr-defined]
    long = {
        name: [line[at] for line in lines]
        for at, name in enumerate(("prompt", "property", "score", "response"))
        if name != "response" or with_response
    }
    one = read.read_scores([whole], NAMES)
    other = read.read_scores([write(folder / "long.parquet", long)], NAMES)

    def table(samples: read.Samples) -> list:
        scores = samples.scores.nan_to_num(nan=math.inf).tolist()
        return sorted(
            (samples.texts[at], *row) for at, row in zip(samples.prompt.tolist(), scores, strict=True)
        )

    assert one.names == other.names == NAMES
    assert table(one) == table(other)


def test_what_score_writes_brings_its_references(tmp_path: Path) -> None:
    columns = wide(3, 4, seed=1)
    columns |= {"reference_helpful": [1.5] * 12, "reference_harmless": list(range(12)), "utility": [0.0] * 12}
    samples = read.read_scores([write(tmp_path / "rewards.parquet", columns)], None)
    assert samples.names == NAMES
    reference, origin = read.references(samples, None)
    assert origin == "those in the file"
    assert reference[:, 0].unique().tolist() == [1.5] and reference[:, 1].tolist() == list(range(12))
    given_anew, _ = read.references(samples, ["0.25"])
    assert given_anew.unique().tolist() == [0.25]


def test_what_score_was_given_holds_unless_given_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = wide(2, 100, seed=9)
    columns |= {f"reference_{name}": [0.5] * 200 for name in NAMES}
    about = {
        "names": ["harmless", "helpful"],
        "identity": {"--scale": [2.0, 3.0], "--floor": [0.25], "--weights": [1.0, 4.0]},
    }
    table = pa.table(columns).replace_schema_metadata({"lsc_kernels.score": json.dumps(about)})
    path = tmp_path / "rewards.parquet"
    pq.write_table(table, path)
    samples = read.read_scores([str(path)], None)
    assert samples.shape == {"scale": (3.0, 2.0), "floor": (0.25, 0.25), "weights": (4.0, 1.0)}
    command = ["plan", str(path), "--kl-budget", "1", "--plot", str(tmp_path / "plan.png")]
    assert cli.main([*command, "--scale", "5"]) == 0
    told = capsys.readouterr().out
    assert "helpful: reference 0.5 on average, scale 5, weight 4" in told

    about["identity"]["--scale"] = [9.0]  # type: ignore[index]
    other = tmp_path / "other.parquet"
    pq.write_table(table.replace_schema_metadata({"lsc_kernels.score": json.dumps(about)}), other)
    with pytest.raises(UserError, match="scored with different --scale"):
        read.read_scores([str(path), str(other)], None)


def test_references_of_every_kind(tmp_path: Path) -> None:
    columns = wide(5, 6, seed=2)
    columns["prompt"][-1] = "alone"
    samples = read.read_scores([write(tmp_path / "scores.parquet", columns)], None)
    default, _ = read.references(samples, None)
    torch.testing.assert_close(default[0], samples.scores.quantile(0.85, dim=0))
    mixed, origin = read.references(samples, ["prompt-quantile:0.5", "-1"])
    assert origin == "prompt-quantile:0.5, -1.0"
    score = samples.scores[:, 0]
    for row, number in enumerate(samples.prompt.tolist()):
        same = score[samples.prompt == number]
        wanted = same.quantile(0.5) if len(same) > 1 else score.quantile(0.5)
        assert mixed[row].tolist() == pytest.approx([wanted.item(), -1.0], rel=1e-6)

    path = tmp_path / "refs.parquet"
    known = {name: values[:24] for name, values in columns.items()}
    table = ReferenceTable.fit(known, 0.7, properties=["harmless", "helpful"])
    table.save(path)
    found, origin = read.references(samples, [str(path)])
    assert origin.endswith("(4 by prompt, 1 by bucket, 1 by whole)")
    with pytest.warns(lk.reference.FallbackWarning):
        wanted = table.lookup(columns["prompt"]).flip(1).double()
    texts = [samples.texts[number] for number in samples.prompt.tolist()]
    order = [columns["prompt"].index(text) for text in texts]
    torch.testing.assert_close(found, wanted[order])


# ---- the plan -------------------------------------------------------------------------------------


def plan_of(columns: dict[str, list], tmp_path: Path, budget: float, **options: object):  # noqa: ANN201
    samples = read.read_scores([write(tmp_path / "scores.parquet", columns)], None)
    reference, origin = read.references(samples, ["0.5"])
    ones, zeros = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return make_plan(
        samples,
        reference,
        origin,
        budget,
        scale=ones,
        floor=zeros,
        weights=ones,
        methods=("raw", "lsc"),
        **options,  # type: ignore[arg-type]
    )


def test_prompts_are_kept_apart_where_they_have_enough_responses(tmp_path: Path) -> None:
    columns = wide(4, 100, seed=3)
    plan = plan_of(columns, tmp_path, 2.0)
    assert not plan.pooled and plan.frontier.prompts == 4 and plan.frontier.samples == 100
    scores = torch.tensor([columns[f"score_{name}"] for name in NAMES], dtype=torch.float64).T.reshape(
        4, 100, 2
    )
    wanted = frontier(scores, 0.5, kl=[2.0], methods=["lsc"]).points[0]
    found = plan.at_budget("lsc")
    assert found is not None
    assert (found.p_all, found.gamma) == pytest.approx((wanted.p_all, wanted.gamma))
    assert plan.diagnosis.group is not None and plan.diagnosis.group.groups == 4
    assert "answered one prompt" not in " ".join(plan.findings())


def test_pooled_where_a_prompt_has_too_few(tmp_path: Path) -> None:
    columns = wide(200, 4, seed=4)
    plan = plan_of(columns, tmp_path, 3.0)
    assert plan.pooled and plan.frontier.prompts == 1 and plan.frontier.samples == 800
    assert "4 responses per prompt cannot show a KL of 3" in " ".join(plan.findings())
    with pytest.raises(
        ValueError, match=r"--kl-budget 3: .* KL of 0 at most; wants about 80\.3 responses per prompt"
    ):
        plan_of(columns, tmp_path, 3.0, pool="never")
    assert plan_of(columns, tmp_path, 0.01, pool="always").pooled


def test_prompts_of_different_sizes_and_missing_scores(tmp_path: Path) -> None:
    columns = wide(3, 60, seed=5)
    columns["prompt"] = ["a"] * 40 + ["b"] * 60 + ["c"] * 80
    columns["score_helpful"][:10] = [None] * 10
    plan = plan_of(columns, tmp_path, 1.0)
    assert (plan.rows, plan.prompts, plan.frontier.samples) == (170, 3, pytest.approx(170 / 3))
    assert plan.diagnosis.properties[0].missing == 10
    assert "helpful has no score on 10 samples" in " ".join(plan.diagnosis.findings())


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "scores.parquet", wide(5, 200, seed=6))
    figure, numbers = tmp_path / "figures" / "plan.pdf", tmp_path / "plan.json"
    command = [
        "plan",
        path,
        "--kl-budget",
        "3",
        "--scale",
        "2,1",
        "--plot",
        str(figure),
        "--json",
        str(numbers),
    ]
    assert cli.main([*command, "--formula", "helpful & harmless", "--methods", "raw,lsc,tanh"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for words in (
        "1000 responses to 5 prompts. References: quantile:0.85",
        "binds",
        "P(all good)",
        "lsc at KL 3: gamma = ",
        "beta of token_rewards",
        "at odds",
        "nothing" if "nothing left" in told else "group z-score",
        f"figure: {figure}".split("/")[0],
    ):
        assert words in told, words
    assert figure.read_bytes().startswith(b"%PDF")
    kept = json.loads(numbers.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert kept["frontier/base/gamma"] is None  # infinite
    assert kept["budget"] == 3 and "frontier/points/lsc/kl=3/gamma" in kept
    assert "diagnosis/properties/helpful/underfit" in kept


def test_names_that_look_like_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {name.replace("helpful", "[/b]"): values for name, values in wide(1, 40, seed=9).items()}
    path = write(tmp_path / "scores.parquet", columns)
    plots = ["--plot", str(tmp_path / "plan.png")]
    assert cli.main(["plan", path, "--kl-budget", "0.5", "--methods", "lsc", *plots]) == 0
    told = capsys.readouterr().out
    assert "[/b]: reference" in told and "to 1 prompt." in told


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kl-budget", "0"], "--kl-budget 0.0: wants a number of nats above 0"),
        (["--kl-budget", "9"], "--kl-budget 9: these samples show a KL of"),
        (["--methods", "raw,best"], "--methods best: wants some of raw,lsc"),
        (["--scale", "1,2,3"], "--scale: 3 values for 2 properties"),
        (["--scale", "0"], "--scale 0.0: wants finite numbers above 0"),
        (["--names", "kind"], "has no property 'kind'"),
        (["--names", "helpful,helpful"], "--names: wants each property once; got helpful, helpful"),
        (["--weights=-1,1"], "weights must be finite and >= 0"),
        (["--weights", "1,nan"], "--weights 1.0,nan: wants finite numbers"),
        (["--kl-budget", "inf"], "--kl-budget inf: wants a number of nats above 0"),
        (["--reference", "column:x"], "wants a number, quantile:Q"),
        (["--reference", "canned:x"], "wants a number, quantile:Q"),
        (["--reference", "nowhere.parquet"], "nowhere.parquet: No such file"),
        (["--plot", "plan.doc"], "--plot plan.doc: wants a name ending in"),
        (["--formula", "helpful & kind"], "kind"),
        (["--formula", "helpful &"], "--formula 'helpful &': "),
        (["--json", "."], "--json .: is a folder"),
        (["--json", "scores.parquet"], "--json scores.parquet: is what the command reads"),
        (["--json", "other.csv"], "--json other.csv: is there already and holds no JSON object"),
        (["--json", "plan.svg", "--plot", "plan.svg"], "is what --plot writes too"),
        (["--reference", "refs.parquet", "--json", "refs.parquet"], "is what --reference reads"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "scores.parquet", wide(10, 5, seed=7))
    for name in ("other.csv", "refs.parquet"):
        (tmp_path / name).write_text("mine")
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert cli.main(["plan", path, "--kl-budget", "1", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lsc-kernels plan: error: ") and len(error.splitlines()) == 1, error
    assert words in error
    assert all((tmp_path / name).read_bytes() == content for name, content in kept.items())


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"]}, "wants columns prompt, property, score"),
        ({"prompt": ["a"], "score_x": [None]}, "score"),
        ({"prompt": ["a"], "score_x": [math.inf]}, "1 score is infinite"),
        ({"prompt": ["a", "b"], "score_x": [1.0, None], "score_y": [None, 1.0]}, "no response has a score"),
    ],
)
def test_tables_that_cannot_be_used(
    columns: dict[str, list], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "scores.parquet", columns)
    assert cli.main(["plan", path, "--plot", str(tmp_path / "plan.png")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and words in error, error


def test_table_of_other_properties(tmp_path: Path) -> None:
    path = tmp_path / "refs.parquet"
    ReferenceTable.fit([("a", "kind", 1.0)]).save(path)
    samples = read.read_scores([write(tmp_path / "scores.parquet", wide(2, 2, seed=8))], None)
    with pytest.raises(UserError, match="has no property 'helpful'; it has kind"):
        read.references(samples, [str(path)])
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"refs\.parquet: is damaged"):
        read.references(samples, [str(path)])
