"""README.md and docs/: links lead somewhere, every public name is told, the error table can be had again.

The Python examples in them are run by the conftest.py beside README.md.
"""

from __future__ import annotations

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest

import lsc_kernels as lk

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="only in the repository")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def heading_anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert target.resolve().is_relative_to(ROOT.resolve()), (
            f"{page.name} links to {link}, outside the repository"
        )
        if anchor:
            assert anchor in heading_anchors(target), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """`path/to/file.py` in running text, unless a part of the name stands for many."""
    folders = "lsc_kernels|csrc|tests|benchmarks|docs|examples|scripts"
    generated = {"docs/benchmarks.md", "docs/benchmarks.png"}
    for name in re.findall(rf"`((?:{folders})/[\w./\-]*)`", prose(page)):
        assert name in generated or (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_public_name_is_in_the_table_of_ops() -> None:
    told = set(re.findall(r"`(\w+)", prose(ROOT / "docs" / "ops.md")))
    missing = set(lk.__all__) - told
    assert not missing, f"docs/ops.md does not say what {sorted(missing)} are"
    ops = {name for name in lk.__all__ if (ROOT / "lsc_kernels" / "ops" / f"{name}.py").exists()}
    assert ops, "no op is public"
    missing = ops - set(re.findall(r"^\| `(\w+)`", prose(ROOT / "README.md"), re.MULTILINE))
    assert not missing, f"the table in README.md lacks {sorted(missing)}"


def test_every_option_of_an_op_is_told_by_its_docstring() -> None:
    for name in lk.__all__:
        op = getattr(lk, name)
        if inspect.isfunction(op):
            doc = inspect.getdoc(op) or ""
            for parameter in inspect.signature(op).parameters:
                assert parameter in doc, f"{name}: nothing is said of {parameter}"
            assert ">>>" in doc or not inspect.signature(op).parameters, f"{name}: no example"


def code(text: str) -> str:
    """A program without comments, layout and docstring."""
    tree = ast.parse(text)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


def test_the_example_of_the_readme_is_the_one_in_examples() -> None:
    blocks = [
        text
        for language, text in FENCE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
        if language == "python"
    ]
    assert code(blocks[0]) == code((ROOT / "examples" / "drop_in.py").read_text(encoding="utf-8"))


def test_make_targets_that_are_told_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        told = set(re.findall(r"(?:^|`)make ([a-z]+)\b", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert told <= targets, f"{page.name} tells of make {sorted(told - targets)}"


def test_options_of_commands_that_are_told_exist() -> None:
    """Every --option in a block of shell that calls lsc-kernels is one that its subcommand knows."""
    from lsc_kernels.cli import COMMANDS, build_parser

    calls = 0
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                continue
            for command, rest in re.findall(
                r"^\$? ?lsc-kernels (\w+)(.*)$", block.replace("\\\n", " "), re.MULTILINE
            ):
                calls += 1
                assert command in COMMANDS, f"{page.name}: lsc-kernels {command}"
                known = _options(build_parser(command), command)
                told = set(re.findall(r"(?<=\s)--[a-z][a-z\-]*", rest.partition(" #")[0]))
                assert told <= known, f"{page.name}: lsc-kernels {command} has no {sorted(told - known)}"
    assert calls >= 3


def _options(parser: object, command: str) -> set[str]:
    (subparsers,) = (action for action in parser._actions if hasattr(action, "choices") and action.choices)  # type: ignore[attr-defined]
    return {option for action in subparsers.choices[command]._actions for option in action.option_strings}


def test_the_error_table_can_be_measured_again(tmp_path: Path) -> None:
    """And says what the page says: no digit left to the textbook, the promise kept."""
    from benchmarks import accuracy

    if lk.backends()["cpu"]["native"] != "available":
        pytest.skip("the table is about the kernels")
    cases = list(accuracy.measure(4, 20011, seed=1))
    assert len(cases) == len(accuracy.CASES)
    for case in cases:
        assert case.error <= 2e-5 and case.negative == 0, case
    smallest = min(cases, key=lambda case: case.kl)
    assert smallest.kl < 1e-8 and smallest.textbook_error > 1, smallest

    page = tmp_path / "page.md"
    shutil.copy(ROOT / "docs" / "how-it-works.md", page)
    assert accuracy.main(["--rows", "2", "--vocabulary", "1001"], page) == 0
    kept, rewritten = (path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "how-it-works.md", page))
    assert "2 rows, V = 1001" in rewritten
    assert kept.partition(accuracy.BEGIN)[0] == rewritten.partition(accuracy.BEGIN)[0]
    assert kept.partition(accuracy.END)[2] == rewritten.partition(accuracy.END)[2]
    assert len(re.findall(r"^\| std", kept, re.MULTILINE)) == len(accuracy.CASES), (
        "the table was never measured"
    )


def test_the_speed_table_has_its_place() -> None:
    from benchmarks import report

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.between_markers(text, "| a |\n") is not None
