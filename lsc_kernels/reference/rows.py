"""From rows (prompt, property, score) to one reference per group and property."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lsc_kernels.reference.quantile import between, position

WIDE = "score_"  # score_NAME: one column per property


class Rows(NamedTuple):
    """N scores, each of a prompt and a property."""

    prompts: Sequence[str]  # [N]
    properties: tuple[str, ...]  # K names
    property_index: NDArray[np.int64]  # [N], into the names
    scores: NDArray[np.float64]  # [N]; NaN is missing


class Level(NamedTuple):
    """References of R groups, in ascending order of their keys; NaN where a group has too few samples."""

    keys: NDArray[Any]  # [R]: uint64 of prompts, names of buckets
    references: NDArray[Any]  # [R, K], fp32
    samples: NDArray[Any]  # [R, K], int64


def read_rows(rows: Any, properties: Sequence[str] | None = None) -> Rows:
    """Bring rows of any form into columns.

    Args:
        rows: an iterable of (prompt, property, score), or of mappings with these keys; or columns: a mapping,
            pandas or Arrow table with ``prompt``, ``property``, ``score``, or with ``prompt`` and one column
            ``score_NAME`` per property.
        properties: the names, in the order wanted; None is the order in which they come.

    Raises:
        TypeError: a prompt that is not text, a score that is no number, properties that are one text.
        ValueError: no rows, a column missing, columns of different lengths, a property that is not wanted.
    """
    prompts, names, scores = _columns(rows)
    if not len(prompts):
        raise ValueError("rows: there are none")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(
                f"a prompt must be text (a chat as the text that was scored); got {type(prompt).__name__}"
            )
    if isinstance(properties, str):
        raise TypeError(f"properties must be a sequence of names; got {properties!r}")
    found = dict.fromkeys(names)
    order = tuple(str(name) for name in (found if properties is None else properties))
    number = {name: k for k, name in enumerate(order)}
    if len(number) != len(order):
        raise ValueError(f"properties must differ from one another; got {list(order)}")
    unknown = [name for name in found if str(name) not in number]
    if unknown:
        raise ValueError(f"properties {list(order)} do not have {unknown[0]!r}, which the rows have")
    try:
        values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    except (TypeError, ValueError) as problem:
        raise TypeError(f"a score must be a number, or None or NaN where it is missing: {problem}") from None
    index = np.array([number[str(name)] for name in names], dtype=np.int64)
    return Rows(prompts, order, index, values)


def _columns(rows: Any) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """prompt, property, score: [N] each."""
    columns = list(
        getattr(rows, "column_names", getattr(rows, "columns", rows if isinstance(rows, Mapping) else ()))
    )
    if not columns:
        if isinstance(rows, str) or not isinstance(rows, Iterable):
            raise TypeError(f"rows must be (prompt, property, score), or columns; got {type(rows).__name__}")
        long = [_triple(row, number) for number, row in enumerate(rows)]
        prompt, name, score = zip(*long, strict=True) if long else ((), (), ())
        return prompt, name, score
    wide = [column for column in columns if str(column).startswith(WIDE)]
    wanted = ["prompt", *wide] if wide else ["prompt", "property", "score"]
    for column in wanted:
        if column not in columns:
            raise ValueError(
                f"rows must have columns prompt, property, score, or prompt, score_NAME; got {columns}"
            )
    values = {column: _as_list(rows[column]) for column in wanted}
    lengths = {column: len(kept) for column, kept in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns must be equally long; got {lengths}")
    if not wide:
        return values["prompt"], values["property"], values["score"]
    count = len(values["prompt"])
    names = [column[len(WIDE) :] for column in wide for _ in range(count)]
    return values["prompt"] * len(wide), names, [score for column in wide for score in values[column]]


def _triple(row: Any, number: int) -> tuple[Any, Any, Any]:
    if isinstance(row, Mapping):
        row = tuple(row[name] for name in ("prompt", "property", "score") if name in row)
    if isinstance(row, str) or not isinstance(row, Sequence) or len(row) != 3:
        raise ValueError(f"row {number} must be (prompt, property, score); got {row!r}")
    prompt, name, score = row
    return prompt, name, score


def _as_list(column: Any) -> list[Any]:
    for method in ("to_pylist", "tolist"):
        if hasattr(column, method):
            values: list[Any] = getattr(column, method)()
            return values
    return list(column)


def prompt_keys(prompts: Sequence[str]) -> NDArray[np.uint64]:
    """The keys of prompts: the first 16 hexadecimal digits of the MD5 of the text in UTF-8, as a number.

    MD5, because every engine that may have to compute the same key has it (DuckDB, Spark, PostgreSQL). It is a
    name here and protects nothing. Two of a million prompts share a key with probability 3e-8.

    >>> f"{prompt_keys(['abc'])[0]:x}"
    '900150983cd24fb0'
    """
    digests = [hashlib.md5(prompt.encode(), usedforsecurity=False).digest()[:8] for prompt in prompts]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def length_bucket(prompt: str) -> str:
    """The bucket of a prompt by its length in UTF-8, in powers of two.

    >>> length_bucket("How are you?")
    'length<16'
    """
    return f"length<{1 << len(prompt.encode()).bit_length()}"


def fit_level(keys: NDArray[Any], rows: Rows, q: float, method: str, *, min_samples: int = 1) -> Level:
    """The q-quantile of every group of scores with the same key, per property; a group without a score is none.

    Args:
        keys: [N], one per row.
        rows: N rows.
        q: the quantile.
        method: as in ``quantile_reference``.
        min_samples: a group with fewer has none.
    """
    there = ~np.isnan(rows.scores)
    found, group = np.unique(keys[there], return_inverse=True)
    shape = (len(found), len(rows.properties))
    cell = group.astype(np.int64) * shape[1] + rows.property_index[there]
    scores = rows.scores[there]
    samples = np.bincount(cell, minlength=shape[0] * shape[1])
    references = _quantiles(cell, scores, samples, q, method)
    references[samples < min_samples] = np.nan
    return Level(found, references.reshape(shape).astype(np.float32), samples.reshape(shape))


def _quantiles(
    cell: NDArray[np.int64], scores: NDArray[np.float64], samples: NDArray[np.int64], q: float, method: str
) -> NDArray[np.float64]:
    """The quantile of each cell's scores; NaN of an empty cell."""
    if method == "gaussian":
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.bincount(cell, scores, len(samples)) / samples
            square = np.bincount(cell, (scores - mean[cell]) ** 2, len(samples)) / (samples - 1)
        std = np.sqrt(np.where(samples > 1, square, np.nan))
        return np.asarray(mean + NormalDist().inv_cdf(q) * std)
    ordered = torch.from_numpy(np.append(scores[np.lexsort((scores, cell))], np.nan))
    count = torch.from_numpy(samples)
    start = count.cumsum(0) - count
    at = position(count, q, method)
    low, high = (torch.where(count > 0, start + end.long(), len(scores)) for end in (at.floor(), at.ceil()))
    return between(ordered[low], ordered[high], at.frac()).numpy()


