"""Files that are there with all their content or not at all, and never in place of what a command reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

# What commands write, and what no model or saved data set consists of.
WRITTEN = (".parquet", ".png", ".pdf", ".svg")

Named = tuple[str, Path]  # the option, or what else to call it, and the file or folder


def write_whole(path: Path, content: Any) -> None:
    """Write a file under another name, have the disk hold it, and rename it: a kill leaves the old file or the new one.

    Args:
        path: the file; its folder must exist.
        content: bytes, or anything with a buffer.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    flush(path.parent)


def check_outputs(outputs: Sequence[Named], inputs: Iterable[Named], emptied: Sequence[Named] = ()) -> None:
    """Refuse to write over what is read, or one output over another, also where a link leads there.

    Args:
        outputs: files that are written.
        inputs: what is read; what is not there is of no interest.
        emptied: folders that are written and emptied, so that nothing in them may be read.

    Raises:
        UserError: an output is an input, another output, or a folder.
    """
    for at, (option, out) in enumerate(outputs):
        if out.is_dir():
            raise UserError(f"{option} {out}: is a folder; wants the name of a file")
        for other, path in outputs[:at]:
            if out.resolve() == path.resolve():
                raise UserError(f"{option} {out}: is what {other} writes too: give it another name")
    for other, path in inputs:
        for option, out in (*outputs, *emptied):
            if path.exists() and out.exists() and _holds(out, path):
                raise UserError(f"{option} {out}: is what {other} reads ({path}): give it another name")


def _holds(out: Path, path: Path) -> bool:
    """Whether writing ``out`` would destroy some of ``path``."""
    if out.samefile(path):
        return True
    if out.is_dir():
        return out.resolve() in path.resolve().parents
    # Earlier outputs may stand in a folder that is read; its own files may not be written over.
    return path.is_dir() and path.resolve() in out.resolve().parents and out.suffix not in WRITTEN


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
