"""The demo: its data really conflicts, its models learn, and what it prints is what its files say."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pytest
import torch
from _modes import on_one_thread

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pq = pytest.importorskip("pyarrow.parquet")

from lsc_kernels import cli  # noqa: E402
from lsc_kernels.demo import data, figure, findings, report, speed, train  # noqa: E402

ROOT = Path(__file__).parents[1]
SEED = 0


class Ran(NamedTuple):
    """A finished run: its folder, and its words on one line."""

    out: Path
    words: str


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the demo trains: models this small lose by a second thread where the cores are busy."""
    with on_one_thread():
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = demo("--quick", "--seed", str(SEED), "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return Ran(out, " ".join(done.stdout.split()))


def demo(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "lsc_kernels.cli", "demo", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, timeout=600)


@pytest.fixture(scope="module")
def splits() -> tuple[data.Split, data.Split]:
    return data.load(SEED)


def test_the_same_seed_gives_the_same_data(splits: tuple[data.Split, data.Split]) -> None:
    assert data.load(SEED) == splits
    assert data.load(SEED + 1) != splits


def test_held_out_topics_are_not_trained_on(splits: tuple[data.Split, data.Split]) -> None:
    training, held_out = ({r.topic for r in split.responses} for split in splits)
    assert len(training) == 36 and len(held_out) == 12
    assert not training & held_out
    assert Counter(r.kind for r in splits[1].responses).keys() == set(data.KINDS)
    assert not set(splits[0].prompts) & set(splits[1].prompts)
    shared = {r.response for r in splits[0].responses} & {r.response for r in splits[1].responses}
    recipes = {r.recipe for split in splits for r in split.responses if r.response in shared}
    assert recipes <= {"refusal", "vague answer", "shrug"}, "the rest of an answer is about its topic"


def test_texts_are_clean(splits: tuple[data.Split, data.Split]) -> None:
    for split in splits:
        for r in split.responses:
            assert r.prompt.startswith("\n\nHuman: ") and r.prompt.endswith("\n\nAssistant:")
            assert re.fullmatch(r"( [A-Z][^.?!:]*[.?:]?)+\.|( .+\.)", r.response), r.response
            assert "  " not in r.response and ".." not in r.response and r.response.isascii()


def test_pairs_follow_the_grades(splits: tuple[data.Split, data.Split]) -> None:
    for split in splits:
        for name, pairs in split.pairs.items():
            assert len(pairs) == 9 * len(split.prompts)
            # Two recipes can give the same sentence, so a text may have several grades.
            grades: dict[tuple[str, str], set[int]] = {}
            for r in split.responses:
                grades.setdefault((r.prompt, r.response), set()).add(getattr(r, name))
            for pair in pairs:
                assert pair.chosen != pair.rejected
                assert max(grades[pair.prompt, pair.chosen]) > min(grades[pair.prompt, pair.rejected])


def test_the_two_properties_conflict(splits: tuple[data.Split, data.Split]) -> None:
    opposite = [
        (a.helpful - b.helpful) * (a.harmless - b.harmless) < 0
        for split in splits
        for prompt in split.prompts
        for a, b in combinations([r for r in split.responses if r.prompt == prompt], 2)
        if a.helpful != b.helpful and a.harmless != b.harmless
    ]
    assert np.mean(opposite) > 0.6
    everything = [(r.helpful, r.harmless) for split in splits for r in split.responses]
    assert np.corrcoef(np.array(everything).T)[0, 1] < -0.3
    best = {name: max(data.RECIPES, key=lambda r: getattr(r, name)) for name in data.PROPERTIES}
    assert best["helpful"].harmless == 0 and best["harmless"].helpful <= 1
    assert any(min(r.helpful, r.harmless) >= 3 for r in data.RECIPES), "and yet an answer can be good in both"


def test_conflict_is_a_count() -> None:
    def recipe(helpful: int, harmless: int) -> data.Recipe:
        return data.Recipe("", (), helpful, harmless)

    recipes = (recipe(0, 5), recipe(5, 0), recipe(5, 5))
    # (0,5)-(5,0) opposite; the two others are decided by one judge only.
    assert data.conflict(recipes) == 1.0
    assert data.conflict((*recipes, recipe(1, 1))) == pytest.approx(3 / 4)


def test_the_policy_learns_no_extreme_answers(splits: tuple[data.Split, data.Split]) -> None:
    texts = set(data.policy_texts(splits[0]))
    for r in splits[0].responses:
        if r.recipe in ("careful answer", "reckless answer"):
            assert (r.prompt, r.response) in texts
        if r.recipe in ("reckless at length", "anxious refusal"):
            assert (r.prompt, r.response) not in texts


class WordTokenizer:
    """Just enough of a tokenizer: one id per word."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("limit", "end", "ids", "prompt_tokens"),
    [
        (9, True, [11, 12, 13, 21, 22, 1], 3),
        (9, False, [11, 12, 13, 21, 22], 3),
        (5, True, [12, 13, 21, 22, 1], 2),
        (4, False, [12, 13, 21, 22], 2),
        (2, False, [21, 22], 0),
        (1, True, [21], 0),
    ],
)
def test_a_long_text_loses_its_beginning(limit: int, end: bool, ids: list[int], prompt_tokens: int) -> None:
    encoded = train.encode(WordTokenizer(), "11 12 13", "21 22", limit, end=end)  # type: ignore[arg-type]
    assert encoded == (ids, prompt_tokens)


def test_batches_hold_every_row_once_with_like_lengths() -> None:
    lengths = [random.Random(1).randrange(5, 100) for _ in range(301)]
    for rng in (None, random.Random(2)):
        drawn = list(train.batches(lengths, 16, rng))
        assert sorted(i for batch in drawn for i in batch) == list(range(301))
        assert max(map(len, drawn)) == 16
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in drawn)
        assert padded < 1.15 * sum(lengths)
    again = random.Random(2)
    first = list(train.batches(lengths, 16, again))
    assert first == drawn and list(train.batches(lengths, 16, again)) != drawn


def test_reward_models_rank_held_out_pairs(ran: Ran, splits: tuple[data.Split, data.Split]) -> None:
    """Above chance by far, and as printed; scored here text by text with transformers' own forward."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    for name in data.PROPERTIES:
        model = AutoModelForSequenceClassification.from_pretrained(ran.out / name)
        tokenizer = AutoTokenizer.from_pretrained(ran.out / name)

        def reward(text: str, model=model, tokenizer=tokenizer) -> float:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return model(
                    **tokenizer(text, return_tensors="pt", return_token_type_ids=False)
                ).logits.item()

        pairs = splits[1].pairs[name]
        right = [reward(p.prompt + p.chosen) > reward(p.prompt + p.rejected) for p in pairs]
        assert np.mean(right) > 0.8
        assert f"{np.mean(right):.1%} of {len(pairs)}" in ran.words


def test_references_are_the_quantile_of_the_samples(ran: Ran) -> None:
    by_prompt: dict[str, list[dict[str, float]]] = {}
    for sample in read_jsonl(ran.out / "samples.jsonl"):
        by_prompt.setdefault(sample["prompt"], []).append(sample)
    assert len(by_prompt) == 24
    for row in read_jsonl(ran.out / "held_out.jsonl"):
        for name in data.PROPERTIES:
            scores = [sample[f"score_{name}"] for sample in by_prompt[row["prompt"]]]
            assert row[f"reference_{name}"] == pytest.approx(np.quantile(scores, 0.85), rel=1e-5, abs=1e-5)
    for name in data.PROPERTIES:
        references = [row[f"reference_{name}"] for row in read_jsonl(ran.out / "held_out.jsonl")]
        assert f"{name} {np.mean(references):+.2f}" in ran.words


def read_jsonl(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_it_says_of_the_scored_file(ran: Ran, splits: tuple[data.Split, data.Split]) -> None:
    rows = pq.read_table(ran.out / "rewards.parquet").to_pylist()
    responses = splits[1].responses
    assert [(row["prompt"], row["response"]) for row in rows] == [(r.prompt, r.response) for r in responses]
    scores = np.array([[row[f"score_{name}"] for name in data.PROPERTIES] for row in rows])
    references = np.array([[row[f"reference_{name}"] for name in data.PROPERTIES] for row in rows])
    z = (scores - references) / np.array([2.0, 1.0])  # the scales that the table of reward models names
    utility = -np.logaddexp(0, -z.astype(np.float64)).sum(axis=1)
    # The scores are fp32, and so is their difference.
    np.testing.assert_allclose([row["utility"] for row in rows], utility, rtol=1e-5, atol=1e-6)

    helpful, harmless = (z > 0).sum(axis=0)
    both = (z > 0).all(axis=1).sum()
    assert f"{both} answers ({helpful} helpful and {harmless} harmless taken alone)" in ran.words
    binding = [data.PROPERTIES[int(np.argmin(one))] for one in z]
    for name in data.PROPERTIES:
        assert f"{name} for {np.mean([b == name for b in binding]):.0%} of the answers" in ran.words
    kl = [np.array(row["kl"]) for row in rows]
    assert f"moved {np.concatenate(kl).mean():.4f} nats per token" in ran.words
    assert f"{np.mean([one.sum() for one in kl]):.2f} per answer" in ran.words

    failing = {}
    rules = {"raw": scores.sum(axis=1), "equal": (scores / [2.0, 1.0]).sum(axis=1), "lsc": utility}
    for rule, by in rules.items():
        best: dict[str, int] = {}
        for at, r in enumerate(responses):
            if r.prompt not in best or by[at] > by[best[r.prompt]]:
                best[r.prompt] = at
        failing[rule] = sum(min(responses[at].helpful, responses[at].harmless) <= 1 for at in best.values())
    assert f"{failing['raw']} of these fail one of the judges" in ran.words
    assert f"in equal units, {failing['equal']}; by LSC-AND, {failing['lsc']}." in ran.words
    assert failing["lsc"] < failing["raw"]


def test_the_policy_is_near_its_reference_and_differs(ran: Ran) -> None:
    kl = np.concatenate(pq.read_table(ran.out / "rewards.parquet", columns=["kl"])["kl"].to_pylist())
    assert (kl >= 0).all()
    assert 1e-4 < kl.mean() < 0.2


def test_the_command_it_prints_does_the_same(ran: Ran) -> None:
    printed = re.search(r"lsc-kernels (score .*again\.parquet)", ran.words)
    assert printed
    command = [sys.executable, "-m", "lsc_kernels.cli", *printed[1].split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert pq.read_table(ran.out / "again.parquet").equals(pq.read_table(ran.out / "rewards.parquet"))


def test_speed_table(ran: Ran) -> None:
    cells = json.loads((ran.out / "speed.json").read_text())["cells"]
    assert {(c["kind"], c["dtype"], c["way"]) for c in cells if c["device"] == "cpu"} == {
        (kind, dtype, way)
        for kind in ("k3", "full")
        for dtype in ("fp32", "bf16")
        for way in (speed.EAGER, speed.OURS)
    }
    for cell in cells:
        assert f"{1e3 * cell['forward']:.1f} ms" in ran.words
        assert f"{cell['error']:.0e}" in ran.words
        if cell["kind"] == "full" and cell["way"] == speed.OURS:
            # numerics.md: 2e-5 of each row's own KL, here relative to the mean over rows that differ little.
            assert cell["error"] < 4e-5
            textbook = next(
                c for c in cells if (c["kind"], c["dtype"], c["way"]) == ("full", cell["dtype"], speed.EAGER)
            )
            assert textbook["error"] > 20 * cell["error"]


def test_the_textbook_formulas_are_right_where_policies_differ() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = 3 * torch.randn(2, 5, 1000, generator=generator)
    actions = torch.randint(1000, (5,), generator=generator)
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    d = (p / q).log().gather(-1, actions[:, None])[:, 0]
    expected = {"full": (p * (p / q).log()).sum(-1), "k3": (-d).exp() - 1 + d}
    for kind in speed.KINDS:
        torch.testing.assert_close(speed.truth(kind, x, y, actions), expected[kind])
        textbook = speed.TEXTBOOK[kind](x, y, actions)
        torch.testing.assert_close(textbook.double(), expected[kind], rtol=1e-4, atol=1e-5)


def test_a_torch_compile_that_fails_is_told_in_its_cell() -> None:
    import torch._inductor.config as inductor
    from torch._inductor.utils import fresh_cache

    with inductor.patch({"cpp.cxx": (None, "/nonexistent/compiler")}), fresh_cache():
        cells = speed.measure(speed.Shape(rows=2, vocab=301, repeats=1, compiled=True), seed=0)
    for cell in cells:
        if cell.device == "cpu" and cell.way == speed.COMPILED:
            assert cell.problem == "no C++ compiler"
        else:
            assert cell.problem is None and cell.forward > 0 and cell.forward_backward > 0


def test_the_figure_has_two_halves_with_ink(ran: Ran) -> None:
    from matplotlib.image import imread

    image = imread(ran.out / "demo.png")[..., :3]
    assert image.shape[1] > 1800 and image.shape[0] > 700
    for half in np.array_split(image, 2, axis=1):
        colours = np.unique((half.reshape(-1, 3) * 255).astype(int), axis=0)
        ink = (half.min(axis=-1) < 0.9).mean()
        assert len(colours) > 50 and 0.02 < ink < 0.7


def judged(
    helpful: int, harmless: int, scores: tuple[float, float]
) -> tuple[data.Response, tuple[float, float]]:
    response = data.Response(
        "", "", "\n\nHuman: Is a[0] [bold]?\n\nAssistant:", " a[1]", "", helpful, harmless
    )
    return response, scores


def found(*rows: tuple[data.Response, tuple[float, float]]) -> findings.Findings:
    """Answers to one request, with reference rewards of 0."""
    scores = np.array([scores for _, scores in rows], dtype=np.float32)
    z = scores / [2.0, 1.0]
    utility = -np.logaddexp(0, -z).sum(axis=1)
    return findings.Findings(tuple(r for r, _ in rows), scores, np.zeros_like(scores), utility)


RAW = found(judged(5, 0, (12.0, -4.0)), judged(3, 3, (2.0, 1.0)))
EQUAL = found(judged(0, 5, (-8.0, 8.0)), judged(3, 3, (4.0, 1.0)))
NOWHERE = found(judged(5, 0, (1.0, -4.0)), judged(3, 3, (2.0, 1.0)))
WORSE = np.random.default_rng(5).normal((-6.0, -5.0), (6.0, 4.0), (100, 2))
CROWDED = found(
    judged(0, 5, (-11.2, 4.8)),
    judged(3, 3, (-5.6, -1.0)),
    *(judged(3, 3, (x, y)) for x, y in WORSE.tolist() if x + y < -7),
)
"""Where the nearest free place for the second note lies behind the first."""


@pytest.mark.parametrize(
    ("answers", "rule", "slopes"),
    [(RAW, "raw sum", (2.0, 1.0)), (EQUAL, "sum in equal units", (1.0, 1.0))],
)
def test_the_slopes_are_those_of_the_sum_that_is_fooled(
    answers: findings.Findings, rule: str, slopes: tuple[float, float]
) -> None:
    case = answers.fooled()
    assert case is not None and (case.rule, case.slopes, case.rows) == (rule, slopes, (0, 1))
    # what the figure draws its line by says the same as the sums
    gain = (answers.margins[0] - answers.margins[1]) @ slopes
    assert gain == pytest.approx(case.total[0] - case.total[1]) and gain > 0


@pytest.mark.parametrize("answers", [RAW, EQUAL, NOWHERE, CROWDED])
def test_a_note_covers_no_answer_and_no_line_to_the_other(answers: findings.Findings, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn = []
    cells = [speed.Cell("cpu", "k3", "fp32", speed.OURS, 0.1, 0.2, 1e-6, 1e-7, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self))
        figure.draw(tmp_path / "demo.png", answers, cells, speed.QUICK)
    drawn[0].draw_without_rendering()
    axes = drawn[0].axes[0]
    notes = [text for text in axes.texts if text.get_text().startswith("first by")]
    assert [note.get_text().partition(":")[0] for note in notes] == (
        [] if answers is NOWHERE else [f"first by the {answers.fooled().rule}", "first by LSC-AND"]
    )
    for note in notes:
        box = note.get_bbox_patch().get_window_extent()
        assert not any(box.contains(*point) for point in axes.transData.transform(answers.margins))
        assert axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
        for line in (other.arrow_patch for other in notes if other is not note):
            points = line.get_transform().transform(line.get_path().interpolated(100).vertices)
            assert not any(box.contains(*point) for point in points)


def test_foreign_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    teller = report.Teller()
    teller._fooled(RAW)
    teller.closing(Path("run[bold]/:warning:"), "lsc-kernels score --out x[0]", 1.0)
    told = " ".join(capsys.readouterr().out.split())
    assert "Is a[0] [bold]?" in told and "a[1]" in told
    assert "run[bold]/:warning:/ holds" in told and told.endswith("--out x[0]")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--threads", "0"], "--threads 0: wants at least 1"),
        (["--seed", "-1"], "--seed -1: wants a number of at least 0"),
        (["--seed", f"{10**22}"], f"--seed {10**22}: wants a number from {-(2**63)} to {2**63 - 1}"),
        (["--threads", "100000"], None),
        (["--out", "{file}"], "--out {file}: File exists"),
        (["--out", "{file}/below"], "--out {file}/below: Not a directory"),
    ],
)
def test_mistakes_are_one_line(
    args: list[str], words: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a-file"
    file.touch()
    assert cli.main(["demo", *(arg.format(file=file) for arg in args)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    start = "lsc-kernels demo: error: "
    if words is None:  # it depends on the machine
        assert told.err.startswith(f"{start}{' '.join(args)}: wants") and told.err.count("\n") == 1
    else:
        assert told.err == f"{start}{words.format(file=file)}\n"


class Example(Protocol):
    def __call__(self, name: str, *args: str) -> str: ...


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs a file of examples/ as a program and returns what it prints."""
    monkeypatch.delenv("LSC_HH_DATA", raising=False)

    def run(name: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *args])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_drop_in_example(run_example: Example) -> None:
    told = run_example("drop_in.py")
    raw, lsc = (json.loads(ranks) for ranks in re.findall(r"ranks (\[.*?\])", told))
    assert raw[0] == 1 and lsc[-1] == 1, "the lopsided response comes first, then last"
    assert "rewards (4, 32)" in told


def test_hh_example_without_data_says_so(run_example: Example) -> None:
    assert "skipped" in run_example("score_hh.py")


def test_hh_example_on_dialogues(
    run_example: Example, tmp_path: Path, splits: tuple[data.Split, data.Split]
) -> None:
    """On the demo's own pairs in the layout of hh-rlhf."""
    path, out = tmp_path / "pairs.jsonl", tmp_path / "hh.parquet"
    pairs = splits[1].pairs["harmless"]
    with path.open("w") as file:
        for p in pairs:
            file.write(json.dumps({"chosen": p.prompt + p.chosen, "rejected": p.prompt + p.rejected}) + "\n")
        file.write("not json\n")
    small = ["--epochs", "1", "--hidden", "32", "--vocab", "512", "--train-pairs", "100"]
    told = run_example("score_hh.py", "--data", str(path), "--out", str(out), *small)
    assert f"left out 1 lines; the first is line {len(pairs) + 1}: not valid JSON" in told
    assert f"100 pairs to train on, {len(pairs) - 100} to score" in told
    table = pq.read_table(out)
    assert table.num_rows == 2 * (len(pairs) - 100)
    assert table["side"].to_pylist() == ["chosen", "rejected"] * (len(pairs) - 100)
    chosen, rejected = np.array(table["score_harmless"]).reshape(-1, 2).T
    accuracy = ((chosen > rejected) + 0.5 * (chosen == rejected)).mean()
    assert f"{accuracy:.1%}" in told
