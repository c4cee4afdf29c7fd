"""From finished rows to the output: reference rewards, utilities, rewards per token, in input order.

All of this is cheap next to the models and needs the scores of the whole file, so it happens once, at the
end, window by window: no more than one window of per-token values is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

import lsc_kernels as lk

from ..errors import UserError
from .config import ReferenceRule, ScoreConfig, per_property
from .data import BadLine
from .store import METADATA_KEY, PartStore

FLOATS = pa.list_(pa.float32())


def part_schema() -> pa.Schema:
    """What a finished row holds before the scores of the others are known."""
    return pa.schema(
        [
            ("row", pa.int64()),
            ("line", pa.int64()),
            ("id", pa.string()),
            ("side", pa.string()),
            ("prompt", pa.string()),
            ("response", pa.string()),
            ("error", pa.string()),
            ("scores", FLOATS),
            ("references", FLOATS),
            ("prompt_tokens", pa.int32()),
            ("prompt_tokens_cut", pa.int32()),
            ("response_tokens_cut", pa.int32()),
            ("reward_tokens_cut", pa.int32()),
            ("token_ids", pa.list_(pa.int32())),
            ("logprobs", FLOATS),
            ("ref_logprobs", FLOATS),
            ("kl", FLOATS),
        ]
    )


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards: per property a name, a reference rule and three numbers."""

    names: Sequence[str]
    rules: Sequence[ReferenceRule]
    scale: Tensor
    floor: Tensor
    weights: Tensor
    beta: float
    placement: str

    @classmethod
    def from_config(cls, config: ScoreConfig, names: Sequence[str]) -> Shaping:
        """The options of a run, spread over its properties.

        Raises:
            UserError: an option has neither one value nor one per property.
        """
        spread = {
            option: torch.tensor(per_property(config.numbers(option), names, option))
            for option in ("scale", "floor", "weights")
        }
        rules = per_property(config.references(), names, "reference")
        return cls(names, rules, **spread, beta=config.beta, placement=config.placement)


def assemble(
    store: PartStore, windows: int, shaping: Shaping, about: dict[str, Any], bad: Sequence[BadLine]
) -> None:
    """Write the output from the parts.

    Args:
        store: holds every row of every window.
        windows: how many windows there are.
        shaping: how scores become rewards.
        about: kept in the file's metadata.
        bad: the lines that could not be read; those that could not be encoded are added.

    Raises:
        UserError: not one row could be encoded, or the output cannot be written.
    """
    by_prompt = any(rule.kind == "prompt-quantile" for rule in shaping.rules)
    scalars = _scalars(store, windows, by_prompt)
    refused = scalars.filter(pc.is_valid(scalars["error"]))
    late = [
        BadLine(*found)
        for found in zip(*(refused[name].to_pylist() for name in ("line", "error")), strict=True)
    ]
    scalars = scalars.filter(pc.is_null(scalars["error"]))
    if not scalars.num_rows:
        raise UserError(f"not one of the rows can be scored; line {late[0].line}: {late[0].reason}")
    scores, given = (_matrix(scalars[name], len(shaping.names)) for name in ("scores", "references"))
    prompts = scalars["prompt"].to_pylist() if by_prompt else None
    references, alone = reference_rewards(scores, given, prompts, shaping.rules)
    all_bad = sorted({(found.line, found.reason) for found in (*bad, *late)})
    about = {**about, "bad": all_bad, "rows_alone_with_their_prompt": alone}
    unfinished = store.out.with_name(store.out.name + ".tmp")
    schema = _output_schema(shaping.names).with_metadata({METADATA_KEY: json.dumps(about).encode()})
    try:
        _write(store, unfinished, schema, windows, references, shaping)
        store.finish(unfinished)
    except OSError as problem:
        raise UserError(
            f"--out {store.out}: cannot be written: {problem}; the finished rows are kept for --resume"
        ) from problem


def _write(
    store: PartStore, path: Path, schema: pa.Schema, windows: int, references: np.ndarray, shaping: Shaping
) -> None:
    begin = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for window in range(windows):
            rows = store.window(window)
            rows = rows.filter(pc.is_null(rows["error"]))
            end = begin + rows.num_rows
            writer.write_table(_shape(rows, references[begin:end], shaping).cast(schema))
            begin = end


def _scalars(store: PartStore, windows: int, by_prompt: bool) -> pa.Table:
    columns = ["row", "line", "error", "scores", "references", *(["prompt"] if by_prompt else [])]
    return pa.concat_tables([store.window(window, columns) for window in range(windows)])


