"""Reference rewards per prompt, kept as a file."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsc_kernels.extras import load
from lsc_kernels.files import write_whole
from lsc_kernels.reference.quantile import check_quantile
from lsc_kernels.reference.rows import Level, combine, fit_level, length_bucket, prompt_keys, read_rows
from lsc_kernels.wording import first_line

METADATA_KEY = b"lsc_kernels.reference"
FORMAT_VERSION = 1
SOURCES = ("prompt", "bucket", "whole")
BUCKETINGS = ("length", "named", "none")
CANNED = "canned"  # the method of a table of canned responses' scores


class FallbackWarning(UserWarning):
    """A prompt is not in a table, and got the reference of its bucket or of the whole."""


@dataclass(frozen=True)
class Provenance:
    """Where a table comes from.

    ``model`` names what gave the responses. ``quantile`` and ``method`` say what was taken of their scores; of
    canned responses the method is ``canned`` and the quantile None. ``samples`` is the number of scores that went
    in, ``date`` when (ISO 8601, UTC).
    """

    model: str
    quantile: float | None
    method: str
    samples: int
    date: str


def stamp(model: str, q: float, method: str, whole: Level) -> Provenance:
    """The provenance of a table that is made now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Provenance(model, None if method == CANNED else q, method, int(whole.samples.sum()), now)


