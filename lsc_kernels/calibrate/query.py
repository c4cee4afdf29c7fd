"""The references of every prompt as one query, answered by DuckDB, which keeps on disk what memory does not hold.

DuckDB's own ``quantile_cont`` keeps all values of its groups in memory and ends where they do not fit. Ranks do not:
``row_number()`` sorts, and sorting goes to disk. With the scores of a group numbered 0 ... n - 1 in their order, the
quantile at position a is the sum over rows of score * max(0, 1 - |number - a|): at most two rows count.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ..errors import UserError
from ..options import check_threads
from ..reference.quantile import METHODS
from ..reference.rows import Level, pivot
from ..reference.table import CANNED, ReferenceTable, stamp
from ..tables import PROMPT_KEY, Engine, Source, engine, open_scores, sql_name
from ..wording import counted

POSITION = {
    "linear": "(n - 1) * {q}",
    "median_unbiased": "greatest(0, least(n - 1, (n + 1.0 / 3) * {q} - 2.0 / 3))",
}
LENGTH_BUCKET = (  # rows.length_bucket
    "'length<' || (1::BIGINT << CASE strlen(prompt) WHEN 0 THEN 0 ELSE length(bin(strlen(prompt))) END)::VARCHAR"
)


@dataclass(frozen=True)
class Calibration:
    """A table, and what went into it: ``rows`` read, and of each property ``missing`` scores."""

    table: ReferenceTable
    prompts: Level
    whole: Level
    rows: int
    missing: dict[str, int]


def calibrate(
    scores: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    q: float = 0.85,
    *,
    method: str = "linear",
    canned: bool = False,
    properties: Sequence[str] | None = None,
    bucket: str = "length",
    min_samples: int = 1,
    model: str = "",
    memory: str | None = None,
    threads: int | None = None,
    temp: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Calibration:
    """The table that ``ReferenceTable.fit`` would make of the rows of files, without holding them in memory.

    Args:
        scores: files or patterns of one kind (.parquet, .jsonl, .csv; the last two also .gz), with columns
            ``prompt``, ``property``, ``score``, or ``prompt`` and one ``score_NAME`` per property. NaN and null
            are missing scores.
        q: the quantile.
        method: as in :func:`lsc_kernels.reference.quantile_reference`.
        canned: the scores are of canned responses, one per prompt and property.
        properties: take these, in this order. None: all, in the order in which they come.
        bucket: ``length``, ``none``, or ``column:NAME`` of the files.
        min_samples: a prompt with fewer scores of a property gets no reference of its own.
        model: what gave the responses, for the provenance.
        memory: most memory for DuckDB, as ``4GB``.
        threads: CPU threads.
        temp: folder for what does not fit into memory. None: the system's.
        progress: called with what is being done and how much of it is, in [0, 1].

    Raises:
        UserError: an option or a file that cannot be used, in one line.
        MissingExtra: DuckDB is not installed.
    """
    _check(q, method, min_samples, threads)
    q, method = (0.5, CANNED) if canned else (q, method)
    paths = [os.fspath(path) for path in ([scores] if isinstance(scores, (str, os.PathLike)) else scores)]
    with engine(memory=memory, threads=threads, temp=temp, progress=progress, reading=paths) as running:
        return _calibrate(running, paths, q, method, properties, bucket, min_samples, model)


def _calibrate(
    engine: Engine,
    paths: Sequence[str],
    q: float,
    method: str,
    properties: Sequence[str] | None,
    bucket: str,
    min_samples: int,
    model: str,
) -> Calibration:
    source, columns = open_scores(engine, paths, properties)
    bucketing, expression = _bucket(bucket, columns, source.relation)
    rows = _check_prompts(engine, source.relation, paths[0])
    engine.run(
        "reading",
        f"CREATE TEMP TABLE samples AS SELECT {PROMPT_KEY} AS key, bucket, property::SMALLINT AS property, score "
        f"FROM ({source.scores(expression)}) WHERE NOT isnan(score) AND property >= 0",
    )
    count = len(source.properties)

    def level(doing: str, key: str) -> Level:
        found = engine.run(doing, quantile_query(key, q, method))
        filled = [np.ma.filled(found[name], math.nan) for name in ("key", "property", "reference", "samples")]
        keys, index, references, samples = filled
        return pivot(keys, index.astype(np.int64), references, samples.astype(np.int64), count)

    whole = level("whole", "0")
    for name in source.properties:
        if not whole.samples.size or not whole.samples[0, source.properties.index(name)]:
            raise UserError(f"{paths[0]}: property {name!r} has no score")
    prompts = level("prompts", "key")
    if method == CANNED and (prompts.samples > 1).any():
        most = int(prompts.samples.max())
        raise UserError(
            f"{paths[0]}: --canned wants one score per prompt and property; some prompt has {most}"
        )
    prompts.references[prompts.samples < min_samples] = np.nan
    buckets = level("buckets", "bucket") if bucketing != "none" else Level(*(part[:0] for part in whole))
    table = ReferenceTable(
        source.properties,
        stamp(model, q, method, whole),
        prompts=prompts,
        buckets=Level(buckets.keys.astype(str), buckets.references, buckets.samples),
        whole=whole,
        bucketing=bucketing,
    )
    missing = dict(zip(source.properties, _missing(engine, source, whole), strict=True))
    return Calibration(table, prompts, whole, rows, missing)


def quantile_query(key: str, q: float, method: str) -> str:
    """SQL for the quantile per (key, property) of the table ``samples``: key, property, samples, reference."""
    if method == "gaussian":
        return (
            f"SELECT {key} AS key, property, count(*) AS samples, "
            f"avg(score) + {NormalDist().inv_cdf(q)!r} * stddev_samp(score) AS reference "
            "FROM samples GROUP BY ALL"
        )
    position = POSITION["linear" if method == CANNED else method].format(q=repr(q))
    return f"""
        WITH ranked AS (
            SELECT {key} AS key, property, score,
                row_number() OVER (PARTITION BY {key}, property ORDER BY score) - 1 AS number,
                count(*) OVER (PARTITION BY {key}, property) AS n
            FROM samples
        ), placed AS (SELECT *, {position} AS position FROM ranked)
        SELECT key, property, n AS samples, sum(score * (1 - abs(number - position))) AS reference
        FROM placed WHERE abs(number - position) < 1 GROUP BY ALL
    """


def _check(q: float, method: str, min_samples: int, threads: int | None) -> None:
    if method not in METHODS:
        raise UserError(f"--method {method}: wants one of {', '.join(METHODS)}")
    inside = 0 < q < 1 if method == "gaussian" else 0 <= q <= 1
    if not inside:
        raise UserError(f"--quantile {q}: wants a number between 0 and 1")
    if min_samples < 1:
        raise UserError(f"--min-samples {min_samples}: wants at least 1")
    check_threads(threads)


def _bucket(bucket: str, columns: dict[str, str], relation: str) -> tuple[str, str]:
    """The kind of buckets, and SQL for the bucket of a row."""
    if bucket == "length":
        return "length", LENGTH_BUCKET
    if bucket == "none":
        return "none", "NULL::VARCHAR"
    kind, _, name = bucket.partition(":")
    if kind != "column" or not name:
        raise UserError(f"--bucket {bucket}: wants length, none or column:NAME")
    if name not in columns:
        raise UserError(f"--bucket {bucket}: there is no such column; there are {', '.join(columns)}")
    return "named", f"coalesce({sql_name(name)}::VARCHAR, '')"


def _check_prompts(engine: Engine, relation: str, path: str) -> int:
    """How many rows there are, every one with a prompt."""
    ((rows, prompts),) = engine.rows(f"SELECT count(*), count(prompt) FROM {relation}")
    if rows != prompts:
        raise UserError(f"{path}: {rows - prompts} of {counted(rows, 'row')} have no prompt")
    return int(rows)


def _missing(engine: Engine, source: Source, whole: Level) -> list[int]:
    """How many scores of each property are missing."""
    if source.wide:
        ((rows,),) = engine.rows(f"SELECT count(*) FROM {source.relation}")
        return [int(rows - n) for n in whole.samples[0]]
    listed = dict(engine.rows(f"SELECT property::VARCHAR, count(*) FROM {source.relation} GROUP BY 1"))
    return [int(listed[name] - n) for name, n in zip(source.properties, whole.samples[0], strict=True)]
