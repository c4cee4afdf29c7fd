"""Tables of scores as files of any size, read by DuckDB: the forms they come in, and queries that can be watched.

A table has columns ``prompt``, ``property``, ``score``, one row per score (long), or ``prompt`` and one ``score_NAME``
per property (wide: what ``lsc-kernels score`` writes).
"""

from __future__ import annotations

import glob
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .extras import load
from .reference.rows import WIDE
from .wording import first_line

READERS = {".parquet": "read_parquet", ".jsonl": "read_json", ".ndjson": "read_json", ".csv": "read_csv"}
OPTIONS = {
    # minimum and maximum in a Parquet file say nothing of NaN; DuckDB takes them for a promise that there is none
    "read_parquet": ", can_have_nan = true",
    "read_json": "",
    "read_csv": ", allow_quoted_nulls = false",  # "" is an empty prompt
}
PROMPT_KEY = "('0x' || substr(md5(prompt), 1, 16))::UBIGINT"  # reference.rows.prompt_keys
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Source:
    """What is read: an SQL relation, its columns, and where the scores of each property stand."""

    relation: str
    properties: tuple[str, ...]
    wide: bool

    def scores(self, bucket: str) -> str:
        """One row per score: prompt, bucket, property number, score."""
        if self.wide:
            names = ", ".join(f"{sql_name(WIDE + name)}::DOUBLE" for name in self.properties)
            pair = f"unnest(range({len(self.properties)})) AS property, unnest([{names}]) AS score"
        else:
            names = ", ".join(sql_text(name) for name in self.properties)
            pair = f"list_position([{names}], property::VARCHAR) - 1 AS property, score::DOUBLE AS score"
        return f"SELECT prompt, {bucket} AS bucket, {pair} FROM {self.relation}"


class Engine:
    """Runs a query while it tells how far it is; an interrupt ends the query too."""

    def __init__(self, connection: Any, progress: Callable[[str, float], None]) -> None:
        self._connection = connection
        self._progress = progress

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """A small result."""
        found: list[tuple[Any, ...]] = self._connection.execute(query).fetchall()
        return found

    def run(self, doing: str, query: str) -> Any:
        """The columns of a result as NumPy arrays by name."""
        outcome: list[Any] = []

        def work() -> None:
            try:
                outcome.append(self._connection.execute(query).fetchnumpy())
            except Exception as problem:
                outcome.append(problem)

        self._progress(doing, 0.0)
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while worker.is_alive():
                worker.join(POLL_SECONDS)
                self._progress(doing, min(1.0, max(0.0, self._connection.query_progress() / 100)))
        except BaseException:
            self._connection.interrupt()
            worker.join()
            raise
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        self._progress(doing, 1.0)
        return outcome[0]


@contextmanager
def engine(
    *,
    memory: str | None = None,
    threads: int | None = None,
    temp: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
    reading: Sequence[str] = (),
) -> Iterator[Engine]:
    """A DuckDB of its own, whose errors are the user's to read.

    Args:
        memory: the most it may use, as ``4GB``.
        threads: CPU threads.
        temp: folder for what does not fit into memory. None: the system's.
        progress: called with what is being done and how much of it is, in [0, 1].
        reading: the files or patterns that are read, for errors.

    Raises:
        UserError: a query or an option that cannot be used, in one line.
        MissingExtra: DuckDB is not installed.
    """
    duckdb = load("duckdb", "reference")
    try:
        folder = tempfile.TemporaryDirectory(prefix=".lsc-kernels-", dir=temp)
    except OSError as problem:
        raise UserError(f"--temp {temp}: {problem.strerror}") from problem
    try:
        with folder as name, duckdb.connect() as connection:
            _settings(connection, name, memory, threads)
            yield Engine(connection, progress or (lambda doing, share: None))
    except duckdb.Error as problem:
        raise UserError(_explained(problem, reading)) from problem


def _explained(problem: Exception, reading: Sequence[str]) -> str:
    """DuckDB's error with the file in front, and without the name of its class."""
    text = re.sub(r"^[A-Z]\w+( \w+)* Error: ", "", first_line(problem))
    named = [path for path in re.findall(r"""["']([^"']+)["']|: (\S+)$""", text)]
    files = [path for path in map("".join, named) if Path(path).is_file()]
    where = files[0] if files else ", ".join(reading)
    return f"{where}: {text}" if where else text


def _settings(connection: Any, folder: str, memory: str | None, threads: int | None) -> None:
    settings: dict[str, Any] = {
        "temp_directory": folder,
        # it takes a whole column of a row group at once, which may be more than the memory there is
        "disable_parquet_prefetching": True,
        "enable_progress_bar": True,
        "enable_progress_bar_print": False,
        "progress_bar_time": 0,
    }
    settings |= {"threads": threads} if threads else {}
    for name, value in settings.items():
        connection.execute(f"SET {name} = {sql_text(value) if isinstance(value, str) else value}")
    if memory is not None:
        try:
            connection.execute(f"SET memory_limit = {sql_text(memory)}")
        except Exception as problem:
            raise UserError(f"--memory {memory}: wants a size such as 4GB") from problem


def open_scores(
    engine: Engine, paths: Sequence[str], properties: Sequence[str] | None
) -> tuple[Source, dict[str, str]]:
    """What the files hold, and the types of their columns by name."""
    reader, *others = {READERS.get(_kind(path), "") for path in paths}
    if "" not in paths and (others or not reader):
        raise UserError(f"{paths[0]}: wants files of one kind, ending in {', '.join(READERS)}")
    for path in paths:
        if not any(mark in path for mark in "*?[") and not Path(path).is_file():
            raise UserError(f"{path or repr(path)}: there is no such file")
    relation = f"{reader}([{', '.join(map(sql_text, paths))}]{OPTIONS[reader]})"
    columns = {name: kind for name, kind, *_ in engine.rows(f"DESCRIBE SELECT * FROM {relation}")}
    found = tuple(name[len(WIDE) :] for name in columns if name.startswith(WIDE))
    needed = ("prompt",) if found else ("prompt", "property", "score")
    if any(name not in columns for name in needed):
        raise UserError(
            f"{paths[0]}: wants columns prompt, property, score, or prompt and score_NAME; has {', '.join(columns)}"
        )
    if columns["prompt"] != "VARCHAR":
        raise UserError(f"{paths[0]}: the column prompt wants text; it is {columns['prompt']}")
    if not found:
        listed = engine.rows(
            "SELECT property::VARCHAR FROM (SELECT property, row_number() OVER () AS number "
            f"FROM {relation}) WHERE property IS NOT NULL GROUP BY 1 ORDER BY min(number)"
        )
        names = tuple(name for (name,) in listed)
    else:
        names = found
    for name in properties or ():
        if name not in names:
            raise UserError(f"--names: {paths[0]} has no property {name!r}; it has {', '.join(names)}")
    if len(set(properties or ())) < len(properties or ()):
        raise UserError(f"--names: wants each property once; got {', '.join(properties or ())}")
    if not names:
        raise UserError(f"{paths[0]}: has no rows")
    return Source(relation, tuple(properties or names), bool(found)), columns


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns stand for, of those that are there."""
    return [Path(found) for path in paths for found in (path, *glob.glob(path, recursive=True)) if found]


def _kind(path: str) -> str:
    return Path(path.lower().removesuffix(".gz")).suffix


def sql_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
