"""The linear head of one or several reward models, read at one position of each sequence."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import wants_grad


def reward_head(
    hidden: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    attention_mask: Tensor | Sequence[Tensor | None] | None = None,
    index: Tensor | Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | Sequence[Tensor | None] | None = None,
    pool: str = "last",
) -> Tensor:
    r"""Scores of K properties from a reward model's last hidden states: only the rows that count are read.

    .. math:: \mathrm{score}_{bk} = h_{b,p(b)} \cdot w_k + \mathrm{bias}_k

    The position p(b) is ``index[b]``, else the last nonzero of ``attention_mask[b]`` (left or right padding,
    holes), else S-1. It is never looked for by a pad-token id, which can be the end-of-sequence id.

    Args:
        hidden: h, [B, S, H]; or packed sequences [N, H] with ``cu_seqlens``; with ``pool="none"`` any [...,
            H]. fp32, bf16, fp16, or fp64 (computed in fp64). Any strides. For K separate reward models: a
            list of K such tensors, each with its own S and H.
        weight: [K, H]; for a list, K tensors [1, H_k] or [H_k].
        bias: [K] or None; for a list also a list of K tensors [1] or [], or None.
        attention_mask: [B, S] ([...] with ``pool="none"``), bool, int or float; nonzero counts.
        index: [B] int64 or int32 in [0, S). It decides even where ``attention_mask`` is given too.
        cu_seqlens: [B+1] int64 or int32, rising from 0 to N: sequence b is rows cu_seqlens[b] ...
            cu_seqlens[b+1]-1.
        pool: ``last``: one position per sequence, as above. ``none``: score every position (a value head);
            what ``attention_mask`` leaves out scores 0.

        For a list, ``attention_mask``, ``index`` and ``cu_seqlens`` are one for all models or a list of K.

    Returns:
        [B, K], or [..., K] with ``pool="none"``; fp32 (fp64 if an input is fp64). A sequence without a
        counted position scores NaN.

    Gradients:
        To ``hidden`` (dense, exactly 0 away from the rows read), ``weight`` and ``bias``, each in its dtype;
        a sequence without a counted position sends none. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not match, devices that differ, options that exclude each other,
            ``cu_seqlens`` that does not rise from 0 to N (checked on the CPU only; on a GPU such a sequence
            scores NaN).
        IndexError: ``index`` outside [0, S), on the CPU; on a GPU that sequence scores NaN.

    Source:
        A linear head on a language model: D. Ziegler et al., "Fine-Tuning Language Models from Human
        Preferences" (2019), arXiv:1909.08593. One reward model per property: Z. Wang et al., "Transforming
        and Combining Rewards for Aligning Large Language Models" (2024), arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> hidden = torch.arange(6.0).reshape(1, 3, 2)  # the last position is padding
        >>> lk.reward_head(hidden, torch.tensor([[1.0, 10.0]]), attention_mask=torch.tensor([[1, 1, 0]]))
        tensor([[32.]])
    """
    if pool not in ("last", "none"):
        raise ValueError(f"pool must be 'last' or 'none'; got {pool!r}")
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        if bias is not None and not isinstance(bias, Tensor):
            raise TypeError(f"bias must be a tensor [K] or None; got {type(bias).__name__}")
        return _one_model("", hidden, weight, bias, attention_mask, index, cu_seqlens, pool)
    if isinstance(hidden, (list, tuple)) and isinstance(weight, (list, tuple)):
        return _separate_models(hidden, weight, bias, attention_mask, index, cu_seqlens, pool)
    raise TypeError(
        "hidden and weight must be two tensors, or for separate reward models two lists of tensors; "
        f"got {type(hidden).__name__} and {type(weight).__name__}"
    )


def _separate_models(
    hidden: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    attention_mask: object,
    index: object,
    cu_seqlens: object,
    pool: str,
) -> Tensor:
    count = len(hidden)
    if count == 0:
        raise ValueError("hidden must have at least one reward model; got an empty list")
    if len(weight) != count:
        raise ValueError(f"weight must have one entry per reward model, {count}; got {len(weight)}")
    if isinstance(bias, Tensor):
        _checks.floating("bias", bias)
        _checks.shape("bias", bias, (count,), "[K], one per reward model")
    biases, masks = _per_model("bias", bias, count), _per_model("attention_mask", attention_mask, count)
    indices, segments = _per_model("index", index, count), _per_model("cu_seqlens", cu_seqlens, count)
    columns: list[Tensor] = []
    for k in range(count):
        _checks.floating(f"hidden[{k}]", hidden[k])
        _checks.same_device(f"hidden[{k}]", hidden[k], "hidden[0]", hidden[0].device)
        _checks.floating(f"weight[{k}]", weight[k])
        row = weight[k].unsqueeze(0) if weight[k].dim() == 1 else weight[k]
        if row.dim() != 2 or row.shape[0] != 1:
            raise ValueError(f"weight[{k}] must be [1, H] or [H]; got {list(weight[k].shape)}")
        own_bias = biases[k]
        if isinstance(own_bias, Tensor) and own_bias.dim() == 0:
            own_bias = own_bias.unsqueeze(0)
        column = _one_model(f"[{k}]", hidden[k], row, own_bias, masks[k], indices[k], segments[k], pool)
        if columns and column.shape != columns[0].shape:
            raise ValueError(
                f"hidden[{k}] must give as many scores as hidden[0], {list(columns[0].shape[:-1])}; "
                f"got {list(column.shape[:-1])} from {list(hidden[k].shape)}"
            )
        columns.append(column)
    return torch.cat(columns, -1)


def _per_model(name: str, value: Any, count: int) -> Sequence[Any]:
    """One value for all models, or one each; a bias tensor [K] holds one each."""
    if value is None or isinstance(value, Tensor):
        return value.unbind(0) if name == "bias" and value is not None else [value] * count
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor, a list of {count} or None; got {type(value).__name__}")
    if len(value) != count:
        raise ValueError(f"{name} must have one entry per reward model, {count}; got {len(value)}")
    return value


def _one_model(
    which: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Any,
    attention_mask: Any,
    index: Any,
    cu_seqlens: Any,
    pool: str,
) -> Tensor:
    every = pool == "none"
    check_head(hidden, weight, bias, attention_mask, index, cu_seqlens, every, which)

    kernels = select("reward_head", hidden, weight, bias)
    fixed = (attention_mask, index, cu_seqlens, every)
    if wants_grad(hidden, weight, bias):
        scores: Tensor = _apply((kernels, *fixed), hidden, weight, bias)
    else:
        scores = kernels.forward(hidden, weight, bias, *fixed)
    return scores


def check_head(
    hidden: Any,
    weight: Any,
    bias: Any,
    attention_mask: object,
    index: object,
    cu_seqlens: object,
    every: bool = False,
    which: str = "",
) -> None:
    """Check the arguments of one model's head. ``which`` is the [k] of a list, for the messages."""
    _checks.floating(f"hidden{which}", hidden)
    _checks.floating(f"weight{which}", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight{which} must be [K, H] with K > 0; got {list(weight.shape)}")
    _check_positions(which, hidden, attention_mask, index, cu_seqlens, every)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight{which} must be [K, H] with H = {hidden.shape[-1]}; got {list(weight.shape)}"
        )
    _checks.same_device(f"weight{which}", weight, f"hidden{which}", hidden.device)
    if bias is not None:
        _checks.floating(f"bias{which}", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias{which} must be [K], {list(weight.shape[:1])}; got {list(bias.shape)}")
        _checks.same_device(f"bias{which}", bias, f"hidden{which}", hidden.device)


def _check_positions(
    which: str, hidden: Tensor, attention_mask: object, index: object, cu_seqlens: object, every: bool
) -> None:
    """Check the shape of hidden and what says which of its positions count."""
    if hidden.dim() == 0:
        raise ValueError(f"hidden{which} must be [..., H]; got a scalar")
    if index is not None and (every or cu_seqlens is not None):
        other = "pool='none'" if every else "cu_seqlens"
        raise ValueError(
            f"index{which} cannot be combined with {other}: it names the one position of a row that is read"
        )
    if cu_seqlens is not None:
        segments = _checks.integer(f"cu_seqlens{which}", cu_seqlens)
        if segments.dim() != 1 or segments.shape[0] == 0:
            raise ValueError(f"cu_seqlens{which} must be [B+1]; got {list(segments.shape)}")
        if hidden.dim() != 2:
            raise ValueError(
                f"hidden{which} must be packed, [N, H], with cu_seqlens; got {list(hidden.shape)}"
            )
        if attention_mask is not None and not every:
            raise ValueError(
                f"attention_mask{which} cannot be combined with cu_seqlens: packed sequences have no padding"
            )
        _checks.same_device(f"cu_seqlens{which}", segments, f"hidden{which}", hidden.device)
    elif not every and hidden.dim() != 3:
        raise ValueError(
            f"hidden{which} must be [B, S, H], or [N, H] with cu_seqlens; got {list(hidden.shape)}"
        )
    if index is not None:
        places = _checks.integer(f"index{which}", index)
        _checks.like(
            f"index{which}",
            places,
            hidden.shape[:1],
            "one position per sequence",
            f"hidden{which}",
            hidden.device,
        )
    if attention_mask is not None:
        counts = f"hidden{which} without H"
        _checks.mask(f"attention_mask{which}", attention_mask, hidden.shape[:-1], counts, hidden.device)


class _RewardHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, Tensor | None, Tensor | None, Tensor | None, bool],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        kernels, attention_mask, index, cu_seqlens, every = call
        ctx.save_for_backward(hidden, weight, attention_mask, index, cu_seqlens)
        ctx.call = kernels, every, None if bias is None else bias.dtype
        scores: Tensor = kernels.forward(hidden, weight, bias, attention_mask, index, cu_seqlens, every)
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, *positions = ctx.saved_tensors
        kernels, every, bias_dtype = ctx.call
        with torch.no_grad():
            to_hidden, to_weight, to_bias = kernels.backward(
                grad, hidden, weight, *positions, every, *ctx.needs_input_grad[1:]
            )
            if to_bias is not None:
                to_bias = to_bias.to(bias_dtype)
        sources = (grad, hidden, weight)
        gradients = (to_hidden, to_weight, to_bias)
        return None, *(first_derivative("reward_head", each, *sources) for each in gradients)


_apply = quick_apply(_RewardHead)
