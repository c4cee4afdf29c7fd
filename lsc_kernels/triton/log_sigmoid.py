"""The log-sigmoid-centred transform and its derivative in Triton: what csrc/math/log_sigmoid.h is in C++.

Design constraint: u and du/dz keep a relative error of 4e-7 for every z, and u is about -e^-z for large z, where an
error of z in its last place is already 4e-6 of u. So z comes as a pair of floats, z + low, and low goes into the
exponential after its argument has been reduced. Nothing is subtracted that cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Centred(NamedTuple):
    """z = (reward - reference_reward) / scale as a pair of floats."""

    high: tl.tensor
    low: tl.tensor


class Operand(NamedTuple):
    """What is broadcast against scores [rows, columns]: a number where ``data`` is None."""

    data: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor
    number: tl.tensor


@triton.jit
def operand_at(operand, row, column, inside):
    """In fp64; 1 where not ``inside``."""
    if operand.data is None:
        return tl.full(inside.shape, operand.number, tl.float64)
    else:
        offset = row.to(tl.int64) * operand.row_stride + column.to(tl.int64) * operand.column_stride
        return tl.load(operand.data + offset, mask=inside, other=1.0).to(tl.float64)


@triton.jit
def centred(score, reference, scale):
    exact = (score.to(tl.float64) - reference) / scale
    high = exact.to(tl.float32)
    low = tl.where(tl.abs(high) < 1e3, exact - high.to(tl.float64), 0.0)
    return Centred(high=high, low=low.to(tl.float32))


@triton.jit
def _power_of_two(n):
    """2^n for whole n in [-126, 127]."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_pair(x, low):
    """e^(x + low) for x <= 0 and a small low: 1 + r + r^2 q(r), |r| <= ln(2)/2, q minimax of degree 4 (3e-9)."""
    limited = tl.where(x < -110.0, -110.0, x)
    n = tl.floor(tl.fma(limited, 1.44269502, 0.5))
    # ln 2 in two parts, the first short enough for its product with n to be exact
    r = tl.fma(n, -1.42860677e-06, tl.fma(n, -0.693145752, limited)) + low
    q = tl.fma(r, 0.0013814558, 0.00836873613)
    q = tl.fma(q, r, 0.041668389)
    q = tl.fma(q, r, 0.166665211)
    q = tl.fma(q, r, 0.49999994)
    whole = n.to(tl.int32)
    half = whole >> 1  # in two steps, for results below the smallest normal number
    return (tl.fma(r * r, q, r) + 1.0) * _power_of_two(half) * _power_of_two(whole - half)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as x + x^2 g(x), g minimax of degree 8 (5e-9)."""
    g = tl.fma(x, -0.0033184113, 0.0202043112)
    g = tl.fma(g, x, -0.0576639362)
    g = tl.fma(g, x, 0.106805049)
    g = tl.fma(g, x, -0.153553665)
    g = tl.fma(g, x, 0.196953908)
    g = tl.fma(g, x, -0.249585852)
    g = tl.fma(g, x, 0.33330512)
    g = tl.fma(g, x, -0.499999315)
    return tl.fma(x * x, g, x)


@triton.jit
def exp_minus_abs(high, low):
    """e^-|z + low|"""
    return exp_pair(-tl.abs(high), tl.where(high < 0, low, -low))


@triton.jit
def _plain(z):
    """u = min(z, 0) - log1p(e^-|z|), du/dz = sigmoid(-z). NaN stays."""
    e = exp_minus_abs(z.high, z.low)
    value = tl.where(z.high > 0, 0.0, z.high) - log1p_unit(e)
    return value, tl.div_rn(tl.where(z.high < 0, 1.0, e), 1.0 + e)


@triton.jit
def _floored(z, floor):
    """u = log(f + (1 - f) sigmoid(z)) and du/dz, for f > 0. With e = e^-|z|:

        1 - sigmoid(z) is the odds w against, over 1 + w:   u = -log1p(w),
        w = (1 - f) e / (1 + f e)  for z >= 0,   (1 - f) / (f + e)  for z < 0

    which is used while w <= 1. Beyond, z < 0 and u = log(f + e) - log1p(e), where log(f + e) is taken from the
    larger of its two terms:

        log(f + e) = max(z, log f) + log1p(e^-|z - log f|)
        du/dz = (1 - f) e / ((1 + e)(1 + f e))  for z >= 0,   (1 - f) share / (1 + e)  for z < 0,
        share = e / (f + e) = sigmoid(z - log f)
    """
    rate, complement = floor.to(tl.float32), (1.0 - floor).to(tl.float32)
    exact_log = tl.log(floor)
    log_rate = exact_log.to(tl.float32)
    below = z.high < 0
    e = exp_minus_abs(z.high, z.low)

    # z - log f with what the subtraction rounds away
    exact = (z.high.to(tl.float64) + z.low.to(tl.float64)) - exact_log
    distance = exact.to(tl.float32)
    distance_low = tl.where(tl.abs(distance) < 1e3, exact - distance.to(tl.float64), 0.0).to(tl.float32)
    smaller = exp_minus_abs(distance, distance_low)
    share = tl.div_rn(tl.where(distance < 0, smaller, 1.0), 1.0 + smaller)

    with_floor = tl.fma(rate, e, 1.0)
    against = tl.where(below, tl.div_rn(complement, rate + e), tl.div_rn(complement * e, with_floor))
    far = tl.where(z.high > log_rate, z.high, log_rate) + log1p_unit(smaller) - log1p_unit(e)
    value = tl.where(against > 1.0, far, -log1p_unit(tl.where(against > 1.0, 1.0, against)))
    slope = tl.div_rn(complement * tl.where(below, share, tl.div_rn(e, with_floor)), 1.0 + e)
    return value, slope


@triton.jit
def utility(z, floor, HAS_FLOOR: tl.constexpr):
    """u and du/dz in fp32; ``floor`` in fp64."""
    value, slope = _plain(z)
    if HAS_FLOOR:
        positive = floor > 0
        floored_value, floored_slope = _floored(z, tl.where(positive, floor, 0.5))
        value, slope = tl.where(positive, floored_value, value), tl.where(positive, floored_slope, slope)
    return value, slope
