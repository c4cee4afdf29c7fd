"""Rewards per token from a utility per sequence and a KL per token: the definition.

reward[b, t] = dense[b, t] - beta kl[b, t] where t is counted, else 0; plus utility[b], clamped, at one place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager.reward_head import NOWHERE, last_counted

INF = float("inf")


class RewardOptions(NamedTuple):
    """What the caller asked of the rewards; also, in this order, the trailing arguments of the native ops."""

    beta: float
    placement: str
    clip_low: float = -INF
    clip_high: float = INF


def check_index(index: Tensor | None, kl: Tensor, mask: Tensor | None) -> None:
    """Raise IndexError for an index outside [0, T) where something counts. On a GPU that row is NaN: no host wait."""
    if index is None or kl.device.type != "cpu" or torch.compiler.is_compiling():
        return
    length = kl.shape[1]
    outside = ((index < 0) | (index >= length)) & (length > 0 if mask is None else (mask != 0).any(-1))
    if outside.any():
        raise IndexError(f"index must be in [0, T) with T = {length}; got {index[outside][0].item()}")


def _positions(kl: Tensor, counted: Tensor, index: Tensor | None, placement: str) -> tuple[Tensor, Tensor]:
    """[B] where the utility goes, NOWHERE if nothing in the row is counted; [B] whether it falls outside."""
    length = kl.shape[1]
    last = last_counted(counted)
    none = last == NOWHERE
    match placement:
        case "index":
            assert index is not None
            outside = ~none & ((index < 0) | (index >= length))
            check_index(index, kl, counted)
            return torch.where(none | outside, NOWHERE, index.long()), outside
        case "eos_plus_one":
            place = (last + 1).clamp_max(length - 1)
        case "before_last":
            places = torch.arange(length, device=kl.device)
            before = last_counted(counted & (places < last.unsqueeze(-1)))
            place = torch.where(before == NOWHERE, last, before)
        case _:
            place = last
    return torch.where(none, NOWHERE, place), torch.zeros_like(none)


def _counted(kl: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(kl, dtype=torch.bool) if mask is None else mask != 0


def forward(
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
) -> Tensor:
    counted = _counted(kl, mask)
    positions, outside = _positions(kl, counted, index, options.placement)
    per_token = torch.zeros_like(kl, dtype=torch.float64) if dense is None else dense.double()
    if options.beta != 0.0:
        per_token = per_token - options.beta * kl.double()
    placed = utility.double().clamp(options.clip_low, options.clip_high).unsqueeze(-1)
    here = torch.arange(kl.shape[1], device=kl.device) == positions.unsqueeze(-1)
    rewards = torch.where(counted, per_token, 0.0) + torch.where(here, placed, 0.0)
    rewards = torch.where(outside.unsqueeze(-1), torch.nan, rewards)
    fp64 = any(tensor is not None and tensor.dtype is torch.float64 for tensor in (utility, kl, dense))
    return rewards if fp64 else rewards.float()


def backward(
    grad: Tensor,
    utility: Tensor,
    kl: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    dense: Tensor | None,
    options: RewardOptions,
    want_utility: bool,
    want_kl: bool,
    want_dense: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """To utility (0 where it is clamped or placed nowhere), kl and dense."""
    counted = _counted(kl, mask)
    grad = grad.double()
    to_utility = to_kl = to_dense = None
    if want_utility:
        positions, _ = _positions(kl, counted, index, options.placement)
        here = torch.arange(kl.shape[1], device=kl.device) == positions.unsqueeze(-1)
        exact = utility.double()
        clamped = (exact < options.clip_low) | (exact > options.clip_high)
        placed = torch.where(here, grad, 0.0).sum(-1)
        to_utility = torch.where(clamped, 0.0, placed).to(utility.dtype)
    if want_kl:
        to_kl = torch.where(counted & (options.beta != 0.0), -options.beta * grad, 0.0).to(kl.dtype)
    if want_dense and dense is not None:
        to_dense = torch.where(counted, grad, 0.0).to(dense.dtype)
    return to_utility, to_kl, to_dense
