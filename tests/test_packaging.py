"""What the package promises about itself: its versions, its import, its binary, and how it is built."""

from __future__ import annotations

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import lsc_kernels as lk
from lsc_kernels import native

ROOT = Path(__file__).parents[1]
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="runs in the source tree only")
needs_extension = pytest.mark.skipif(native.UNAVAILABLE is not None, reason=str(native.UNAVAILABLE))


def python(code: str, **env: str) -> str:
    """What ``code`` prints in a new interpreter."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env).stdout


# ---- the installed package ------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    versions = {lk.__version__}
    if native.UNAVAILABLE is None:
        from lsc_kernels import _C

        versions.add(_C.build_info()["version"])
    try:
        versions.add(importlib.metadata.version("lsc-kernels"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("compiled in place, not installed")
    assert len(versions) == 1, versions


def test_extension_is_there_unless_it_was_skipped() -> None:
    from lsc_kernels._build_info import SKIPPED

    if SKIPPED is None:
        assert native.UNAVAILABLE is None
    else:
        assert native.UNAVAILABLE is not None and SKIPPED in native.UNAVAILABLE


def test_import_costs_little_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import lsc_kernels; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.3


def test_import_brings_no_extra() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import lsc_kernels; print(*set(sys.modules) - before)"
    )
    brought = {name.partition(".")[0] for name in python(code).split()}
    allowed = {"lsc_kernels", "numpy", "torch", "_lsc_kernels_editable"} | sys.stdlib_module_names
    assert brought - allowed == set()


@needs_extension
def test_set_isa() -> None:
    from lsc_kernels import _C

    before = _C.isa()
    try:
        for isa in _C.isas():
            _C.set_isa(isa)
            assert _C.isa() == isa
        for wrong in ("sse9", "AVX2", "avx2 "):
            with pytest.raises(ValueError, match=re.escape(f"'{wrong}'")):
                _C.set_isa(wrong)
        assert _C.isa() == _C.isas()[-1]  # a refused name changes nothing
        _C.set_isa("baseline")
        _C.set_isa("auto")
        assert _C.isa() == _C.isas()[-1]
    finally:
        _C.set_isa(before)


# ---- the binary -----------------------------------------------------------------------------------


@needs_extension
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs nm")
def test_extension_uses_torch_through_its_c_functions_only() -> None:
    from lsc_kernels import _C

    command = ["nm", "--dynamic", "--undefined-only", "--format=just-symbols", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    from_torch = [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    assert from_torch
    cxx = [name for name in symbols if re.match(r"_ZNK?S?[tT]?\d*(at|c10|torch|caffe2)\d", name)]
    assert cxx == []


@needs_extension
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("readelf") is None, reason="needs readelf")
def test_extension_records_no_place_of_the_machine_it_was_built_on() -> None:
    from lsc_kernels import _C

    command = ["readelf", "--dynamic", "--wide", _C.__file__]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in dynamic
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@needs_extension
def test_compiler_may_not_reassociate() -> None:
    from lsc_kernels import _C

    flags = _C.build_info()["cxx_flags"].split()
    assert "-ffp-contract=off" in flags
    assert not {"-ffast-math", "-Ofast", "-fassociative-math", "-march=native"} & set(flags)


# ---- the build ------------------------------------------------------------------------------------


def find_torch(**env: str) -> subprocess.CompletedProcess[str]:
    """Run the script as pip does in an isolated build: with this interpreter, its packages off the path."""
    script = str(ROOT / "csrc" / "find_torch.py")
    code = "import sys, sysconfig, runpy; lib = sysconfig.get_paths(); "
    code += "sys.path[:] = [p for p in sys.path if p not in (lib['purelib'], lib['platlib'])]; "
    code += f"runpy.run_path({script!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


@needs_sources
def test_find_torch_without_importing_it(tmp_path: Path) -> None:
    here = Path(torch.__file__).parent
    assert Path(find_torch().stdout.strip()) == here
    for given in (here, here / "include", here.parent):
        assert Path(find_torch(LSC_KERNELS_TORCH_INCLUDE=str(given)).stdout.strip()) == here
    wrong = find_torch(LSC_KERNELS_TORCH_INCLUDE=str(tmp_path))
    assert wrong.returncode == 1
    assert "LSC_KERNELS_TORCH_INCLUDE" in wrong.stderr and str(tmp_path) in wrong.stderr


@needs_sources
def test_find_torch_beside_the_build_frontend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m build` does it: an interpreter that has no torch, called from a file of one that has."""
    site_packages = tmp_path / "site-packages"
    header = site_packages / "torch" / "include" / "torch" / "csrc" / "stable" / "library.h"
    header.parent.mkdir(parents=True)
    header.touch()
    frontend = site_packages / "pyproject_hooks" / "_in_process" / "_in_process.py"
    monkeypatch.setenv("LSC_KERNELS_BUILD_FRONTEND", str(frontend))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    script = runpy.run_path(str(ROOT / "csrc" / "find_torch.py"))
    assert script["find_torch"]() == site_packages / "torch"

    monkeypatch.delenv("LSC_KERNELS_BUILD_FRONTEND")
    with pytest.raises(SystemExit, match="no torch"):
        script["find_torch"]()


