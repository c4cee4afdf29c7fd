"""Finished rows on disk, so that an interrupted run goes on where it stopped.

Beside the output stands a folder of parts until the run is complete. A part is a Parquet file of finished
rows of one window; it is written under another name, flushed to the disk and renamed, so after a kill or a
power cut it is there entirely or not at all. Which rows are done is read from the parts themselves, never
from a counter that could disagree with them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..files import flush, write_whole
from .config import parts_folder

METADATA_KEY = b"lsc_kernels.score"
STATE = "run.json"


class PartStore:
    """The parts of one run.

    Args:
        out: the output file; the parts stand in a folder named after it.
        identity: what the run computes, as plain nested values; a resumed run must have the same.
        resume: go on with the parts that are there.
        overwrite: throw away parts and output that are there.

    Raises:
        UserError: there is something already and neither is asked for, or what is there belongs to another
            run, or another process is writing it.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.out = out
        self.folder = parts_folder(out)
        self._lock = filelock.FileLock(str(out) + ".lock", timeout=0)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except filelock.Timeout as problem:
            raise UserError(f"--out {out}: another run is writing it") from problem
        except OSError as problem:
            raise UserError(f"--out {out}: cannot be written: {problem.strerror}") from problem
        try:
            self.complete = self._prepare(identity, resume, overwrite)
            self.done, self._count = self._inventory()
        except BaseException:
            self.close()
            raise

    def _prepare(self, identity: dict[str, Any], resume: bool, overwrite: bool) -> bool:
        """Make the folder of parts ready; whether the output is already complete."""
        if overwrite:
            # The old output goes now: beside new parts it would pass for their result.
            self.out.unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        state = self.folder / STATE
        if resume and self.out.exists():
            _check_identity(read_metadata(self.out)["identity"], identity, str(self.out))
            shutil.rmtree(self.folder, ignore_errors=True)
            return True
        if resume and state.exists():
            _check_identity(json.loads(state.read_text("utf-8")), identity, str(self.folder))
            return False
        self.folder.mkdir(exist_ok=True)
        write_whole(state, json.dumps(identity, indent=1).encode())
        return False

    def _inventory(self) -> tuple[set[int], int]:
        done: set[int] = set()
        count = 0
        for path in sorted(self.folder.glob("part-*.parquet")):
            try:
                done.update(pq.read_table(path, columns=["row"])["row"].to_pylist())
            except (pa.ArrowException, OSError) as problem:
                raise UserError(
                    f"--resume: {path} is damaged: delete it, and its rows are scored again"
                ) from problem
            count = max(count, int(path.stem.split("-")[-1]) + 1)
        return done, count

    def add(self, window: int, rows: pa.Table) -> None:
        """Keep finished rows of a window."""
        self._write(self.folder / f"part-{window:06d}-{self._count:06d}.parquet", rows)
        self._count += 1
        self.done.update(rows["row"].to_pylist())

    def window(self, window: int, columns: list[str] | None = None) -> pa.Table:
        """All finished rows of a window in input order."""
        paths = sorted(self.folder.glob(f"part-{window:06d}-*.parquet"))
        return pa.concat_tables([pq.read_table(path, columns=columns) for path in paths]).sort_by("row")

    def keep(self, name: str, table: pa.Table) -> None:
        """Keep something else that took work, by name."""
        self._write(self.folder / f"{name}.parquet", table)

    def kept(self, name: str) -> pa.Table | None:
        """What was kept under a name, if anything."""
        path = self.folder / f"{name}.parquet"
        return pq.read_table(path) if path.exists() else None

    def _write(self, path: Path, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        try:
            write_whole(path, sink.getvalue())
        except OSError as problem:
            raise UserError(f"--out {self.out}: cannot be written: {problem.strerror}") from problem

    def finish(self, unfinished: Path) -> None:
        """Move the assembled output into place and drop the parts."""
        flush(unfinished)
        os.replace(unfinished, self.out)
        flush(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let other processes write here again."""
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse at once, before anything is read or loaded, to write over what is there.

    Raises:
        UserError: the output or an unfinished run is there and nothing says what to do with it.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; wants the name of a file")
    if resume or overwrite:
        return
    if out.exists():
        raise UserError(f"--out {out}: is there already; --overwrite replaces it")
    if parts_folder(out).exists():
        raise UserError(
            f"--out {out}: an unfinished run is there; --resume goes on with it, --overwrite starts anew"
        )


def read_metadata(out: Path) -> dict[str, Any]:
    """What a finished output says about itself.

    Raises:
        UserError: the file was not written by this command.
    """
    try:
        metadata = pq.read_schema(out).metadata or {}
        return json.loads(metadata[METADATA_KEY])
    except (pa.ArrowException, KeyError, ValueError, OSError) as problem:
        raise UserError(
            f"--out {out}: is no finished output of this command; --overwrite replaces it"
        ) from problem


def _check_identity(before: dict[str, Any], now: dict[str, Any], where: str) -> None:
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if not differing:
        return
    told = []
    for key in differing:
        is_option = key.startswith("--")
        told.append(f"{key} was {before.get(key)} and is {now.get(key)}" if is_option else key)
    raise UserError(
        f"--resume: {where} was begun with something else: {'; '.join(told)}; "
        "give what was given then, or --overwrite"
    )
