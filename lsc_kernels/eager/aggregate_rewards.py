"""The utility of several properties, all of which must hold, or a formula over them: the definition.

With u_k the log-sigmoid-centred transform of score k and weight w_k, the log-probability that independent
judges find every property good is

    sum_k w_k u_k        and d / d z_k = w_k du_k/dz_k,  d / d w_k = u_k

A formula instead has p_k = e^(w_k u_k) as its properties' probabilities: see ``eager/formula.py``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager import formula
from lsc_kernels.eager.formula import Pair
from lsc_kernels.eager.lsc_transform import (
    centred,
    chain,
    double,
    has_fp64,
    log_sigmoid,
    reduced,
    utility,
)


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


class _Judged(NamedTuple):
    """What a formula takes of every property, [..., K]."""

    z: Tensor
    unweighted: Pair
    weighted: Pair
    log_slope: Tensor
    """log of d log p^w / dz"""


def _judge(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
) -> _Judged:
    z = centred(scores, reference_reward, scale)
    p, log_slope = Pair(log_sigmoid(z), log_sigmoid(-z)), log_sigmoid(-z)
    if isinstance(floor, Tensor) or floor != 0.0:
        rate = torch.as_tensor(floor, dtype=torch.float64, device=z.device)
        floored = formula.settled(
            torch.logaddexp(rate.log(), torch.log1p(-rate) + p.good), torch.log1p(-rate) + p.bad
        )
        with_floor = floored.bad + (p.good - floored.good)
        p = Pair(*(torch.where(rate == 0, old, new) for old, new in zip(p, floored, strict=True)))
        log_slope = torch.where(rate == 0, log_slope, with_floor)
    if ignore_missing:
        missing = scores.isnan()
        p = Pair(torch.where(missing, 0.0, p.good), torch.where(missing, -math.inf, p.bad))
        log_slope = torch.where(missing, -math.inf, log_slope)
    if weights is None:
        return _Judged(z, p, p, log_slope)
    exponents = weights.double().expand(z.shape)
    log_slope = torch.where(exponents == 0, -math.inf, log_slope + exponents.log())
    return _Judged(z, p, formula.power(p, exponents), log_slope)


def forward(
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
) -> Tensor:
    """``scores`` [..., K]; the others are floats, scalars, [K] or of its shape. Returns [...]."""
    if program is None:
        _, u, _ = _properties(scores, reference_reward, scale, floor, ignore_missing)
        if weights is not None:
            u = torch.where(weights == 0, 0.0, weights.double() * u)
        total = u.sum(-1)
    else:
        judged = _judge(scores, reference_reward, scale, floor, weights, ignore_missing)
        total = _evaluate(program, judged).value.good
    return total if has_fp64(scores, reference_reward, scale, floor, weights) else total.float()


def _evaluate(program: tuple[int, ...], judged: _Judged) -> formula.Node:
    good, bad = judged.weighted
    return formula.evaluate(program, lambda column: Pair(good[..., column], bad[..., column]))


def backward(
    grad: Tensor,
    scores: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    weights: Tensor | None,
    ignore_missing: bool,
    program: tuple[int, ...] | None,
    want_reference: bool,
    want_scale: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """To scores, reference_reward, scale and weights."""
    if program is None:
        z, u, slope = _properties(scores, reference_reward, scale, floor, ignore_missing)
        upstream = grad.double().unsqueeze(-1).expand(scores.shape)
        to_u = upstream if weights is None else upstream * weights.double()
        to_z, to_each_weight = chain(to_u, slope), chain(upstream, u)
    else:
        judged = _judge(scores, reference_reward, scale, floor, weights, ignore_missing)
        z = judged.z
        to_z, to_each_weight = _of_formula(grad.double(), program, judged)
    to_scores = to_z / double(scale)
    to_reference = reduced(-to_scores, reference_reward) if want_reference else None
    to_scale = reduced(-chain(to_scores, z), scale) if want_scale else None
    to_weights = reduced(to_each_weight, weights) if want_weights and weights is not None else None
    return to_scores.to(scores.dtype), to_reference, to_scale, to_weights


def _of_formula(grad: Tensor, program: tuple[int, ...], judged: _Judged) -> tuple[Tensor, Tensor]:
    """To z and weights, from the formula's slope at each property's probability."""
    whole = _evaluate(program, judged)
    log_of_weight = formula.log_minus_log(judged.unweighted)
    columns = judged.z.shape[-1]
    to_z, to_weights = ([torch.zeros_like(grad)] * columns for _ in range(2))
    start = formula.Slope(torch.zeros_like(whole.value.good))
    for column, (size, of_bad, falls) in formula.differentiate(whole, start):
        if of_bad:
            good, bad = (side[..., column] for side in judged.weighted)
            size = formula.log_quotient(size + good, bad)
        sign = -1.0 if falls else 1.0
        for gradients, log_factor, signed in (
            (to_z, judged.log_slope, sign),
            (to_weights, log_of_weight, -sign),
        ):
            exponent = torch.where(size == -math.inf, -math.inf, size + log_factor[..., column])
            gradients[column] = chain(grad, signed * exponent.exp())
    return torch.stack(to_z, -1), torch.stack(to_weights, -1)
