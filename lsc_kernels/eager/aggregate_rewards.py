"""The utility of several properties, all of which must hold: the definition.

With u_k the log-sigmoid-centred transform of score k and weight w_k, the log-probability that independent
judges find every property good is

    sum_k w_k u_k        and d / d z_k = w_k du_k/dz_k,  d / d w_k = u_k
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import centred, chain, double, has_fp64, reduced, utility


def _properties(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    ignore_missing: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, u and du/dz of every property; a missing score that is ignored is certainly good."""
    z = centred(scores, reference_reward, scale)
    u, slope = utility(z, floor)
    if ignore_missing:
        missing = scores.isnan()
        u, slope = torch.where(missing, 0.0, u), torch.where(missing, 0.0, slope)
    return z, u, slope


def forward(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
) -> Tensor:
    """``scores`` [..., K]; the others are floats, scalars, [K] or of its shape. Returns [...]."""
    _, u, _ = _properties(scores, reference_reward, scale, floor, ignore_missing)
    if weights is not None:
        u = torch.where(weights == 0, 0.0, weights.double() * u)
    total = u.sum(-1)
    return total if has_fp64(scores, reference_reward, scale, floor, weights) else total.float()


def backward(
    grad: Tensor,
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    want_reference: bool,
    want_scale: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """To scores, reference_reward, scale and weights."""
    z, u, slope = _properties(scores, reference_reward, scale, floor, ignore_missing)
    grad = grad.double().unsqueeze(-1).expand(scores.shape)
    to_u = grad if weights is None else grad * weights.double()
    to_scores = chain(to_u, slope) / double(scale)
    to_reference = reduced(-to_scores, reference_reward) if want_reference else None
    to_scale = reduced(-chain(to_scores, z), scale) if want_scale else None
    to_weights = reduced(chain(grad, u), weights) if want_weights and weights is not None else None
    return to_scores.to(scores.dtype), to_reference, to_scale, to_weights
