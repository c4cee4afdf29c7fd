"""What people make of a reward before they optimise it: the transforms that LSC is compared with, and ensembles.

These work on as many numbers as there are outputs, so they are written in PyTorch, in fp64, for every device; only
``lsc`` has kernels of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from lsc_kernels.ops import _checks
from lsc_kernels.ops.lsc_transform import lsc_transform, operand, spread


@dataclass(frozen=True)
class Transform:
    """One way to transform a reward, or to make one reward of an ensemble's."""

    name: str
    formula: str
    source: str
    keeps: str
    loses: str
    function: Callable[..., Tensor] = field(repr=False, compare=False)

    @property
    def options(self) -> Mapping[str, object]:
        """Its options with their defaults; ``inspect.Parameter.empty`` is one that must be given."""
        parameters = inspect.signature(self.function).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def transform_reward(
    reward: Tensor, method: str, *, reference_reward: float | Tensor | None = None, **options: object
) -> Tensor:
    r"""A reward transformed by one of the methods of ``lk.TRANSFORMS``, each with its formula and source there.

    With :math:`z = (r - r_\mathrm{ref}) / s`, :math:`m` and :math:`d` mean and standard deviation, and :math:`F` the
    distribution of the reward under the base policy:

    ================  =================================================  ==============================================
    method            gives                                              options (defaults)
    ================  =================================================  ==============================================
    ``raw``           :math:`r`
    ``lsc``           :math:`\log(f + (1 - f)\,\sigma(z))`               ``scale`` (1.0), ``floor`` (0.0)
    ``sigmoid``       :math:`\sigma(z)`, PAR                             ``scale`` (1.0)
    ``tanh``          :math:`\tanh z`                                    ``scale`` (1.0)
    ``clip``          :math:`r - r_\mathrm{ref}` within [low, high]      ``low`` (-10.0), ``high`` (10.0)
    ``zscore``        :math:`(r - m) / (d + \epsilon)`                   ``samples``, ``dim`` (None), ``eps`` (1e-4)
    ``minmax``        :math:`(r - \min) / (\max - \min)`                 ``samples``, ``dim`` (None)
    ``quantile``      :math:`F(r)`                                       ``samples``
    ``log_quantile``  :math:`\log F(r)`                                  ``samples``
    ``exp_quantile``  :math:`\mathrm{sign}(t)\, e^{t F(r)}`              ``samples``, ``t`` (10.0)
    ================  =================================================  ==============================================

    Args:
        reward: r, [...]; fp32, bf16, fp16 or fp64.
        method: a name in ``lk.TRANSFORMS``.
        reference_reward: :math:`r_\mathrm{ref}`, a float or a tensor that broadcasts. ``lsc``, ``sigmoid`` and ``tanh``
            need it, ``clip`` takes 0 without it, the others do not use it.
        options: of the method. ``samples`` are rewards of the base policy. ``zscore`` and ``minmax`` take their
            statistics from them, or without them from ``reward`` itself, over the dimension ``dim`` (None: over all);
            where all are equal, ``minmax`` gives 0.
            The quantile methods need them, [..., n]: the last dimension are n samples, the others broadcast against
            ``reward``; F is piecewise linear through :math:`F(x_{(i)}) = i / (n + 1)`, takes the middle of a tie, and
            is constant beyond the samples, so that its logarithm is finite. NaN is a missing sample.

    Returns:
        [...], fp32 (fp64 if an input is fp64); computed in fp64 inside. A NaN reward gives NaN.

    Gradients:
        By autograd, to ``reward`` and every other tensor but ``floor``; also through the statistics.

    Raises:
        TypeError: an argument of the wrong type, an option that the method does not have, or one it needs.
        ValueError: an unknown method, a missing reference reward, shapes that do not broadcast, a ``dim`` that is not
            there, a ``scale`` that is not positive, ``low`` above ``high``, a negative ``eps``, no samples, ``t`` = 0.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> reward = torch.tensor([-4.0, 0.0, 4.0])
        >>> for method in ("lsc", "sigmoid", "tanh"):
        ...     print(method, [round(x, 3) for x in lk.transform_reward(reward, method, reference_reward=0.0).tolist()])
        lsc [-4.018, -0.693, -0.018]
        sigmoid [0.018, 0.5, 0.982]
        tanh [-0.999, 0.0, 0.999]
        >>> base = torch.tensor([-2.0, -1.0, 1.0, 2.0])
        >>> [round(x, 3) for x in lk.transform_reward(reward, "quantile", samples=base).tolist()]
        [0.2, 0.5, 0.8]
    """
    _checks.floating("reward", reward)
    return _apply(TRANSFORMS, method, options, reward, reference_reward)


