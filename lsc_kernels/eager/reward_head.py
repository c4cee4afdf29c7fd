"""The linear head of a reward model: the definition.

score[b, k] = hidden[b, position[b]] . weight[k] + bias[k]
"""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -1
"""The position of a sequence that has none."""


def last_counted(mask: Tensor) -> Tensor:
    """[B] position of the last nonzero of ``mask`` [B, S]; NOWHERE where there is none."""
    if mask.shape[-1] == 0:
        return torch.full(mask.shape[:-1], NOWHERE, device=mask.device)
    places = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask != 0, places, NOWHERE).amax(-1)


def check_inside(index: Tensor, length: int) -> None:
    """On a GPU a bad index gives a NaN score instead: no host wait."""
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = (index < 0) | (index >= length)
    if outside.any():
        raise IndexError(f"index must be in [0, S) with S = {length}; got {index[outside][0].item()}")


def check_segments(cu_seqlens: Tensor, tokens: int, meaning: str) -> None:
    """On a GPU a sequence whose bounds do not fit counts as empty: no host wait."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to N = {tokens}, {meaning}; got {cu_seqlens.tolist()}")


def _positions(
    hidden: Tensor, attention_mask: Tensor | None, index: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """[B] row of ``hidden.flatten(0, -2)`` that each sequence is scored at; NOWHERE where there is none."""
    if cu_seqlens is not None:
        check_segments(cu_seqlens, hidden.shape[0], "the rows of hidden")
        start, end = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        inside = (start >= 0) & (start < end) & (end <= hidden.shape[0])
        return torch.where(inside, end - 1, NOWHERE)
    batch, length = hidden.shape[:2]
    if index is not None:
        check_inside(index, length)
        place = index.long()
    elif attention_mask is not None:
        place = last_counted(attention_mask)
    else:
        place = torch.full((batch,), length - 1, device=hidden.device)
    first = torch.arange(batch, device=hidden.device) * length
    return torch.where((place >= 0) & (place < length), first + place, NOWHERE)


def _rows(hidden: Tensor, positions: Tensor) -> Tensor:
    """[B, H] the rows that are read, in fp64; 0 for a sequence without one."""
    rows = hidden.new_zeros((positions.shape[0], hidden.shape[-1]), dtype=torch.float64)
    if hidden.numel() == 0:
        return rows
    places = positions.clamp_min(0)
    if hidden.dim() == 3:
        read = hidden[places // hidden.shape[1], places % hidden.shape[1]]
    else:
        read = hidden[places]
    return torch.where((positions == NOWHERE).unsqueeze(-1), rows, read.double())


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    scores = rows.double() @ weight.double().T
    return scores if bias is None else scores + bias.double()


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
) -> Tensor:
    """``every`` scores all positions, 0 where masked."""
    if every:
        scores = _linear(hidden, weight, bias)
        if attention_mask is not None:
            scores = torch.where((attention_mask != 0).unsqueeze(-1), scores, 0.0)
    else:
        positions = _positions(hidden, attention_mask, index, cu_seqlens)
        scores = _linear(_rows(hidden, positions), weight, bias)
        scores = torch.where((positions == NOWHERE).unsqueeze(-1), torch.nan, scores)
    fp64 = any(tensor is not None and tensor.dtype is torch.float64 for tensor in (hidden, weight, bias))
    return scores if fp64 else scores.float()


def backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """To hidden, weight and bias (fp64). A row without upstream gradient counts for nothing, even if NaN."""
    upstream = grad.double().reshape(-1, weight.shape[0])
    if every:
        rows = hidden.reshape(upstream.shape[0], hidden.shape[-1])
        counted = None if attention_mask is None else attention_mask.reshape(-1) != 0
    else:
        positions = _positions(hidden, attention_mask, index, cu_seqlens)
        rows, counted = _rows(hidden, positions), positions != NOWHERE
    if counted is not None:
        upstream = torch.where(counted.unsqueeze(-1), upstream, 0.0)

    grad_hidden = grad_weight = grad_bias = None
    if want_hidden:
        to_rows = (upstream @ weight.double()).to(hidden.dtype)
        if every:
            grad_hidden = to_rows.reshape(hidden.shape)
        else:
            flat = hidden.new_zeros(hidden.shape[:-1].numel() + 1, hidden.shape[-1])
            flat = flat.index_copy(
                0, torch.where(positions == NOWHERE, flat.shape[0] - 1, positions), to_rows
            )
            grad_hidden = flat[:-1].reshape(hidden.shape)
    if want_weight:
        asked = (upstream != 0).any(-1, keepdim=True)
        grad_weight = (upstream.T @ torch.where(asked, rows.double(), 0.0)).to(weight.dtype)
    if want_bias:
        grad_bias = upstream.sum(0)
    return grad_hidden, grad_weight, grad_bias
