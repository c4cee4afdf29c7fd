"""Quantiles of scores, as reference rewards: of the samples of a prompt, and of the others of a group.

In a column of n sorted samples x_0 <= ... <= x_{n-1} the quantile stands at a position between 0 and n - 1:

    linear             (n - 1) q                   NumPy's; the sample minimum and maximum at q = 0 and 1
    median_unbiased    (n + 1/3) q - 2/3           about unbiased in the median, whatever the distribution
    gaussian           mean + z_q std              z_q the standard normal's quantile; std with n - 1

and is interpolated between the two samples beside it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lsc_kernels.ops import _checks

METHODS = ("linear", "median_unbiased", "gaussian")


def check_quantile(q: object, method: str) -> float:
    """Check q and method; returns q as a float."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    q = _checks.number("q", q)
    if method == "gaussian" and not 0 < q < 1:
        raise ValueError(f"q must be inside (0, 1) with method='gaussian'; got {q}")
    if not 0 <= q <= 1:
        raise ValueError(f"q must be in [0, 1]; got {q}")
    return q


def position(count: Tensor, q: float, method: str) -> Tensor:
    """Where the quantile stands among ``count`` sorted samples, from 0; fp64, [0, count - 1], 0 where there is none."""
    count = count.double()
    at = (count - 1) * q if method == "linear" else (count + 1 / 3) * q - 2 / 3
    return at.minimum(count - 1).clamp(min=0)


