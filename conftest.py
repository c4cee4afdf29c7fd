"""Runs the Python examples in README.md and docs/ as tests, and Triton's kernels without a GPU."""

import importlib.util
import os
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from pathlib import Path

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    teardown=dict.clear,  # what a page leaves behind ends with it, not with the interpreter
).pytest()

# there are no wheels of datasketches for the newest Python
collect_ignore = [] if importlib.util.find_spec("datasketches") else ["lsc_kernels/reference/streaming.py"]

if importlib.util.find_spec("triton") is None:
    collect_ignore += [str(path) for path in Path("lsc_kernels/triton").glob("*.py")]
elif not torch.cuda.is_available():
    # The kernels are interpreted. triton must read this when it is imported, and torch.compile imports it.
    os.environ["TRITON_INTERPRET"] = "1"
