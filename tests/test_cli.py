"""The command line: what it prints, and that a user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import lsc_kernels as lk
from lsc_kernels import cli, native
from lsc_kernels.errors import UserError


def lsc_kernels(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "lsc_kernels.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=300)


def assert_user_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_info_text() -> None:
    done = lsc_kernels("info")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for words in (
        lk.__version__,
        "cpu: native",
        "cuda: native",
        "instruction set",
        "CUDA architectures",
        "threads",
    ):
        assert words in done.stdout


def test_info_json() -> None:
    done = lsc_kernels("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["versions"]["lsc_kernels"] == lk.__version__
    assert facts["backends"] == lk.backends()
    assert facts["extension"]["available"] is (native.UNAVAILABLE is None)
    assert facts["cpu"]["threads"] >= 1
    built = native._C.cuda_architectures() if native.UNAVAILABLE is None else []
    assert facts["cuda"]["architectures"] == built
    assert bool(built) is not bool(native._C.cuda_skipped() if native.UNAVAILABLE is None else True)


def test_info_tells_why_there_is_no_extension_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from lsc_kernels import info

    monkeypatch.setattr(native, "UNAVAILABLE", "no working C++ compiler was found when it was installed")
    facts = info.collect()
    text = info.render(facts)
    assert facts["cpu"]["isa"] is None and facts["extension"]["build"] is None
    assert "none: the CPU kernels are not built" in text
    assert facts["backends"]["cpu"]["native"] in text
    assert any("LSC_KERNELS_BUILD=cpu pip install" in line for line in facts["advice"])
    json.dumps(facts)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_instruction_set_can_be_chosen() -> None:
    from lsc_kernels import _C

    for isa in _C.isas():
        facts = json.loads(lsc_kernels("info", "--json", LSC_KERNELS_CPU=isa).stdout)
        assert facts["cpu"]["isa"] == isa
        assert facts["environment"]["LSC_KERNELS_CPU"] == isa
    for unavailable in set(_C.build_info()["isas"]) - set(_C.isas()):
        assert_user_error(lsc_kernels("info", LSC_KERNELS_CPU=unavailable), "LSC_KERNELS_CPU", unavailable)


@pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))
def test_unknown_instruction_set() -> None:
    assert_user_error(lsc_kernels("info", LSC_KERNELS_CPU="sse9"), "LSC_KERNELS_CPU", "'sse9'", "baseline")


def test_unknown_backend() -> None:
    assert_user_error(
        lsc_kernels("info", LSC_KERNELS_BACKEND="warp"), "LSC_KERNELS_BACKEND", "'warp'", "eager"
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ["COMMAND"]),
        (("calibrate-all",), ["'calibrate-all'", "score"]),
        (("info", "--yaml"), ["--yaml", "`lsc-kernels info --help`"]),
    ],
)
def test_wrong_arguments(args: tuple[str, ...], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(args)
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main([*filter(None, [command]), "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lsc-kernels")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"lsc-kernels {lk.__version__}\n"


def test_reader_that_stops_reading() -> None:
    command = [sys.executable, "-m", "lsc_kernels.cli", "info"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


BENCH = ["bench", "--rows", "3", "--vocab", "50", "--repeats", "1", "--no-compile"]


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(BENCH) == 0
    table = capsys.readouterr().out
    for words in ("read floor", "lsc_kernels", "eager PyTorch", "bf16", "with backward", "error"):
        assert words in table


def test_bench_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*BENCH, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["read_bytes_per_second"] > 0
    ours = [cell for cell in result["cells"] if cell["way"] == "lsc_kernels" and cell["device"] == "cpu"]
    assert {(cell["kind"], cell["dtype"]) for cell in ours} >= {("full", "fp32"), ("k3", "bf16")}
    for cell in ours:
        assert cell["forward"] > 0 and cell["forward_backward"] > 0
        assert cell["error"] < 2e-5  # the promise for the KL of each row, and rows differ little


def test_bench_wants_positive_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--vocab", "0"]) == 2
    assert capsys.readouterr().err == "lsc-kernels bench: error: --vocab 0: wants at least 1\n"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["bench", "--rows", "1000000000"], "--rows 1000000000 --vocab 128256: need 4104192 GB at least"),
        (["bench", "--seed", "9" * 23], "wants a number from"),
        (["demo", "--seed", "9" * 23], "wants a number from"),
        (["bench", "--threads", "100000"], "--threads 100000: wants at most"),
        (["demo", "--threads", "100000"], "--threads 100000: wants at most"),
    ],
)
def test_numbers_beyond_this_machine(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_bench_that_finds_too_little_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lsc_kernels.demo import speed

    def full(*_: object) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
        )

    monkeypatch.setattr(speed, "measure", full)
    assert cli.main(BENCH) == 2
    assert "--rows 3 --vocab 50: do not fit into memory" in capsys.readouterr().err


def without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where importing torch fails as if it were not installed."""
    code = f"import sys; sys.modules['torch'] = None; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_without_torch_info_says_how_to_get_it() -> None:
    for options in ([], ["--json"]):
        done = without_torch(f"from lsc_kernels.cli import main; sys.exit(main({['info', *options]}))")
        assert done.returncode == 0, done.stderr
        assert done.stderr == "" and "pip install 'torch>=2.11'" in done.stdout
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] is None and facts["versions"]["lsc_kernels"] == lk.__version__


@pytest.mark.parametrize("command", sorted({*cli.COMMANDS} - {"info"}))
def test_without_torch_other_commands_say_so(command: str) -> None:
    done = without_torch(f"from lsc_kernels.cli import main; sys.exit(main(['{command}', '--help']))")
    assert_user_error(done, f"lsc-kernels {command}: error: lsc_kernels needs torch", "pip install")


def test_without_torch_the_library_says_so() -> None:
    for code in ("from lsc_kernels import token_kl", "import lsc_kernels as lk; lk.nn"):
        done = without_torch(code)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("ImportError: lsc_kernels needs torch")


def call_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of ``lsc-kernels score`` when its work ends in ``error``."""

    def run(args: object) -> int:
        raise error

    score = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "lsc_kernels.score", score)
    return cli.main(["score"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data.jsonl: 3 lines, none of them good"), "data.jsonl: 3 lines, none of them good"),
        (
            FileNotFoundError(2, "No such file or directory", "nowhere.jsonl"),
            "nowhere.jsonl: No such file or directory",
        ),
        (
            ModuleNotFoundError("No module named 'pyarrow.parquet'", name="pyarrow.parquet"),
            "pyarrow is not installed; get it with: pip install 'lsc-kernels[hf]'",
        ),
    ],
)
def test_mistakes_of_the_user(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_with(error, monkeypatch) == 2
    assert capsys.readouterr().err == f"lsc-kernels score: error: {line}\n"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), OSError("no file named"), ModuleNotFoundError("ours", name="lsc_kernels.typo")],
)
def test_our_mistakes_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        call_with(error, monkeypatch)


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call_with(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.strip() == ""
