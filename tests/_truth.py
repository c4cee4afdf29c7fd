"""The policy-side formulas in fp64, for the tests alone. Gradients come from autograd, not from a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


def expm1_plus(t: Tensor) -> Tensor:
    """exp(-t) - 1 + t >= 0, to full relative accuracy, also where the terms cancel."""
    small = t.abs() < 0.03
    s = torch.where(small, t, 0.0)
    series = s * s * (1 / 2 - s / 6 * (1 - s / 4 * (1 - s / 5 * (1 - s / 6 * (1 - s / 7)))))
    direct = torch.where(t == -torch.inf, torch.inf, torch.expm1(-t) + t)
    return torch.where(small, series, direct)


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": lambda d: d.abs(),
    "k2": lambda d: d * d / 2,
    "k3": expm1_plus,
}


def row_kept(actions: Tensor, mask: Tensor | None) -> Tensor:
    kept = actions != IGNORE_INDEX
    return kept if mask is None else kept & (mask != 0)


def scaled(logits: Tensor, kept: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits about their largest, over the temperature, in fp64; left-out rows reach nothing."""
    rows = kept.unsqueeze(-1)
    per_row = torch.as_tensor(temperature, dtype=torch.float64)
    per_row = per_row.unsqueeze(-1) if per_row.dim() else per_row
    kept_logits = torch.where(rows, logits, 0.0)
    # about the largest: at 1e4 / 0.1 fp64 itself would round at 1e-11
    return (kept_logits - kept_logits.detach().amax(-1, keepdim=True)) / torch.where(rows, per_row, 1.0)


def pick(log_p: Tensor, actions: Tensor, kept: Tensor) -> Tensor:
    return log_p.gather(-1, torch.where(kept, actions.long(), 0).unsqueeze(-1)).squeeze(-1)


def entropy_of(log_p: Tensor) -> Tensor:
    dead = log_p == -torch.inf
    return -(log_p.exp() * torch.where(dead, 0.0, log_p)).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), accurate to its own size; the gradient is that of sum p (log p - log q).

    Since p and q both sum to one, KL is also the sum of q - p + p d = p (exp(-d) - 1 + d), each term >= 0.
    """
    dead = log_p == -torch.inf
    d = torch.where(dead, 0.0, log_p) - torch.where(dead, 0.0, log_q)
    p = log_p.exp()
    plain = (p * d).sum(-1)
    with torch.no_grad():
        far = d.abs() > 1
        terms = torch.where(far, log_q.exp() - p + p * d, p * expm1_plus(torch.where(far, 0.0, d)))
        value = torch.where(dead, log_q.exp(), terms).sum(-1)
    return torch.where(plain.isfinite(), value + (plain - plain.detach()), plain)


class Logprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor, actions: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None
) -> Logprobs:
    kept = row_kept(actions, mask)
    log_p = torch.log_softmax(scaled(logits, kept, temperature), -1)
    return Logprobs(
        torch.where(kept, pick(log_p, actions, kept), 0.0), torch.where(kept, entropy_of(log_p), 0.0)
    )


class KL(NamedTuple):
    """The estimate and what its error bound needs, each of the shape of the log ratio."""

    kl: Tensor
    unclamped: Tensor
    weight: Tensor


def weighted_kl(
    d: Tensor,
    value: Tensor,
    logprobs: Tensor,
    *,
    straight_through: bool,
    log_ratio_clamp: tuple[float, float] | None,
    kl_clamp: tuple[float, float] | None,
    old_logprobs: Tensor | None,
) -> KL:
    """From the estimator's value to the KL returned: straight-through, clamp, importance ratio.

    ``value`` comes from a log ratio that is clamped already. A clamped element has no gradient at all.
    """
    if straight_through:
        value = value.detach() + (d * d / 2 - (d * d / 2).detach()).nan_to_num(nan=0.0)
    low, high = kl_clamp or (-torch.inf, torch.inf)
    ratio_low, ratio_high = log_ratio_clamp or (-torch.inf, torch.inf)
    clamped = (value < low) | (value > high) | (d < ratio_low) | (d > ratio_high)
    if d.requires_grad:
        # the estimator's slope may be inf, and inf times no gradient is NaN
        d.register_hook(lambda gradient: torch.where(clamped, 0.0, gradient))
    result = value.clamp(low, high)
    weight = torch.ones_like(d) if old_logprobs is None else (logprobs - old_logprobs.double()).exp()
    result = result * weight
    return KL(torch.where(clamped, result.detach(), result), value.detach(), weight.detach())


def kl_from_logprobs(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    kl: str = "k3",
    grad: str = "autograd",
    mask: Tensor | None = None,
    log_ratio_clamp: tuple[float, float] | None = None,
    kl_clamp: tuple[float, float] | None = None,
    old_logprobs: Tensor | None = None,
) -> KL:
    kept = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    p, q = torch.where(kept, logprobs, 0.0), torch.where(kept, ref_logprobs, 0.0)
    old = None if old_logprobs is None else torch.where(kept, old_logprobs.double(), 0.0)
    d = p - q
    result = weighted_kl(
        d,
        ESTIMATORS[kl](d.clamp(*(log_ratio_clamp or (-torch.inf, torch.inf)))),
        p,
        straight_through=grad == "straight_through",
        log_ratio_clamp=log_ratio_clamp,
        kl_clamp=kl_clamp,
        old_logprobs=old,
    )
    return result._replace(kl=torch.where(kept, result.kl, 0.0))


class TokenKL(NamedTuple):
    """The four outputs of ``token_kl``, then what the bounds need: d, and the logits over the temperature."""

    kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    d: Tensor
    unclamped: Tensor
    weight: Tensor
    x: Tensor
    y: Tensor
    kept: Tensor


def token_kl(
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    *,
    kl: str = "k3",
    grad: str = "autograd",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    log_ratio_clamp: tuple[float, float] | None = None,
    kl_clamp: tuple[float, float] | None = None,
    old_logprobs: Tensor | None = None,
) -> TokenKL:
    """``policy_logits`` and ``ref_logits`` are fp64, and may require grad."""
    kept = row_kept(actions, mask)
    x, y = scaled(policy_logits, kept, temperature), scaled(ref_logits, kept, temperature)
    log_p, log_q = torch.log_softmax(x, -1), torch.log_softmax(y, -1)
    logprobs, ref_logprobs = pick(log_p, actions, kept), pick(log_q, actions, kept)
    both_impossible = (logprobs == -torch.inf) & (ref_logprobs == -torch.inf)
    d = torch.where(both_impossible, 0.0, logprobs) - torch.where(both_impossible, 0.0, ref_logprobs)
    if kl == "full":
        value = divergence(log_p, log_q)
    elif kl == "full_reverse":
        value = divergence(log_q, log_p)
    else:
        value = ESTIMATORS[kl](d.clamp(*(log_ratio_clamp or (-torch.inf, torch.inf))))
    result = weighted_kl(
        d,
        value,
        logprobs,
        straight_through=grad == "straight_through",
        log_ratio_clamp=log_ratio_clamp,
        kl_clamp=kl_clamp,
        old_logprobs=None if old_logprobs is None else torch.where(kept, old_logprobs.double(), 0.0),
    )
    outputs = (result.kl, logprobs, ref_logprobs, entropy_of(log_p))
    return TokenKL(
        *(torch.where(kept, output, 0.0) for output in outputs),
        torch.where(kept, d.detach(), 0.0),
        *(result.unclamped, result.weight, x.detach(), y.detach(), kept),
    )
