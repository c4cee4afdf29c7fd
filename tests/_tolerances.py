"""The accuracy the library promises, once: every bound is a tensor of allowed absolute errors, in fp64.

They are the promises for the policy side, not what a backend happens to reach. Where a promise says
"accordingly", the error allowed in d is carried through the estimator.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny


def rounding(truth: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place: what one rounding to ``dtype`` may change."""
    info = torch.finfo(dtype)
    return truth.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def logprob(truth: Tensor) -> Tensor:
    return 4e-7 * (1 + truth.abs())


def entropy(truth: Tensor) -> Tensor:
    return 2e-6 * (1 + truth.abs())


def log_ratio(d: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """1e-6 |d| + 1e-6 times the mean of |x - y| about its mean, over the columns that are finite in both.

    x and y are the logits over the temperature, [..., V].
    """
    finite = x.isfinite() & y.isfinite()
    difference = torch.where(finite, x - y, 0.0)
    columns = finite.sum(-1, keepdim=True).clamp_min(1)
    mean = difference.sum(-1, keepdim=True) / columns
    spread = torch.where(finite, difference - mean, 0.0).abs().sum(-1) / columns.squeeze(-1)
    return 1e-6 * d.abs() + 1e-6 * spread


def estimate(value: object, d: Tensor, d_bound: Tensor) -> Tensor:
    """What ``d_bound`` may change in the estimator ``value`` at ``d``, plus one rounding.

    The estimators are convex, so the change is largest at an end of [d - d_bound, d + d_bound].
    """
    at = value(d)
    either_side = torch.maximum((value(d + d_bound) - at).abs(), (value(d - d_bound) - at).abs())
    return either_side + rounding(at, torch.float32) + SMALLEST


def divergence(truth: Tensor) -> Tensor:
    """Relative 2e-5 for KL in [1e-9, 1e3]. Below, only that it is small, and not negative."""
    return torch.where(truth < 1e-9, 1e-9, 2e-5 * truth)


def gradient(
    truth: Tensor, upstream: Tensor, d: Tensor, temperature: Tensor | float, dtype: torch.dtype
) -> Tensor:
    """2e-6 of the row's largest |truth| + 4e-7 sum |upstream| (1 + |d|), and one rounding to ``dtype``.

    truth [..., V]; upstream, the sum of |upstream gradients|, and d are [...]. The promise is about logits
    over the temperature; the last step of the chain rule divides by it.
    """
    largest = truth.abs().nan_to_num(nan=0.0, posinf=0.0).amax(-1, keepdim=True)
    per_row = (4e-7 * upstream * (1 + d.abs().nan_to_num(nan=0.0, posinf=0.0)) / temperature).unsqueeze(-1)
    exact = 2e-6 * largest + per_row
    return exact + rounding(truth.abs() + exact, dtype)


def check(name: str, got: Tensor, truth: Tensor, bound: Tensor) -> None:
    """Assert |got - truth| <= bound, and the same NaN and infinities where got's dtype cannot hold truth."""
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, want {list(truth.shape)}"
    target = truth.to(got.dtype)
    value = got.double()
    finite = target.isfinite()
    # beside the largest finite number of the dtype, an allowed error may already round to infinity
    overflow = truth.abs() + bound > torch.finfo(got.dtype).max
    same = (
        (got == target)
        | (got.isnan() & target.isnan())
        | overflow & got.isinf() & (got.sign() == truth.sign())
    )
    same = same | overflow & ((value - truth).abs() <= bound)
    within = (value - truth).abs() <= bound
    good = torch.where(finite & ~overflow, within, same)
    if bool(good.all()):
        return
    bad = (~good).nonzero()
    excess = torch.where(good, 0.0, ((value - truth).abs() / bound).nan_to_num(nan=torch.inf))
    worst = tuple(int(i) for i in bad[excess[tuple(bad.T)].argmax()])
    raise AssertionError(
        f"{name}: {len(bad)} of {got.numel()} elements outside the promise; worst at {list(worst)}: "
        f"got {got[worst].item():.9g}, truth {truth[worst].item():.9g}, error "
        f"{(value[worst] - truth[worst]).item():.3g}, allowed {bound[worst].item():.3g}"
    )
