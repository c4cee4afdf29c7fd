"""KL estimators of one token in Triton, in fp64: what csrc/math/kl.h is in C++.

d clamped to log_ratio_clamp -> value -> clamped to kl_clamp -> times exp(log pi(a) - old)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from lsc_kernels.triton.row_state import INF

KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")
K1, ABS, K2, K3, FULL, FULL_REVERSE = (tl.constexpr(kind) for kind in range(6))


class KLValue(NamedTuple):
    """The value, and the factors of the upstream gradient on the way to d, to the divergence, and to log pi(a): through
    d and through the weight. All are 0 where the element is clamped."""

    kl: tl.tensor
    on_ratio: tl.tensor
    on_divergence: tl.tensor
    on_logprob: tl.tensor


@triton.jit
def clamp(value, low, high):
    """NaN stays."""
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def expm1_negative(d):
    """expm1(-d)"""
    series = -d * (1 - d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040))))))
    return tl.where(tl.abs(d) < 0.01, series, tl.exp(-d) - 1)


@triton.jit
def k3(d):
    """expm1(-d) + d, without the cancellation of small d."""
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720 - d / 5040)))))
    direct = tl.where(tl.abs(d) == INF, INF, (tl.exp(-d) - 1) + d)
    return tl.where(tl.abs(d) < 0.01, series, direct)


@triton.jit
def evaluate_kl(
    d, divergence, log_weight, ratio_low, ratio_high, kl_low, kl_high, kind, straight_through, WEIGHTED: tl.constexpr
):  # fmt: skip
    """``divergence`` is the row's full KL where ``kind`` asks for it; ``log_weight`` = log pi(a) - old where WEIGHTED.

    ``kind`` and ``straight_through`` are constants where there is much to evaluate. The kernels of rows, which evaluate
    one token after a whole row, have numbers, and one compilation of seconds for all kinds.
    """
    zero = tl.zeros_like(d)
    ratio = clamp(d, ratio_low, ratio_high)
    if kind == K1:
        value, slope = ratio, zero + 1
    elif kind == ABS:
        value, slope = tl.abs(ratio), tl.where(ratio > 0, zero + 1, tl.where(ratio < 0, zero - 1, zero))
    elif kind == K2:
        value, slope = ratio * ratio / 2, ratio
    elif kind == K3:
        value, slope = k3(ratio), -expm1_negative(ratio)
    else:
        value, slope = divergence, ratio
    if straight_through:
        slope = ratio
    outside = (d < ratio_low) | (d > ratio_high) | (value < kl_low) | (value > kl_high)
    kl = clamp(value, kl_low, kl_high)
    weight = zero + 1
    if WEIGHTED:
        weight = tl.exp(log_weight)
        kl = kl * weight
    on_ratio, on_divergence = zero, zero
    if (kind < FULL) | (straight_through != 0):
        on_ratio = tl.where(outside, 0.0, weight * slope)
    else:
        on_divergence = tl.where(outside, 0.0, weight)
    on_logprob = on_ratio
    if WEIGHTED:
        if (kind == K3) & (straight_through == 0):
            # slope and value, which for a negative d are huge and cancel
            on_logprob = tl.where(outside, 0.0, weight * ratio)
        else:
            on_logprob += tl.where(outside, 0.0, kl)
    return KLValue(kl=kl, on_ratio=on_ratio, on_divergence=on_divergence, on_logprob=on_logprob)
