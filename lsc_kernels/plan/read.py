"""A table of scores in memory: one row per response, one column per property, and the references they are held to."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..reference import FallbackWarning, ReferenceTable, quantile_reference
from ..reference.rows import WIDE, Rows, fit_level
from ..score.config import ReferenceRule, per_property
from ..tables import PROMPT_KEY, Engine, Source, engine, open_scores, sql_name, sql_text
from ..wording import counted

DEFAULT_REFERENCE = "quantile:0.85"
METADATA_KEY = "lsc_kernels.score"  # what `lsc-kernels score` says of a file, as JSON
SHAPE = ("scale", "floor", "weights")
CENTRES = "reference_"  # reference_NAME: what `lsc-kernels score` held the scores to


@dataclass(frozen=True)
class Samples:
    """Responses of the base policy.

    ``scores`` [N, K] in fp64, NaN where one is missing; ``prompt`` [N] numbers the prompts of ``texts``; ``centres``
    [N, K] are the references in the file, if it has them, and ``shape`` the scale, floor and weights that
    `lsc-kernels score` was given, [K] each.
    """

    names: tuple[str, ...]
    scores: Tensor
    prompt: Tensor
    texts: tuple[str, ...]
    centres: Tensor | None
    shape: dict[str, tuple[float, ...]]


def read_scores(paths: Sequence[str], names: Sequence[str] | None) -> Samples:
    """Read files of one kind.

    Raises:
        UserError: a file that cannot be used, in one line.
        MissingExtra: DuckDB is not installed.
    """
    with engine(reading=paths) as running:
        source, columns = open_scores(running, paths, names)
        centred = source.wide and all(CENTRES + name in columns for name in source.properties)
        query = _wide(source, centred) if source.wide else _long(source, "response" in columns)
        found = running.run("reading", query)
        shape = _shape(running, paths, source) if centred else {}
        texts = dict(running.rows(f"SELECT DISTINCT {PROMPT_KEY}, prompt FROM {source.relation}"))
    keys, prompt = np.unique(np.ma.filled(found["key"], 0), return_inverse=True)
    scores = _matrix(found, "score", len(source.properties))
    for k, name in enumerate(source.properties):
        if scores[:, k].isnan().all():
            raise UserError(f"{paths[0]}: property {name!r} has no score")
    if scores.isinf().any():
        infinite = int(scores.isinf().sum())
        raise UserError(
            f"{paths[0]}: {counted(infinite, 'score')} {'is' if infinite == 1 else 'are'} infinite"
        )
    return Samples(
        names=source.properties,
        scores=scores,
        prompt=torch.from_numpy(prompt.astype(np.int64)),
        texts=tuple(texts[int(key)] for key in keys),
        centres=_matrix(found, "reference", len(source.properties)) if centred else None,
        shape=shape,
    )


def _shape(running: Engine, paths: Sequence[str], source: Source) -> dict[str, tuple[float, ...]]:
    """What `lsc-kernels score` was given, from the metadata of its file, for the properties that are taken."""
    found = [
        json.loads(text)
        for path in paths
        if path.endswith(".parquet")
        for (text,) in running.rows(
            f"SELECT decode(value) FROM parquet_kv_metadata({sql_text(path)}) "
            f"WHERE decode(key) = {sql_text(METADATA_KEY)}"
        )
    ]
    shapes = []
    for about in found:
        spread = {
            option: per_property(about["identity"][f"--{option}"], about["names"], option) for option in SHAPE
        }
        order = [about["names"].index(name) for name in source.properties]
        shapes.append({option: tuple(float(values[k]) for k in order) for option, values in spread.items()})
    if any(shape != shapes[0] for shape in shapes):
        raise UserError(f"{paths[0]}: the files were scored with different --scale, --floor or --weights")
    return shapes[0] if shapes else {}


def _wide(source: Source, centred: bool) -> str:
    heads = {"score": WIDE} | ({"reference": CENTRES} if centred else {})
    columns = [
        f"{sql_name(prefix + name)}::DOUBLE AS {head}_{k}"
        for head, prefix in heads.items()
        for k, name in enumerate(source.properties)
    ]
    return f"SELECT {PROMPT_KEY} AS key, {', '.join(columns)} FROM {source.relation}"


def _long(source: Source, with_response: bool) -> str:
    """One row per response: named by the column, or the i-th of each property to a prompt are the i-th response."""
    response = (
        "response::VARCHAR"
        if with_response
        else "row_number() OVER (PARTITION BY prompt, property ORDER BY line)"
    )
    columns = [
        f"max(score::DOUBLE) FILTER (property::VARCHAR = {sql_text(name)}) AS score_{k}"
        for k, name in enumerate(source.properties)
    ]
    return f"""
        WITH lines AS (SELECT *, row_number() OVER () AS line FROM {source.relation}),
        answers AS (SELECT prompt, property, score, line, {response} AS answer FROM lines)
        SELECT {PROMPT_KEY} AS key, {", ".join(columns)}
        FROM answers GROUP BY prompt, answer ORDER BY min(line)
    """


def _matrix(found: Any, head: str, width: int) -> Tensor:
    columns = [np.ma.filled(found[f"{head}_{k}"].astype(np.float64), np.nan) for k in range(width)]
    return torch.from_numpy(np.stack(columns, axis=1))


def references(samples: Samples, given: Sequence[str] | None) -> tuple[Tensor, str]:
    """The reference of every score [N, K], and where they come from in words.

    Raises:
        UserError: an option that cannot be used, in one line.
    """
    if given is None and samples.centres is not None:
        return samples.centres, "those in the file"
    given = given or [DEFAULT_REFERENCE]
    if len(given) == 1 and given[0].endswith(".parquet"):
        return _looked_up(samples, given[0])
    rules = per_property([_rule(text) for text in given], samples.names, "reference")
    columns = []
    for k, rule in enumerate(rules):
        score = samples.scores[:, k]
        if rule.kind == "number":
            columns.append(torch.full_like(score, rule.value))
        elif rule.kind == "quantile":
            columns.append(quantile_reference(score, rule.value, dim=0).expand(len(score)))
        else:
            columns.append(_of_prompts(samples, k, rule.value))
    return torch.stack(columns, 1), ", ".join(map(str, rules if len(given) > 1 else rules[:1]))


def _rule(text: str) -> ReferenceRule:
    rule = ReferenceRule.parse(text)
    if rule.kind not in ("number", "quantile", "prompt-quantile"):
        raise UserError(
            f"--reference {text!r}: wants a number, quantile:Q, prompt-quantile:Q, or a .parquet table of "
            "`lsc-kernels calibrate`"
        )
    return rule


def _of_prompts(samples: Samples, k: int, q: float) -> Tensor:
    """The quantile among the responses to the same prompt; of all, for a response alone with its prompt."""
    score = samples.scores[:, k].numpy()
    rows = Rows([], (samples.names[k],), np.zeros(len(score), np.int64), score)
    level = fit_level(samples.prompt.numpy(), rows, q, "linear", min_samples=2)
    found = np.full(len(samples.texts), np.nan)
    found[level.keys] = level.references[:, 0]
    found[np.isnan(found)] = np.nanquantile(score, q)
    return torch.from_numpy(found)[samples.prompt]


def _looked_up(samples: Samples, path: str) -> tuple[Tensor, str]:
    try:
        table = ReferenceTable.load(path)
    except ValueError as problem:
        raise UserError(f"--reference {problem}") from problem
    missing = [name for name in samples.names if name not in table.properties]
    if missing:
        raise UserError(
            f"--reference {path}: has no property {missing[0]!r}; it has {', '.join(table.properties)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # told in the report
        found = table.lookup(samples.texts)
    order = [table.properties.index(name) for name in samples.names]
    counts = ", ".join(f"{count} by {where}" for where, count in table.lookups.items() if count)
    return found[:, order].double()[samples.prompt], f"{path} ({counts})"