def configure(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run CMake as far as it decides what to build."""
    tools = Path(sysconfig.get_path("scripts"))
    command = [shutil.which("cmake", path=f"{tools}{os.pathsep}{os.environ['PATH']}") or "cmake"]
    command += [
        "-S",
        str(ROOT / "csrc"),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    command += [f"-DCMAKE_INSTALL_PREFIX={folder / 'installed'}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LSC_KERNELS_")}
    environment["PATH"] = f"{tools}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env=environment | env)


def skipped(folder: Path) -> str | None:
    """What the configured package will say about why it has no extension."""
    reason: str | None = runpy.run_path(str(folder / "_build_info.py"))["SKIPPED"]
    return reason


@needs_sources
@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"LSC_KERNELS_BUILD": "none"}, "LSC_KERNELS_BUILD=none"),
        ({"CXX": "/nowhere/c++"}, "no working C++ compiler"),
        ({"LSC_KERNELS_TORCH_INCLUDE": "/nowhere"}, "LSC_KERNELS_TORCH_INCLUDE=/nowhere"),
    ],
)
def test_installs_without_the_extension_and_says_why(
    tmp_path: Path, env: dict[str, str], reason: str
) -> None:
    done = configure(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert reason in (skipped(tmp_path) or "")
    assert reason in re.sub(r"\s+", " ", done.stderr)


@needs_sources
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LSC_KERNELS_BUILD": "cpu", "CXX": "/nowhere/c++"}, "no working C++ compiler"),
        ({"LSC_KERNELS_BUILD": "cpu", "LSC_KERNELS_TORCH_INCLUDE": "/nowhere"}, "LSC_KERNELS_TORCH_INCLUDE"),
        ({"LSC_KERNELS_BUILD": "cuda", "CUDACXX": "/nowhere/nvcc"}, "no working nvcc"),
        ({"LSC_KERNELS_BUILD": "gpu"}, "LSC_KERNELS_BUILD=gpu: unknown"),
    ],
)
def test_what_is_forced_and_cannot_be_is_an_error(tmp_path: Path, env: dict[str, str], message: str) -> None:
    done = configure(tmp_path, **env)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stderr)


@needs_sources
@needs_extension
def test_builds_the_extension_where_it_can(tmp_path: Path) -> None:
    done = configure(tmp_path, LSC_KERNELS_BUILD="cpu")
    assert done.returncode == 0, done.stderr
    assert skipped(tmp_path) is None


@needs_sources
def test_torch_that_is_too_old(tmp_path: Path) -> None:
    include = tmp_path / "torch" / "include" / "torch"
    for header in ("csrc/stable/library.h", "headeronly/version.h"):
        (include / header).parent.mkdir(parents=True)
        (include / header).write_text('#define TORCH_VERSION \\\n  "2.10.1"\n')
    done = configure(tmp_path / "build", LSC_KERNELS_TORCH_INCLUDE=str(include.parent))
    assert done.returncode == 0, done.stderr
    assert "torch 2.10.1" in (skipped(tmp_path / "build") or "")