def pivot(
    keys: NDArray[Any],
    property_index: NDArray[np.int64],
    references: NDArray[np.float64],
    samples: NDArray[np.int64],
    properties: int,
) -> Level:
    """A level from one row per (key, property), in any order."""
    found, group = np.unique(keys, return_inverse=True)
    level = Level(
        found,
        np.full((len(found), properties), np.nan, np.float32),
        np.zeros((len(found), properties), np.int64),
    )
    level.references[group, property_index] = references
    level.samples[group, property_index] = samples
    return level


def combine(one: Level, other: Level) -> Level:
    """The groups of both; where both have a reference, the mean weighted by samples."""
    found, group = np.unique(np.concatenate([one.keys, other.keys]), return_inverse=True)
    references = np.concatenate([one.references, other.references]).astype(np.float64)
    samples = np.concatenate([one.samples, other.samples])
    known = np.where(np.isnan(references), 0, samples)
    shape = (len(found), references.shape[1])
    total, weighted, count = np.zeros(shape), np.zeros(shape), np.zeros(shape, np.int64)
    np.add.at(total, group, known)
    np.add.at(weighted, group, np.where(known > 0, known * references, 0.0))
    np.add.at(count, group, samples)
    with np.errstate(invalid="ignore"):
        return Level(found, (weighted / total).astype(np.float32), count)