def ensemble_reward(scores: Tensor, method: str = "mean", **options: object) -> Tensor:
    r"""One reward from the scores of an ensemble of M reward models, by one of the methods of ``lk.ENSEMBLES``.

    The members judge the same property, so this is done before the transform. Several properties are
    :func:`aggregate_rewards`'s.

    =======================  =========================================================  ==========================
    method                   gives                                                      options
    =======================  =========================================================  ==========================
    ``mean``                 :math:`\frac{1}{M} \sum_i r_i`
    ``worst_case``           :math:`\min_i r_i`
    ``mean_minus_variance``  :math:`m - \lambda \frac{1}{M} \sum_i (r_i - m)^2`         ``penalty``: :math:`\lambda`
    =======================  =========================================================  ==========================

    Args:
        scores: [..., M], each member's scores, of one scale; fp32, bf16, fp16 or fp64.
        method: a name in ``lk.ENSEMBLES``.
        options: of the method.

    Returns:
        [...], fp32 (fp64 for fp64); computed in fp64 inside.

    Gradients:
        By autograd, to ``scores``. The worst case's goes to the smallest, shared among equals.

    Raises:
        TypeError: an argument of the wrong type, an option that the method does not have, or one it needs.
        ValueError: an unknown method, no member, a negative ``penalty``.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> lk.ensemble_reward(scores, "mean_minus_variance", penalty=0.5).item()
        1.6666666269302368
    """
    _checks.floating("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must be [..., M] with M > 0; got {list(scores.shape)}")
    return _apply(ENSEMBLES, method, options, scores)


def _apply(
    table: Mapping[str, Transform], name: str, options: Mapping[str, object], *inputs: object
) -> Tensor:
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"method must be one of {', '.join(table)}; got {name!r}")
    known = table[name].options
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise TypeError(f"{name} {has}; got {option!r}")
    for option, default in known.items():
        if default is inspect.Parameter.empty and options.get(option) is None:
            raise TypeError(f"{name} needs {option}")
    left_out = {option: default for option, default in _number_defaults(name) if option not in options}
    return table[name].function(*inputs, **left_out, **options)


def _number_defaults(name: str) -> tuple[tuple[str, float], ...]:
    known = {**TRANSFORMS, **ENSEMBLES}[name].options
    return tuple((option, default) for option, default in known.items() if isinstance(default, float))


# torch.compile takes the answer. Of a function that it finds in a table it makes the defaults inputs of the graph.
_number_defaults._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _like(result: Tensor, *inputs: object) -> Tensor:
    fp64 = any(isinstance(value, Tensor) and value.dtype is torch.float64 for value in inputs)
    return result if fp64 else result.float()


def _raw(reward: Tensor, reference_reward: object) -> Tensor:
    return _like(reward.double(), reward)


def _needed(method: str, reference_reward: float | Tensor | None) -> float | Tensor:
    if reference_reward is None:
        raise ValueError(f"reference_reward: {method} needs one, a float or a tensor; got None")
    return reference_reward


def _lsc(
    reward: Tensor,
    reference_reward: float | Tensor | None,
    *,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
) -> Tensor:
    return lsc_transform(reward, _needed("lsc", reference_reward), scale=scale, floor=floor)