def between(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    """Interpolate from ``low`` (weight 0) to ``high`` (weight 1); equal ends give themselves, infinite ones too."""
    finite = torch.lerp(low, high, weight)
    infinite = low * (1 - weight) + high * weight
    value = torch.where((high - low).isfinite(), finite, infinite)
    return torch.where((low == high) | (weight == 0), low, value)


def quantile_reference(samples: Tensor, q: float = 0.85, *, method: str = "linear", dim: int = -2) -> Tensor:
    r"""The q-quantile of the scores of a prompt's samples: what is good enough for that prompt.

    Args:
        samples: scores [P, n, K], or any shape with the samples along ``dim``; fp32, bf16, fp16 or fp64, any
            device. NaN is a missing sample and is left out of its column.
        q: the quantile, in [0, 1].
        method: ``linear`` (NumPy's default), ``median_unbiased`` (NumPy's too), or ``gaussian``: mean +
            :math:`z_q` std, q in (0, 1) and at least two samples.
        dim: the dimension of the samples.

    Returns:
        [P, K]: the shape of ``samples`` without ``dim``; fp32 (fp64 for fp64), in units of the score. NaN for a
        column without samples, with ``gaussian`` also for one with a single sample.

    Few samples:
        The result is a random number, and what the same model gives next exceeds it more often than 1 - q. With
        Gaussian scores and q = 0.85, the share that exceeds it, instead of 15%:

        ==================  =====  =====  =====  =====
        samples                 5      8     16     64
        ==================  =====  =====  =====  =====
        linear                25%    23%    19%    16%
        median_unbiased       18%    16%    16%    15%
        gaussian              20%    18%    17%    15%
        ==================  =====  =====  =====  =====

        From 8 samples on ``gaussian`` also scatters least, and it is wrong for skewed rewards: of exponential
        ones 13% lie above mean + z_0.85 std, however many samples there are. ``median_unbiased`` assumes no
        distribution, and scatters most.

    Gradients:
        To the samples: with ``linear`` and ``median_unbiased`` to the two that the quantile lies between, 1 in
        all; to every one with ``gaussian``. 0 for a missing sample. References are usually constants: detach
        them.

    Raises:
        TypeError: ``samples`` is no floating-point tensor, ``dim`` no integer.
        ValueError: no such ``dim``, no sample along it, ``q`` out of range, an unknown ``method``.

    Source:
        R. Hyndman and Y. Fan, "Sample quantiles in statistical packages" (1996): types 7 and 8.

    Example:
        >>> import torch
        >>> from lsc_kernels.reference import quantile_reference
        >>> samples = torch.arange(11.0).reshape(1, 11, 1)  # one prompt, 11 samples, one property
        >>> quantile_reference(samples, 0.85)
        tensor([[8.5000]])
    """
    _checks.floating("samples", samples)
    q = check_quantile(q, method)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int; got {type(dim).__name__}")
    if not -samples.dim() <= dim < samples.dim():
        raise ValueError(
            f"dim {dim}: samples has {samples.dim()} dimensions; wants [P, n, K], or another dim"
        )
    count = samples.shape[dim]
    if count < (2 if method == "gaussian" else 1):
        raise ValueError(
            f"samples must have {'two samples' if method == 'gaussian' else 'a sample'} along dim {dim}; "
            f"got {list(samples.shape)}"
        )
    values = samples.movedim(dim, -1)
    values = values if values.dtype == torch.float64 else values.float()
    if method == "gaussian":
        return _gaussian(values, q)
    ordered = values.sort(-1).values  # NaN last
    at = position((~values.isnan()).sum(-1, keepdim=True), q, method)
    low, high = (ordered.gather(-1, end.long()) for end in (at.floor(), at.ceil()))
    return between(low, high, at.frac().to(values.dtype)).squeeze(-1)


def leave_one_out_quantile(scores: Tensor, q: float = 0.85, *, method: str = "linear") -> Tensor:
    r"""For every response, the q-quantile of the *other* responses to its prompt.

    A response that is part of its own reference pulls the reference towards itself: the best of four beats the
    85% quantile of all four, whatever it is worth. Leaving it out, its reference does not depend on it.

    Args:
        scores: [P, n, K]; fp32, bf16, fp16 or fp64, any device. NaN is a missing score and is left out.
        q: the quantile, in [0, 1].
        method: as in :func:`quantile_reference`.

    Returns:
        [P, n, K]; fp32 (fp64 for fp64). NaN where no other response has a score (with ``gaussian``: fewer than
        two others have). Where the response's own score is missing, the quantile of all that are there.

    Gradients:
        To the other responses' scores, as in :func:`quantile_reference`, and none to the response's own.

    Raises:
        TypeError: ``scores`` is no floating-point tensor.
        ValueError: fewer than two dimensions, ``q`` out of range, an unknown ``method``.

    Example:
        >>> import torch
        >>> from lsc_kernels.reference import leave_one_out_quantile
        >>> scores = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> leave_one_out_quantile(scores, 0.5).flatten().tolist()
        [2.5, 2.0, 1.5]
    """
    _checks.floating("scores", scores)
    q = check_quantile(q, method)
    if scores.dim() < 2:
        raise ValueError(f"scores must be [P, n, K]; got {list(scores.shape)}")
    values = scores.movedim(-2, -1)
    values = values if values.dtype == torch.float64 else values.float()
    if method == "gaussian":
        return _gaussian_of_others(values, q).movedim(-1, -2)
    ordered, order = values.sort(-1)
    there = ~ordered.isnan()
    others = there.sum(-1, keepdim=True) - there.long()
    at = position(others, q, method)
    rank = torch.arange(values.shape[-1], device=values.device)

    def other(place: Tensor) -> Tensor:
        """The sample at a place among the others: those from the left-out one on stand one further."""
        place = place.long()
        place = place + (there & (place >= rank)).long()
        return ordered.gather(-1, place.clamp(max=values.shape[-1] - 1))

    quantile = between(other(at.floor()), other(at.ceil()), at.frac().to(values.dtype))
    quantile = torch.where(others > 0, quantile, math.nan)
    return quantile.gather(-1, order.argsort(-1)).movedim(-1, -2)


def _gaussian(values: Tensor, q: float) -> Tensor:
    """mean + z_q std of the last dimension, without the missing."""
    mean, std = _mean_and_std(values.double(), ~values.isnan())
    return (mean + torch.special.ndtri(mean.new_full((), q)) * std).to(values.dtype)


def _gaussian_of_others(values: Tensor, q: float) -> Tensor:
    n = values.shape[-1]
    others = ~torch.eye(n, dtype=torch.bool, device=values.device) & ~values.isnan().unsqueeze(-2)
    every = values.double().unsqueeze(-2).expand(*values.shape, n)  # [..., i, j]: the group as i's others
    mean, std = _mean_and_std(every, others)
    return (mean + torch.special.ndtri(mean.new_full((), q)) * std).to(values.dtype)


def _mean_and_std(values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension, of what is there; the standard deviation with n - 1, NaN of fewer than two."""
    count = there.sum(-1, keepdim=True)
    # nothing is divided by 0, whose gradient is NaN also where the quotient is not taken
    mean = torch.where(there, values, 0.0).sum(-1, keepdim=True) / count.clamp_min(1)
    square = torch.where(there, values - mean, 0.0).square().sum(-1) / (count - 1).clamp_min(1).squeeze(-1)
    square = torch.where(count.squeeze(-1) > 1, square, math.nan)
    # the square root has no slope at 0: equal samples get none
    root = torch.where(square == 0, 0.0, torch.where(square == 0, 1.0, square).sqrt())
    return mean.squeeze(-1), root
