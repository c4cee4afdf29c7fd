"""Runs the Python examples in README.md and docs/ as tests, and Triton's kernels without a GPU; shares tests out."""

import importlib.util
import os
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path

import pytest

# Several processes with threads of their own share the cores: one that waits for its others must not spin meanwhile.
# OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402

# benchmarks/gpu.sh runs the ops' tests where little is installed
if importlib.util.find_spec("sybil"):
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE), SkipParser()],
        patterns=["README.md", "docs/*.md"],
        teardown=dict.clear,  # what a page leaves behind ends with it, not with the interpreter
    ).pytest()

# there are no wheels of datasketches for the newest Python
collect_ignore = [] if importlib.util.find_spec("datasketches") else ["lsc_kernels/reference/streaming.py"]

if importlib.util.find_spec("trl") is None:
    collect_ignore.append("lsc_kernels/trainers/trl/trainers.py")
# what verl loads: importing it is what it is for
collect_ignore += ["lsc_kernels/trainers/_verl_plugin.py", "lsc_kernels/trainers/verl_patch.py"]

if importlib.util.find_spec("triton") is None:
    collect_ignore += [str(path) for path in Path("lsc_kernels/triton").glob("*.py")]
elif not torch.cuda.is_available():
    # The kernels are interpreted. triton must read this when it is imported, and torch.compile imports it.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For `-n auto --dist loadgroup`: an op's cases and slow tests go to whoever is free, other files stay whole.

    The examples of a page build on each other, and fixtures of a module are made once. Whole files are begun first,
    then slow tests, so that no long one is left for the end.
    """
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if "backend" not in getattr(item, "fixturenames", ()) and not item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.xdist_group(item.path.as_posix()))
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)
