"""Whitening of what a mask counts: the definition.

With n counted elements, their mean m and M2 = sum (x - m)^2:

    r = 1 / sqrt(M2 / (n - correction) + eps)        y = r (x - m), plus m without ``shift_mean``

and backward, g being the gradient to y, with the sums G of g and Q of g (x - m):

    r g - r G / n - r^3 Q (x - m) / (n - correction), plus G / n without ``shift_mean``

Moments and sums are small tensors of their own, so that those of several processes can be merged in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class WhitenOptions(NamedTuple):
    """What the caller asked for; also, in this order, the trailing arguments of the native ops."""

    shift_mean: bool
    eps: float
    correction: int


def merged(moments: Tensor) -> Tensor:
    """[parts, 3] moments as those of all, [3], always the same way: every process gets the same bits."""
    count, mean, m2 = moments.unbind(-1)
    total = count.sum()
    mean_of_all = (count * mean).sum() / total.clamp_min(1)
    mean_of_all = mean_of_all + (count * (mean - mean_of_all)).sum() / total.clamp_min(1)
    return torch.stack([total, mean_of_all, (m2 + count * (mean - mean_of_all).square()).sum()])


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0


def moments(x: Tensor, mask: Tensor | None) -> Tensor:
    """[3] the count, the mean and M2, in fp64."""
    counted = _counted(x, mask)
    count = counted.sum().double()
    mean = torch.where(counted, x.double(), 0.0).sum() / count.clamp_min(1)
    # what the sum was rounded by: equal values of fp64 differ from their mean by nothing
    mean = mean + torch.where(counted, x.double() - mean, 0.0).sum() / count.clamp_min(1)
    m2 = torch.where(counted, x.double() - mean, 0.0).square().sum()
    return torch.stack([count, mean, m2])


def _scale(moments: Tensor, options: WhitenOptions) -> tuple[Tensor, Tensor]:
    """r, 0 where it would be infinite; and n - correction, at least 1."""
    count, _, m2 = moments
    degrees = (count - options.correction).clamp_min(1)
    variance = m2 / degrees + options.eps
    return torch.where(variance == 0, 0.0, variance.rsqrt()), degrees


def forward(x: Tensor, mask: Tensor | None, moments: Tensor, options: WhitenOptions) -> Tensor:
    scale, _ = _scale(moments, options)
    result = (x.double() - moments[1]) * scale
    if not options.shift_mean:
        result = result + moments[1]
    result = torch.where(_counted(x, mask), result, 0.0)
    return result if x.dtype is torch.float64 else result.float()


def sums(grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor) -> Tensor:
    """[2] G and Q, in fp64."""
    upstream = torch.where(_counted(x, mask), grad.double(), 0.0)
    centred = torch.where(_counted(x, mask), x.double() - moments[1], 0.0)
    return torch.stack([upstream.sum(), (upstream * centred).sum()])


def backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, sums: Tensor, options: WhitenOptions
) -> Tensor:
    """To x, in its dtype."""
    scale, degrees = _scale(moments, options)
    mean_grad = sums[0] / moments[0].clamp_min(1)
    along = scale * (scale * (scale * sums[1] / degrees)) * (x.double() - moments[1])
    result = scale * (grad.double() - mean_grad) - along
    if not options.shift_mean:
        result = result + mean_grad
    return torch.where(_counted(x, mask), result, 0.0).to(x.dtype)
