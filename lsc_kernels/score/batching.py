"""Rows of similar length together, padded on the right; and how a batch that was too large shows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def out_of_memory(problem: RuntimeError) -> bool:
    """Whether an error says that memory ran out; the CPU's allocator has no exception of its own."""
    text = str(problem)  # in words that differ between systems
    return isinstance(problem, torch.OutOfMemoryError) or any(
        words in text for words in ("can't allocate memory", "not enough memory")
    )


def plan_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    batch_size: int | None = None,
    counted: Sequence[int] | None = None,
    max_counted: int | None = None,
) -> list[list[int]]:
    """Group rows by length, longest first, so that little is spent on padding.

    The longest come first because they show at once whether memory suffices. The plan depends on nothing but
    the arguments, so a run that resumes makes the same batches.

    Args:
        lengths: tokens of each row.
        max_tokens: the most tokens of a batch, padding included; a row longer than that goes alone.
        batch_size: the most rows of a batch.
        counted: a second size of each row (its response tokens), of which a batch holds ``max_counted`` at
            most.

    Returns:
        Row numbers of each batch.

    >>> plan_batches([3, 9, 4, 1], max_tokens=10)
    [[1], [2, 0], [3]]
    """
    batches: list[list[int]] = []
    widest = total = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        extra = counted[row] if counted is not None else 0
        full = not batches or (len(batches[-1]) + 1) * widest > max_tokens
        full = full or len(batches[-1]) == batch_size
        if full or (max_counted is not None and total + extra > max_counted):
            batches.append([])
            widest, total = lengths[row], 0
        batches[-1].append(row)
        total += extra
    return batches


def pad_right(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] and attention mask [B, S] of rows of unequal length.

    Padding stands on the right, where a causal model cannot see it and positions count from 0 as they do for
    a row alone.
    """
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(width) < lengths[:, None]
    return ids.to(device), mask.to(device=device, dtype=torch.int64)
