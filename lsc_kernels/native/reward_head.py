"""reward_head through the compiled kernels, which take weight and bias in float32."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lsc_kernels


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
) -> Tensor:
    bias = None if bias is None else bias.float()
    result: Tensor = _ops.reward_head_forward.default(
        hidden, weight.float(), bias, attention_mask, index, cu_seqlens, every
    )
    return result


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
    to_hidden, to_weight, to_bias = _ops.reward_head_backward.default(
        *(grad, hidden, weight.float(), attention_mask, index, cu_seqlens, every),
        *(want_hidden, want_weight, want_bias),
    )
    return (
        to_hidden if want_hidden else None,
        to_weight.to(weight.dtype) if want_weight else None,
        to_bias if want_bias else None,
    )


@torch.library.register_fake("lsc_kernels::reward_head_forward")
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    every: bool,
) -> Tensor:
    if every:
        outputs = hidden.shape[:-1]
    else:
        outputs = torch.Size((hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,))
    return hidden.new_empty((*outputs, weight.shape[0]), dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::reward_head_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = grad.new_empty(0)
    return (
        hidden.new_empty(hidden.shape) if want_hidden else nothing,
        weight.new_empty(weight.shape) if want_weight else nothing.clone(),
        weight.new_empty(weight.shape[:1]) if want_bias else nothing.clone(),
    )