def _centred(
    method: str, reward: Tensor, reference_reward: float | Tensor | None, scale: float | Tensor
) -> Tensor:
    """z in fp64."""
    given = {"reference_reward": _needed(method, reference_reward), "scale": scale}
    checked = {name: operand(name, value, reward.device) for name, value in given.items()}
    reward, operands = spread("reward", reward, checked)
    reference, scale = (value.double() if isinstance(value, Tensor) else value for value in operands)
    return (reward.double() - reference) / scale


def _sigmoid(
    reward: Tensor, reference_reward: float | Tensor | None, *, scale: float | Tensor = 1.0
) -> Tensor:
    z = _centred("sigmoid", reward, reference_reward, scale)
    return _like(torch.sigmoid(z), reward, reference_reward, scale)


def _tanh(reward: Tensor, reference_reward: float | Tensor | None, *, scale: float | Tensor = 1.0) -> Tensor:
    z = _centred("tanh", reward, reference_reward, scale)
    return _like(torch.tanh(z), reward, reference_reward, scale)


def _clip(
    reward: Tensor, reference_reward: float | Tensor | None, *, low: float = -10.0, high: float = 10.0
) -> Tensor:
    low, high = _checks.interval("low, high", (low, high))
    z = _centred("clip", reward, 0.0 if reference_reward is None else reference_reward, 1.0)
    return _like(z.clamp(low, high), reward, reference_reward)


def _statistics_of(reward: Tensor, samples: object, dim: object) -> Tensor:
    """What mean, deviation, minimum and maximum are taken of."""
    found = reward if samples is None else _checks.floating("samples", samples)
    _checks.same_device("samples", found, "reward", reward.device)
    if samples is not None and found.numel() == 0:
        raise ValueError(f"samples must not be empty; got {list(found.shape)}")
    if dim is None:
        return found.double()
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an int or None; got {type(dim).__name__}")
    if not -found.dim() <= dim < found.dim():
        raise ValueError(f"dim must be one of the {found.dim()} dimensions of {list(found.shape)}; got {dim}")
    if samples is not None:
        kept = list(found.shape)
        kept[dim] = 1
        try:
            torch.broadcast_shapes(reward.shape, kept)
        except RuntimeError:
            raise ValueError(
                f"samples must broadcast against reward, {list(reward.shape)}, once dim {dim} is 1; "
                f"got {list(found.shape)}"
            ) from None
    return found.double()


def _zscore(
    reward: Tensor,
    reference_reward: object,
    *,
    samples: Tensor | None = None,
    dim: int | None = None,
    eps: float = 1e-4,
) -> Tensor:
    wide, eps = reward.double(), _checks.number("eps", eps)
    over = _statistics_of(wide, samples, dim)
    if eps < 0:
        raise ValueError(f"eps must be >= 0; got {eps}")
    if over.numel() == 0:
        return _like(wide, reward)
    if (over.numel() if dim is None else over.shape[dim]) < 2:
        raise ValueError(
            f"zscore needs two rewards or more for a deviation; got {list(over.shape)}, dim={dim}"
        )
    mean, deviation = over.mean(dim, keepdim=dim is not None), over.std(dim, keepdim=dim is not None)
    return _like((wide - mean) / (deviation + eps), reward, samples)


def _minmax(
    reward: Tensor, reference_reward: object, *, samples: Tensor | None = None, dim: int | None = None
) -> Tensor:
    wide = reward.double()
    over = _statistics_of(wide, samples, dim)
    if over.numel() == 0:
        return _like(wide, reward)
    if dim is None:
        low, high = over.min(), over.max()
    else:
        low, high = over.amin(dim, keepdim=True), over.amax(dim, keepdim=True)
    span = torch.where(high > low, high - low, 1.0)
    return _like((wide - low) / span, reward, samples)


