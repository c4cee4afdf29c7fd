"""KL estimators from two log-probabilities of the sampled action: the definition.

With d = log pi(a) - log pi_ref(a), clamped to ``log_ratio_clamp``:

    k1 = d      abs = |d|      k2 = d^2 / 2      k3 = exp(-d) - 1 + d

then clamped to ``kl_clamp`` and multiplied by the importance ratio exp(log pi(a) - old).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

INF = float("inf")

Interval = tuple[float, float]


class KLOptions(NamedTuple):
    """What the caller asked of a KL. A clamp that is None has no limits."""

    kind: str
    straight_through: bool = False
    log_ratio_clamp: Interval | None = None
    kl_clamp: Interval | None = None

    @property
    def log_ratio_limits(self) -> Interval:
        return self.log_ratio_clamp or (-INF, INF)

    @property
    def kl_limits(self) -> Interval:
        return self.kl_clamp or (-INF, INF)


def estimate(d: Tensor, options: KLOptions) -> Tensor:
    """The estimator at log ratio ``d``, before ``kl_clamp``."""
    d = d.clamp(*options.log_ratio_limits)
    match options.kind:
        case "k1":
            return d
        case "abs":
            return d.abs()
        case "k2":
            return d * d / 2
        case "k3":
            # expm1(-d) + d, whose two terms cancel for small d
            series = d * d * (0.5 + d * (-1 / 6 + d * (1 / 24 + d * (-1 / 120 + d * (1 / 720 - d / 5040)))))
            direct = torch.where(d.isinf(), INF, torch.expm1(-d) + d)
            return torch.where(d.abs() < 1e-2, series, direct)
    raise ValueError(f"{options.kind!r} is not an estimator of the action's log-probabilities")


def slope(d: Tensor, options: KLOptions) -> Tensor:
    """d estimate / d log ratio; 0 where the log ratio is clamped."""
    low, high = options.log_ratio_limits
    inside = (d >= low) & (d <= high) | d.isnan()
    match "k2" if options.straight_through else options.kind:
        case "k1":
            derivative = torch.ones_like(d)
        case "abs":
            derivative = d.sign()
        case "k2":
            derivative = d
        case "k3":
            derivative = -torch.expm1(-d)
        case _:
            derivative = torch.zeros_like(d)
    return torch.where(inside, derivative, 0.0)


def clamp_and_weigh(
    value: Tensor,
    derivative: Tensor,
    d: Tensor,
    log_weight: Tensor | None,
    options: KLOptions,
    sampled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply ``kl_clamp`` and the importance ratio exp(``log_weight``).

    Returns the KL, the factor on ``value``'s own gradient, and the factor on log pi(a): the same where ``value`` is an
    estimator at ``d``, and what reaches it through the ratio. All factors are 0 where something is clamped.
    """
    low, high = options.kl_limits
    inside = (value >= low) & (value <= high) | value.isnan()
    kl = value.clamp(low, high)
    low, high = options.log_ratio_limits
    # also where the weight is infinite, which no derivative of 0 stops
    inside = inside & ~((d < low) | (d > high))
    if log_weight is None:
        own = torch.where(inside, derivative, 0.0)
        return kl, own, own if sampled else torch.zeros_like(own)
    weight = log_weight.exp()
    kl, own = weight * kl, torch.where(inside, weight * derivative, 0.0)
    if not sampled:
        on_logprob = kl
    elif options.kind == "k3" and not options.straight_through:
        on_logprob = weight * d  # slope and value, which for a negative d are huge and cancel
    else:
        on_logprob = own + kl
    return kl, own, torch.where(inside, on_logprob, 0.0)


def _evaluate(
    logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None, options: KLOptions
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, ref_logprobs = logprobs.double(), ref_logprobs.double()
    # equal log-probabilities give 0, also where both are -inf
    d = torch.where(logprobs == ref_logprobs, 0.0, logprobs - ref_logprobs)
    log_weight = None if old_logprobs is None else logprobs - old_logprobs.double()
    return clamp_and_weigh(estimate(d, options), slope(d, options), d, log_weight, options)


def forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
) -> Tensor:
    kl, _, _ = _evaluate(logprobs, ref_logprobs, old_logprobs, options)
    if mask is not None:
        kl = torch.where(mask, kl, 0.0)
    fp64 = torch.float64 in (logprobs.dtype, ref_logprobs.dtype)
    return kl if fp64 else kl.float()


def backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
    want_logprobs: bool,
    want_ref: bool,
) -> tuple[Tensor | None, Tensor | None]:
    _, own, on_logprob = _evaluate(logprobs, ref_logprobs, old_logprobs, options)

    def gradient(factor: Tensor, source: Tensor) -> Tensor:
        # an overflowed slope that nobody asked for is not NaN
        asked = grad != 0 if mask is None else mask & (grad != 0)
        return torch.where(asked, grad.double() * factor, 0.0).to(source.dtype)

    return (
        gradient(on_logprob, logprobs) if want_logprobs else None,
        gradient(-own, ref_logprobs) if want_ref else None,
    )
