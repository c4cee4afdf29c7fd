"""Packages beyond torch and numpy, imported where they are used; an error names what brings a missing one."""

from __future__ import annotations

import importlib
from typing import Any

# The extra of this package that brings a module.
EXTRA_OF = {
    "transformers": "hf",
    "tokenizers": "hf",
    "datasets": "hf",
    "pyarrow": "hf",
    "rich": "hf",
    "matplotlib": "plot",
    "datasketches": "reference",
    "duckdb": "reference",
    "trl": "trl",
}


class MissingExtra(ModuleNotFoundError):
    """A package that a part of this library needs is not installed; the message says what to install."""


def load(module: str, extra: str) -> Any:
    """Import a module of a package that an extra brings.

    Raises:
        MissingExtra: it is not installed; the message has the command that installs it.

    Example:
        >>> load("json", "hf").dumps([1])
        '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as problem:
        package = (problem.name or module).partition(".")[0]
        raise MissingExtra(
            f"{package} is not installed; get it with: pip install {package} or pip install 'lsc-kernels[{extra}]'",
            name=package,
        ) from problem