def _distribution(reward: Tensor, samples: object) -> Tensor:
    """F(reward) in fp64."""
    found = _checks.floating("samples", samples)
    _checks.same_device("samples", found, "reward", reward.device)
    if found.dim() == 0 or found.shape[-1] == 0:
        raise ValueError(f"samples must be [..., n] with n > 0; got {list(found.shape)}")
    try:
        shape = torch.broadcast_shapes(reward.shape, found.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"samples must be [..., n], broadcasting against reward, {list(reward.shape)}; "
            f"got {list(found.shape)}"
        ) from None
    n, own = found.shape[-1], found.shape[:-1]
    missing = found.isnan()
    count = n - missing.sum(-1)
    points = found.double().masked_fill(missing, math.inf).sort(-1).values  # what is missing comes last
    at = reward.double().expand(shape)
    # many rewards against the same samples share one row of points
    if own.numel() == 1:
        points, at, count = points.reshape(n), at.reshape(-1), count.reshape(())
    elif own[-1] == 1:
        points = points.squeeze(-2).expand(*shape[:-1], n).contiguous()
    else:
        points, at = points.expand(*shape, n).contiguous(), at.unsqueeze(-1)
        count = count.expand(shape).unsqueeze(-1)
    at = at.contiguous()
    below = torch.searchsorted(points, at.detach()).minimum(count)
    upto = torch.searchsorted(points, at.detach(), right=True).minimum(count)
    left = points.gather(-1, (upto - 1).clamp_min(0))
    right = points.gather(-1, upto.clamp_max(n - 1))
    inside = (upto > 0) & (upto < count)
    endless = left.isinf()  # then the sample above is near, unless it is as far
    begin = torch.where(endless, at.detach(), left)
    share = (at - begin) / torch.where(inside, right - left, 1.0)
    share = torch.where(inside, share + endless * torch.where(right.isinf(), 0.5, 1.0), 0.0)
    rank = torch.where(below < upto, (below + 1 + upto) / 2.0, upto.clamp_min(1) + share)
    undefined = at.isnan() | (count == 0)
    return torch.where(undefined, math.nan, rank.minimum(count) / (count + 1)).reshape(shape)


def _quantile(reward: Tensor, reference_reward: object, *, samples: Tensor) -> Tensor:
    return _like(_distribution(reward, samples), reward, samples)


def _log_quantile(reward: Tensor, reference_reward: object, *, samples: Tensor) -> Tensor:
    return _like(_distribution(reward, samples).log(), reward, samples)


def _exp_quantile(reward: Tensor, reference_reward: object, *, samples: Tensor, t: float = 10.0) -> Tensor:
    t = _checks.number("t", t)
    if t == 0:
        raise ValueError("t must not be 0: every reward would be the same")
    exponential = torch.exp(t * _distribution(reward, samples))
    return _like(exponential if t > 0 else -exponential, reward, samples)


def _mean(scores: Tensor) -> Tensor:
    return _like(scores.double().mean(-1), scores)


def _worst_case(scores: Tensor) -> Tensor:
    return _like(scores.double().amin(-1), scores)


def _mean_minus_variance(scores: Tensor, *, penalty: float) -> Tensor:
    penalty = _checks.number("penalty", penalty)
    if penalty < 0:
        raise ValueError(f"penalty must be >= 0; got {penalty}")
    exact = scores.double()
    return _like(exact.mean(-1) - penalty * exact.var(-1, correction=0), scores)


def _table(*transforms: Transform) -> Mapping[str, Transform]:
    return MappingProxyType({each.name: each for each in transforms})


_FU = "J. Fu et al., Reward Shaping to Mitigate Reward Hacking in RLHF (2025), arXiv:2502.18770"
_BALASHANKAR = (
    "A. Balashankar et al., InfAlign: Inference-aware language model alignment (2024), arXiv:2412.19792"
)
_COSTE = "T. Coste et al., Reward Model Ensembles Help Mitigate Overoptimization (2023), arXiv:2310.02743"

