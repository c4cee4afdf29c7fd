"""A reference table from a data set that is spread over a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lsc_kernels.extras import load
from lsc_kernels.reference.quantile import check_quantile
from lsc_kernels.reference.rows import (
    WIDE,
    Level,
    Rows,
    fit_level,
    length_bucket,
    pivot,
    prompt_keys,
    read_rows,
)
from lsc_kernels.reference.streaming import StreamingQuantile
from lsc_kernels.reference.table import ReferenceTable, stamp

if TYPE_CHECKING:
    from ray.data import Dataset


def fit_ray(
    dataset: Dataset,
    q: float = 0.85,
    *,
    method: str = "linear",
    properties: Sequence[str] | None = None,
    min_samples: int = 1,
    model: str = "",
    parts: int = 64,
    k: int = 3200,
) -> ReferenceTable:
    """The table that ``ReferenceTable.fit`` would make of the rows of a Ray Data set, computed where the rows are.

    The references of prompts are exact. Those of buckets (by the length of the prompt) and of the whole come from
    merged KLL sketches (:class:`StreamingQuantile`), with their rank error: 0.09% at k = 3200.

    Args:
        dataset: columns ``prompt``, ``property``, ``score``, or ``prompt`` and one ``score_NAME`` per property; NaN
            and null are missing scores.
        q: the quantile.
        method: ``linear`` or ``median_unbiased``.
        properties: the names, in the order wanted. None: by name, or in the order of the columns.
        min_samples: a prompt with fewer scores of a property gets no reference of its own.
        model: what gave the responses, for the provenance.
        parts: prompts are spread over so many parts by their keys; one part's scores are in a worker's memory at
            once.
        k: the size of the sketches.

    Raises:
        ModuleNotFoundError: ray (pip install 'lsc-kernels[ray]'), pyarrow or datasketches is not installed.
        ValueError: columns missing, a property without a score, ``q`` or ``method`` out of range.

    Example::

        table = fit_ray(ray.data.read_parquet("s3://bucket/scores/"), 0.85, model="my-sft")
        table.save("refs.parquet")
    """
    load("ray.data", "ray")
    q = check_quantile(q, method)
    if method == "gaussian":
        raise ValueError("method: wants linear or median_unbiased here; the sketches keep ranks, not moments")
    names = _properties(dataset, properties)
    keyed = partial(_keyed, names=names, parts=parts)
    scores = dataset.map_batches(keyed, batch_format="pyarrow", batch_size=None).materialize()
    sketch = partial(_sketch, count=len(names), k=k)
    sketched = scores.map_batches(sketch, batch_format="pyarrow", batch_size=None)
    buckets, whole = _merge_sketches(sketched.take_all(), q, len(names), k)
    without = [name for name, n in zip(names, whole.samples[0], strict=True) if not n]
    if without:
        raise ValueError(f"property {without[0]!r} has no score")
    fit_part = partial(_fit_part, names=names, q=q, method=method, min_samples=min_samples)
    found = scores.groupby("part", num_partitions=parts).map_groups(fit_part, batch_format="pyarrow")
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "property", "reference", "samples")}
    for batch in found.iter_batches(batch_format="numpy"):
        for name, column in columns.items():
            column.append(batch[name])
    key, index, reference, samples = (np.concatenate(column) for column in columns.values())
    return ReferenceTable(
        names,
        stamp(model, q, method, whole),
        prompts=pivot(key.astype(np.uint64), index, reference, samples, len(names)),
        buckets=buckets,
        whole=whole,
        bucketing="length",
    )


def _properties(dataset: Dataset, properties: Sequence[str] | None) -> tuple[str, ...]:
    columns = dataset.columns() or []
    wide = [column[len(WIDE) :] for column in columns if column.startswith(WIDE)]
    if not wide and not {"prompt", "property", "score"} <= set(columns):
        raise ValueError(
            f"dataset must have columns prompt, property, score, or prompt, score_NAME; got {columns}"
        )
    if properties is not None:
        return tuple(properties)
    return tuple(wide or sorted(map(str, dataset.unique("property"))))


def _keyed(rows: Any, names: tuple[str, ...], parts: int) -> Any:
    """One row per score: the prompt's key, part and bucket, the property's number, the score."""
    pa = load("pyarrow", "ray")
    read = read_rows(rows, names) if rows.num_rows else Rows([], names, np.zeros(0, np.int64), np.zeros(0))
    there = ~np.isnan(read.scores)
    keys = prompt_keys(read.prompts)
    buckets = np.array([length_bucket(prompt) for prompt in read.prompts], dtype=object)
    return pa.table(
        {
            "part": (keys % np.uint64(parts)).astype(np.int64)[there],
            "key": keys[there],
            "bucket": pa.array(buckets[there], pa.string()),
            "property": read.property_index[there],
            "score": read.scores[there],
        }
    )


def _fit_part(rows: Any, names: tuple[str, ...], q: float, method: str, min_samples: int) -> Any:
    """The references of all prompts of a part."""
    pa = load("pyarrow", "ray")
    read = Rows([], names, rows["property"].to_numpy(), rows["score"].to_numpy())
    level = fit_level(rows["key"].to_numpy(), read, q, method, min_samples=min_samples)
    row, index = np.nonzero(level.samples)
    return pa.table(
        {
            "key": level.keys[row],
            "property": index,
            "reference": level.references[row, index],
            "samples": level.samples[row, index],
        }
    )


def _sketch(rows: Any, count: int, k: int) -> Any:
    """One sketch per bucket and property of a block."""
    pa = load("pyarrow", "ray")
    bucket = np.array(rows["bucket"].to_pylist(), dtype=object)
    index, scores = rows["property"].to_numpy(), rows["score"].to_numpy()
    found: dict[str, list[Any]] = {"bucket": [], "property": [], "sketch": []}
    for name in sorted(set(bucket)):
        for number in range(count):
            stream = StreamingQuantile(k=k)
            stream.update(torch.from_numpy(scores[(bucket == name) & (index == number)]))
            found["bucket"].append(name)
            found["property"].append(number)
            found["sketch"].append(stream.state_dict()["sketches"][0].numpy().tobytes())
    kinds = (pa.string(), pa.int64(), pa.binary())
    return pa.table({name: pa.array(found[name], kind) for name, kind in zip(found, kinds, strict=True)})


def _merge_sketches(parts: list[dict[str, Any]], q: float, count: int, k: int) -> tuple[Level, Level]:
    """Buckets and whole, from the sketches of all blocks."""
    merged: dict[str, list[StreamingQuantile]] = {"": [StreamingQuantile(k=k) for _ in range(count)]}
    for part in sorted(parts, key=lambda part: (part["bucket"], part["property"])):
        stream = StreamingQuantile(k=k)
        sketch = torch.frombuffer(bytearray(part["sketch"]), dtype=torch.uint8)
        stream.load_state_dict({**stream.state_dict(), "sketches": [sketch]})
        mine = merged.setdefault(part["bucket"], [StreamingQuantile(k=k) for _ in range(count)])
        for into in (mine, merged[""]):
            into[part["property"]].merge(stream)

    def level(names: list[str]) -> Level:
        references = [[stream.quantile(q).item() for stream in merged[name]] for name in names]
        samples = [[int(stream.count) for stream in merged[name]] for name in names]
        shape = (len(names), count)
        return Level(
            np.array(names, dtype=str),
            np.array(references, np.float32).reshape(shape),
            np.array(samples, np.int64).reshape(shape),
        )

    whole = level([""])
    return level(sorted(name for name in merged if name)), Level(np.zeros(1, np.int64), *whole[1:])
