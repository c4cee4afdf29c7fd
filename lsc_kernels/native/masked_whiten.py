"""masked_whiten through the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.masked_whiten import WhitenOptions

_ops = torch.ops.lsc_kernels


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    result: Tensor = _ops.masked_whiten_moments.default(x, mask)
    return result


def forward(x: Tensor, mask: Tensor | None, moments: Tensor, options: WhitenOptions) -> Tensor:
    result: Tensor = _ops.masked_whiten_forward.default(x, mask, moments, *options)
    return result


def sums(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor) -> Tensor:
    result: Tensor = _ops.masked_whiten_sums.default(grad, x, mask, moments)
    return result


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, sums: Tensor, options: WhitenOptions
) -> Tensor:
    to_x: Tensor = _ops.masked_whiten_backward.default(grad, x, mask, moments, sums, *options)
    return to_x


@torch.library.register_fake("lsc_kernels::masked_whiten_moments")
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


@torch.library.register_fake("lsc_kernels::masked_whiten_forward")
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.register_fake("lsc_kernels::masked_whiten_sums")
def _(grad: Tensor, *_: object) -> Tensor:
    return grad.new_empty(2, dtype=torch.float64)


@torch.library.register_fake("lsc_kernels::masked_whiten_backward")
def _(grad: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)