class ReferenceTable:
    """Reference rewards of prompts, by text, for K properties.

    Made by :meth:`fit` or :meth:`load`, by ``lsc-kernels calibrate`` from files larger than memory, and by
    :func:`lsc_kernels.reference.fit_ray` on a cluster.

    A prompt that the table does not know, or knows no reference of some property for, gets that of its bucket, and
    where there is none that of the whole. Each time this happens it is counted in ``lookups``; the first time it
    is told by a :class:`FallbackWarning`.

    Attributes:
        properties: the K names, in the order of the columns of a lookup.
        provenance: model, quantile, method, number of samples and date.
        lookups: how many prompts were looked up so far, by where their references came from: ``prompt``,
            ``bucket``, ``whole`` (the farthest of a prompt's K counts).

    Example:
        >>> from lsc_kernels.reference import ReferenceTable
        >>> rows = [("Why?", "helpful", score) for score in (0.0, 1.0, 2.0)] + [("How?", "helpful", 5.0)]
        >>> table = ReferenceTable.fit(rows, q=0.5, model="my-sft")
        >>> table.lookup(["How?", "Why?"])
        tensor([[5.],
                [1.]])
    """

    def __init__(
        self,
        properties: Sequence[str],
        provenance: Provenance,
        *,
        prompts: Level,
        buckets: Level,
        whole: Level,
        bucketing: str,
    ) -> None:
        self.properties = tuple(properties)
        self.provenance = provenance
        self.lookups = dict.fromkeys(SOURCES, 0)
        self._prompts, self._buckets, self._whole, self._bucketing = prompts, buckets, whole, bucketing
        self._told = False

    @classmethod
    def fit(
        cls,
        rows: Any,
        q: float = 0.85,
        *,
        method: str = "linear",
        canned: bool = False,
        buckets: str | Sequence[str] | None = "length",
        min_samples: int = 1,
        properties: Sequence[str] | None = None,
        model: str = "",
    ) -> ReferenceTable:
        """Take the quantile of each prompt's scores, of each bucket's and of all.

        Args:
            rows: an iterable of (prompt, property, score), or of mappings with these keys; or columns: a mapping,
                pandas or Arrow table with ``prompt``, ``property``, ``score``, or with ``prompt`` and one column
                ``score_NAME`` per property (what ``lsc-kernels score`` writes). NaN and None are missing scores.
            q: the quantile.
            method: as in :func:`lsc_kernels.reference.quantile_reference`.
            canned: the rows hold one score per prompt and property, of a canned response ("I can't help with
                that."): it is the reference itself. Buckets and the whole get the median; ``q`` and ``method``
                are not used.
            buckets: what a prompt that is not known falls back to: ``length``, prompts of about its length (in
                powers of two of its UTF-8 bytes); a sequence of names, one per row (a source, a language: give
                :meth:`lookup` the names too); None, the whole at once.
            min_samples: a prompt with fewer scores of a property gets no reference of its own. With 1, a prompt
                with a single response has that response's score as its reference.
            properties: the K names, in the order wanted. None: the order in which they come.
            model: what gave the responses, for the provenance.

        Raises:
            TypeError: rows of another form, a prompt that is not text, a score that is no number.
            ValueError: no rows, a column missing, a property without a score, a canned response with two scores,
                ``q``, ``method``, ``buckets`` or ``min_samples`` out of range.
        """
        q = check_quantile(q, method)
        if not isinstance(model, str):
            raise TypeError(f"model must be a text, the name of what gave the responses; got {model!r}")
        if isinstance(min_samples, bool) or not isinstance(min_samples, int) or min_samples < 1:
            raise ValueError(f"min_samples must be an int of at least 1; got {min_samples!r}")
        q, method = (0.5, CANNED) if canned else (q, method)
        columns = read_rows(rows, properties)
        scored = set(columns.property_index[~np.isnan(columns.scores)].tolist())
        without = [name for k, name in enumerate(columns.properties) if k not in scored]
        if without:
            raise ValueError(f"property {without[0]!r} has no score")
        keys = _distinct_keys(columns.prompts)
        prompts = fit_level(keys, columns, q, method, min_samples=min_samples)
        if canned and (prompts.samples > 1).any():
            row, k = np.argwhere(prompts.samples > 1)[0]
            prompt = columns.prompts[int(np.flatnonzero(keys == prompts.keys[row])[0])]
            raise ValueError(
                f"canned: prompt {_short(prompt)} has {prompts.samples[row, k]} scores of "
                f"{columns.properties[k]!r}; wants one"
            )
        bucketing, names = _bucket_names(buckets, columns.prompts)
        whole = fit_level(np.zeros(len(keys), np.int64), columns, q, method)
        by_bucket = fit_level(names, columns, q, method)
        return cls(
            columns.properties,
            stamp(model, q, method, whole),
            prompts=prompts,
            buckets=by_bucket if bucketing != "none" else Level(*(part[:0] for part in by_bucket)),
            whole=whole,
            bucketing=bucketing,
        )

    def __len__(self) -> int:
        """How many prompts it knows."""
        return len(self._prompts.keys)

    def __repr__(self) -> str:
        return f"ReferenceTable({len(self)} prompts, properties={self.properties}, {self.provenance})"

    def lookup(self, prompts: Sequence[str], *, buckets: Sequence[str] | None = None) -> Tensor:
        """The references of prompts, for ``lk.aggregate_rewards``.

        Args:
            prompts: P texts, as they were when the table was made.
            buckets: P names, of a table that was made with named buckets; else None.

        Returns:
            [P, K], fp32, on the CPU. What came from a bucket or the whole is counted in ``lookups``, and told
            once by a :class:`FallbackWarning`; :meth:`sources` tells it per prompt and property.

        Raises:
            TypeError: ``prompts`` is one text, or holds something else.
            ValueError: ``buckets`` of the wrong length, or for a table without named buckets.
        """
        prompts = _texts(prompts)
        references, source = self._find(prompts, buckets)
        farthest = np.bincount(source.max(1, initial=0), minlength=len(SOURCES)).tolist()
        for name, count in zip(SOURCES, farthest, strict=True):
            self.lookups[name] += count
        if any(farthest[1:]) and not self._told:
            self._told = True
            first = prompts[int(np.flatnonzero(source.max(1))[0])]
            warnings.warn(
                f"{sum(farthest[1:])} of {len(prompts)} prompts have no reference of their own in the table (first: "
                f"{_short(first)}): {farthest[1]} get their bucket's, {farthest[2]} that of the whole. The "
                "attribute lookups goes on counting; this is told once",
                FallbackWarning,
                stacklevel=2,
            )
        return torch.from_numpy(references)

    def sources(self, prompts: Sequence[str], *, buckets: Sequence[str] | None = None) -> Tensor:
        """Where the references of a lookup come from: 0 the prompt, 1 its bucket, 2 the whole; int8 [P, K]."""
        return torch.from_numpy(self._find(_texts(prompts), buckets)[1])

    def _find(self, prompts: Sequence[str], buckets: Sequence[str] | None) -> tuple[Any, Any]:
        """References [P, K] and their sources [P, K]."""
        if buckets is not None and self._bucketing != "named":
            raise ValueError(f"buckets: this table was made with buckets {self._bucketing!r}; pass None")
        if buckets is not None and len(buckets) != len(prompts):
            raise ValueError(f"buckets must have one name per prompt, {len(prompts)}; got {len(buckets)}")
        references = _select(self._prompts, prompt_keys(prompts))
        source = np.isnan(references).astype(np.int8)
        lost = np.flatnonzero(source.any(1)).tolist()
        if lost:
            if self._bucketing == "length":
                buckets = [length_bucket(prompts[row]) for row in lost]
            elif buckets is not None:
                buckets = [buckets[row] for row in lost]
            wider = np.full((len(lost), len(self.properties)), np.nan, np.float32)
            if buckets is not None:
                wider = _select(self._buckets, np.array(buckets))
            still = np.isnan(wider)
            missing = source[lost].astype(bool)
            references[lost] = np.where(
                missing, np.where(still, self._whole.references, wider), references[lost]
            )
            source[lost] += (missing & still).astype(np.int8)
        return references, source

    def merge(self, other: ReferenceTable) -> ReferenceTable:
        """Take in the prompts of another table; returns itself.

        Exact for prompts that one of the two knows. The quantile of two sets of samples together lies between
        their two quantiles and is not determined by them: for prompts both know, for buckets and the whole it
        becomes the mean weighted by samples. To have it exact, fit on all the rows.

        Raises:
            TypeError: ``other`` is no ReferenceTable.
            ValueError: its properties, model, quantile, method or kind of buckets differ.
        """
        if not isinstance(other, ReferenceTable):
            raise TypeError(f"other must be a ReferenceTable; got {type(other).__name__}")
        for name, mine, theirs in (
            ("properties", sorted(self.properties), sorted(other.properties)),
            ("model", self.provenance.model, other.provenance.model),
            ("quantile", self.provenance.quantile, other.provenance.quantile),
            ("method", self.provenance.method, other.provenance.method),
            ("buckets", self._bucketing, other._bucketing),
        ):
            if mine != theirs:
                raise ValueError(f"other must have the same {name}, {mine!r}; got {theirs!r}")
        order = [other.properties.index(name) for name in self.properties]

        def together(mine: Level, theirs: Level) -> Level:
            return combine(mine, Level(theirs.keys, theirs.references[:, order], theirs.samples[:, order]))

        self._prompts = together(self._prompts, other._prompts)
        self._buckets = together(self._buckets, other._buckets)
        self._whole = together(self._whole, other._whole)
        self.provenance = replace(
            self.provenance,
            samples=self.provenance.samples + other.provenance.samples,
            date=max(self.provenance.date, other.provenance.date),
        )
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as Parquet: entirely, or not at all and what was there stays.

        One row per prompt, bucket and for the whole: ``level``, ``prompt_key`` (see
        :func:`lsc_kernels.reference.prompt_keys`; the texts are not kept), ``bucket``, and per property
        ``reference_NAME`` and ``samples_NAME``. The provenance stands in the file's metadata, as JSON under
        ``lsc_kernels.reference``.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
            OSError: it cannot be written.
        """
        pa, pq = load("pyarrow", "reference"), load("pyarrow.parquet", "reference")
        levels = (self._prompts, self._buckets, self._whole)
        sizes = [len(level.keys) for level in levels]
        columns = {
            "level": pa.array(np.repeat(SOURCES, sizes)).dictionary_encode(),
            "prompt_key": pa.concat_arrays(
                [pa.array(self._prompts.keys, pa.uint64()), pa.nulls(sum(sizes[1:]), pa.uint64())]
            ),
            "bucket": pa.concat_arrays(
                [pa.nulls(sizes[0], pa.string()), pa.array(self._buckets.keys.tolist(), pa.string())]
                + [pa.nulls(1, pa.string())]
            ),
        }
        for k, name in enumerate(self.properties):
            columns[f"reference_{name}"] = np.concatenate([level.references[:, k] for level in levels])
            columns[f"samples_{name}"] = np.concatenate([level.samples[:, k] for level in levels])
        about = {
            "version": FORMAT_VERSION,
            "properties": self.properties,
            "buckets": self._bucketing,
            "rows": sizes,
            "provenance": asdict(self.provenance),
        }
        table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(about)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        write_whole(Path(path), sink.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReferenceTable:
        """Read a table that :meth:`save` or ``lsc-kernels calibrate`` wrote.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
            OSError: there is no such file, or it cannot be read.
            ValueError: it is damaged, another kind of file, or of a version that this one does not know.
        """
        pa, pq = load("pyarrow", "reference"), load("pyarrow.parquet", "reference")
        damaged = f"{path}: is damaged, or no Parquet file"
        with open(path, "rb") as file:
            try:
                metadata = pq.read_schema(file).metadata or {}
                about = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
            except (pa.ArrowException, OSError, ValueError) as problem:
                raise ValueError(f"{damaged}: {first_line(problem)}") from problem
            if about is None:
                raise ValueError(
                    f"{path}: is a Parquet file, but no reference table: fit or calibrate makes one"
                )
            if about.get("version") != FORMAT_VERSION:
                raise ValueError(
                    f"{path}: is a reference table of version {about.get('version')}; this release reads version "
                    f"{FORMAT_VERSION}"
                )
            try:
                table = pq.read_table(file, page_checksum_verification=True)
                return cls._from_arrow(table, about)
            except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"{damaged}: {first_line(problem)}") from problem

    @classmethod
    def _from_arrow(cls, table: Any, about: dict[str, Any]) -> ReferenceTable:
        names, sizes = about["properties"], about["rows"]
        references, samples = (
            np.stack([table[f"{head}_{name}"].to_numpy() for name in names], axis=1).astype(dtype)
            for head, dtype in (("reference", np.float32), ("samples", np.int64))
        )
        if len(sizes) != len(SOURCES) or sum(sizes) != len(references) or sizes[-1] != 1:
            raise ValueError(f"{len(references)} rows instead of {sizes}")
        cuts = np.cumsum(sizes)
        prompt_key = table["prompt_key"].slice(0, sizes[0]).to_numpy().astype(np.uint64)
        if (prompt_key[1:] <= prompt_key[:-1]).any() or about["buckets"] not in BUCKETINGS:
            raise ValueError("the prompts are not in order")
        keys = [
            prompt_key,
            np.array(table["bucket"].slice(sizes[0], sizes[1]).to_pylist(), dtype=str),
            np.zeros(1, np.int64),
        ]
        levels = [
            Level(key, references[end - size : end], samples[end - size : end])
            for key, size, end in zip(keys, sizes, cuts, strict=True)
        ]
        prompts, buckets, whole = levels
        provenance = Provenance(**about["provenance"])
        return cls(
            names, provenance, prompts=prompts, buckets=buckets, whole=whole, bucketing=about["buckets"]
        )


def _distinct_keys(prompts: Sequence[str]) -> Any:
    """The key of every row's prompt, each distinct prompt hashed once."""
    distinct = list(dict.fromkeys(prompts))
    keys = prompt_keys(distinct)
    if len(np.unique(keys)) != len(keys):
        raise ValueError("two of the prompts have the same 64-bit key; change one of them by a character")
    number = {prompt: row for row, prompt in enumerate(distinct)}
    return keys[[number[prompt] for prompt in prompts]]


def _bucket_names(buckets: str | Sequence[str] | None, prompts: Sequence[str]) -> tuple[str, Any]:
    """The kind of buckets, and the name of each row's."""
    if buckets is None:
        return "none", np.zeros(len(prompts), np.int64)
    if isinstance(buckets, str):
        if buckets != "length":
            raise ValueError(f"buckets must be 'length', one name per row, or None; got {buckets!r}")
        return "length", np.array([length_bucket(prompt) for prompt in prompts])
    if len(buckets) != len(prompts):
        raise ValueError(f"buckets must have one name per row, {len(prompts)}; got {len(buckets)}")
    return "named", np.array([str(name) for name in buckets])


def _texts(prompts: object) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(f"prompts must be a sequence of texts; got {type(prompts).__name__}")
    texts = list(prompts)
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"prompts must be a sequence of texts; one is {type(text).__name__}")
    return [str(text) for text in texts]  # NumPy has texts of its own


def _select(level: Level, keys: Any) -> Any:
    """The references of keys [B, K]; NaN where a level does not have them."""
    if not len(level.keys):
        return np.full((len(keys), level.references.shape[1]), np.nan, np.float32)
    row = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
    return np.where((level.keys[row] == keys)[:, None], level.references[row], np.float32(np.nan))


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