def _matrix(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """A column of lists of equal length as [rows, width]."""
    return pc.list_flatten(column).to_numpy(zero_copy_only=False).reshape(len(column), width)


def reference_rewards(
    scores: np.ndarray, given: np.ndarray, prompts: Sequence[str] | None, rules: Sequence[ReferenceRule]
) -> tuple[np.ndarray, int]:
    """The reference reward of every row and property.

    Args:
        scores: [rows, K]; NaN is left out of quantiles.
        given: [rows, K]: what columns and canned responses gave, NaN elsewhere.
        prompts: one per row, equal text being the same prompt; None where no rule asks for quantiles by
            prompt.
        rules: one per property.

    Returns:
        References [rows, K] in float32, and how many rows were alone with their prompt and got the quantile
        of the whole file instead of the prompt's: a response cannot be its own reference.
    """
    by_prompt: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts or ()):
        by_prompt.setdefault(prompt, []).append(row)
    references = np.array(given, dtype=np.float64)
    for k, rule in enumerate(rules):
        if rule.kind == "number":
            references[:, k] = rule.value
        elif rule.kind in ("quantile", "prompt-quantile"):
            references[:, k] = _quantile(scores[:, k], rule.value)
        if rule.kind == "prompt-quantile":
            for rows in by_prompt.values():
                if len(rows) > 1:
                    references[rows, k] = _quantile(scores[rows, k], rule.value)
    alone = sum(len(rows) == 1 for rows in by_prompt.values())
    return references.astype(np.float32), alone


def _quantile(scores: np.ndarray, q: float) -> float:
    known = scores[~np.isnan(scores)].astype(np.float64)
    return float(np.quantile(known, q)) if known.size else float("nan")


def _shape(rows: pa.Table, references: np.ndarray, shaping: Shaping) -> pa.Table:
    """The output rows of one window."""
    # The derivative of the utility is the marginal utility: asking autograd for it keeps floor and weights
    # in.
    scores = torch.from_numpy(_matrix(rows["scores"], len(shaping.names)).copy()).requires_grad_()
    reference = torch.from_numpy(references.copy())
    shape: dict[str, Any] = {"scale": shaping.scale, "floor": shaping.floor}
    utilities = lk.lsc_transform(scores, reference, **shape)
    (slope,) = torch.autograd.grad(utilities.sum(), scores)
    marginal = (slope * shaping.scale).numpy()
    utility = lk.aggregate_rewards(scores.detach(), reference, weights=shaping.weights, **shape)
    columns: dict[str, Any] = {name: rows[name] for name in ("line", "id", "side", "prompt", "response")}
    for k, name in enumerate(shaping.names):
        columns[f"score_{name}"] = scores.detach()[:, k].numpy()
        columns[f"reference_{name}"] = references[:, k]
        columns[f"utility_{name}"] = utilities.detach()[:, k].numpy()
        columns[f"marginal_utility_{name}"] = marginal[:, k]
    columns["utility"] = utility.numpy()
    columns["binding"] = _binding(marginal * shaping.weights.numpy(), shaping.names)
    for name in ("prompt_tokens", "prompt_tokens_cut", "response_tokens_cut", "reward_tokens_cut"):
        columns[name] = rows[name]
    for name in ("token_ids", "logprobs", "ref_logprobs", "kl"):
        columns[name] = rows[name]
    columns["rewards"] = _token_rewards(utility, rows["kl"].combine_chunks(), shaping)
    return pa.table(columns)


def _binding(pull: np.ndarray, names: Sequence[str]) -> pa.Array:
    """The property whose score would raise the utility most, per row; null where one is NaN."""
    known = ~np.isnan(pull).any(axis=1)
    largest = np.where(np.isnan(pull), -np.inf, pull).argmax(axis=1)
    return pa.array([names[k] if ok else None for k, ok in zip(largest, known, strict=True)], pa.string())


def _token_rewards(utility: Tensor, kl: pa.ListArray, shaping: Shaping) -> pa.Array:
    """Rewards per response token; with ``eos_plus_one`` one more, behind the last token."""
    lengths = torch.from_numpy(pc.list_value_length(kl).to_numpy(zero_copy_only=False).astype(np.int64))
    behind = int(shaping.placement == "eos_plus_one")
    positions = torch.arange(int(lengths.max() if len(lengths) else 0) + behind)
    mask = positions < lengths[:, None]
    padded = torch.zeros(mask.shape)
    padded[mask] = torch.from_numpy(pc.list_flatten(kl).to_numpy(zero_copy_only=False).copy())
    rewards = lk.token_rewards(utility, padded, mask, beta=shaping.beta, placement=shaping.placement)
    kept = positions < (lengths + behind)[:, None]
    offsets = np.concatenate([[0], np.cumsum((lengths + behind).numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rewards[kept].numpy()))


def _output_schema(names: Sequence[str]) -> pa.Schema:
    kinds = {field.name: field.type for field in part_schema()}
    fields = [(name, kinds[name]) for name in ("line", "id", "side", "prompt", "response")]
    for name in names:
        fields += [
            (f"{what}_{name}", pa.float32()) for what in ("score", "reference", "utility", "marginal_utility")
        ]
    fields += [("utility", pa.float32()), ("binding", pa.string())]
    tokens = ("prompt_tokens", "prompt_tokens_cut", "response_tokens_cut", "reward_tokens_cut")
    fields += [(name, kinds[name]) for name in (*tokens, "token_ids", "logprobs", "ref_logprobs", "kl")]
    return pa.schema([*fields, ("rewards", FLOATS)])