TRANSFORMS: Mapping[str, Transform] = _table(
    Transform(
        name="raw",
        formula="r",
        source="L. Ouyang et al., Training language models to follow instructions (2022), arXiv:2203.02155",
        keeps="order and differences: log-odds of preference",
        loses="any end to improvement: in a sum, one property can pay for all others",
        function=_raw,
    ),
    Transform(
        name="lsc",
        formula="log(f + (1 - f) sigmoid((r - r_ref) / s))",
        source="Z. Wang et al., Transforming and Combining Rewards (2024), arXiv:2402.00742",
        keeps="order; a sum is the log-probability that all properties are good; a slope of 1/s far below r_ref",
        loses="differences far above r_ref, by intent; a bound from below, without a floor",
        function=_lsc,
    ),
    Transform(
        name="sigmoid",
        formula="sigmoid((r - r_ref) / s)",
        source=_FU + " (PAR)",
        keeps="order; bounds 0 and 1; the probability of beating the reference",
        loses="the slope far below r_ref, so that the worst outputs are left alone; a sum is a count, not an AND",
        function=_sigmoid,
    ),
    Transform(
        name="zscore",
        formula="(r - mean) / (std + eps)",
        source="Z. Shao et al., DeepSeekMath (2024), arXiv:2402.03300 (GRPO, within a group)",
        keeps="order within what it is normalised over; no units",
        loses="the level: a group of good outputs looks like a group of bad ones; undoes LSC's saturation",
        function=_zscore,
    ),
    Transform(
        name="clip",
        formula="min(max(r - r_ref, low), high)",
        source=_FU + " (as a baseline); the default limits are OpenRLHF's",
        keeps="order and differences between the limits; bounds",
        loses="all slope outside of them",
        function=_clip,
    ),
    Transform(
        name="minmax",
        formula="(r - min) / (max - min)",
        source=_FU + " (as a baseline)",
        keeps="order; bounds 0 and 1 on the samples",
        loses="the level; one outlier decides what all other differences count",
        function=_minmax,
    ),
    Transform(
        name="tanh",
        formula="tanh((r - r_ref) / s)",
        source=_FU + " (as an alternative to the sigmoid)",
        keeps="order; bounds -1 and 1; is 2 sigmoid(2 z) - 1",
        loses="the slope on both sides, twice as fast as the sigmoid",
        function=_tanh,
    ),
    Transform(
        name="quantile",
        formula="F(r), F the distribution of r under the base policy",
        source=_BALASHANKAR + " (the calibrated reward)",
        keeps="order; bounds; what any increasing function of r leaves alone: the win rate over the base policy",
        loses="how much better; everything beyond the best of n samples",
        function=_quantile,
    ),
    Transform(
        name="log_quantile",
        formula="log F(r)",
        source="A. Amini et al., Variational Best-of-N Alignment (2024), arXiv:2407.06057",
        keeps="order; its KL-regularised optimum is pi_0 F^(1/gamma), which stands in for best-of-n",
        loses="everything beyond the best of n samples; needs samples for each prompt",
        function=_log_quantile,
    ),
    Transform(
        name="exp_quantile",
        formula="sign(t) exp(t F(r))",
        source=_BALASHANKAR + " (InfAlign-CTRL)",
        keeps="order; weight on the top quantiles for t > 0 (best-of-n decoding), on the bottom for t < 0",
        loses="differences in the other half; everything beyond the best of n samples",
        function=_exp_quantile,
    ),
)
"""The transforms of :func:`transform_reward` by name."""

ENSEMBLES: Mapping[str, Transform] = _table(
    Transform(
        name="mean",
        formula="(1/M) sum_i r_i",
        source=_COSTE,
        keeps="the scale; less noise than one member",
        loses="disagreement: a hack that one member falls for still pays",
        function=_mean,
    ),
    Transform(
        name="worst_case",
        formula="min_i r_i",
        source=_COSTE + " (worst-case optimisation)",
        keeps="every member's veto",
        loses="the scale: lower the more members there are; noisy, one member decides",
        function=_worst_case,
    ),
    Transform(
        name="mean_minus_variance",
        formula="mean_i r_i - lambda var_i r_i",
        source=_COSTE + " (uncertainty-weighted optimisation)",
        keeps="the mean where members agree",
        loses="order: a far better output on which the members differ may fall behind",
        function=_mean_minus_variance,
    ),
)
"""The ensembles of :func:`ensemble_reward` by name."""
