"""One utility from the scores of several properties, by a formula that says which outputs are good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.formula import Formula, compile_formula
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.lsc_transform import (
    operand,
    save_operands,
    saved_operands,
    spread,
    tensors,
    wants_grad,
)

MISSING = ("propagate", "ignore", "raise")


def check_properties(
    properties: int, names: Sequence[str] | None, missing: str, device: torch.device
) -> tuple[str, ...] | None:
    """Check the options that say what the K properties are; the names."""
    if properties == 0:
        raise ValueError("scores must be [..., K] with K > 0: there is no property to aggregate")
    if missing not in MISSING:
        raise ValueError(f"missing must be one of {', '.join(MISSING)}; got {missing!r}")
    if missing == "raise" and device.type != "cpu":
        raise ValueError(
            f"missing='raise' looks at values, so it works on the CPU only; got scores on {device}. "
            "Use 'propagate' or 'ignore'."
        )
    if names is None:
        return None
    # not a set, whose order is another in each process
    strings = isinstance(names, Sequence) and not isinstance(names, str)
    if not strings or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of strings, as a list; got {names!r}")
    if len(names) != properties:
        raise ValueError(f"names must have K = {properties} entries, one per property; got {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError(f"names must differ from one another; got {list(names)}")
    return tuple(names)


class Logic(NamedTuple):
    """What a formula asks of the backends."""

    program: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    """Those it reads; None is all."""
    weights: Tensor | None
    """With its exponents."""


def logic_of(
    formula: Formula | str | None, names: tuple[str, ...] | None, scores: Tensor, weights: Tensor | None
) -> Logic:
    """A formula as the backends take it, for ``scores`` [..., K]. The AND of all columns is no formula."""
    if weights is not None:
        _check_weights(weights, formula is not None)
    if formula is None:
        return Logic(None, None, weights)
    compiled = compile_formula(formula.text if isinstance(formula, Formula) else formula, names)
    columns, last = scores.shape[-1], max(compiled.columns)
    if last >= columns:
        raise ValueError(
            f"formula reads column {last}, but scores has K = {columns}, from 0 to {columns - 1}"
        )
    if compiled.exponents is not None:
        dtype = torch.float64 if scores.dtype is torch.float64 else torch.float32
        exponents = torch.ones(columns, dtype=dtype, device=scores.device)
        for column, exponent in zip(compiled.columns, compiled.exponents, strict=True):
            exponents[column].fill_(exponent)
        weights = exponents if weights is None else weights * exponents
    if compiled.plain and len(compiled.columns) == columns:
        return Logic(None, None, weights)
    return Logic(compiled.program, compiled.columns, weights)


def _check_weights(weights: Tensor, with_formula: bool) -> None:
    """Check the values of weights, on the CPU only: no host wait."""
    if not _checks.has_values(weights):
        return
    low, high = (extreme.item() for extreme in torch.aminmax(weights.detach()))
    if not (-math.inf < low and high < math.inf):
        raise ValueError(f"weights must be finite; got {weights[~weights.isfinite()][0].item()}")
    if with_formula and low < 0:
        raise ValueError(f"weights must be >= 0 with a formula; got {low}")


def check_present(scores: Tensor, columns: Sequence[int] | None) -> None:
    """``missing="raise"``. In a compiled graph the error is a RuntimeError: the graph knows no other."""
    missing = scores.isnan()
    if columns is not None:
        unread = [column for column in range(scores.shape[-1]) if column not in columns]
        missing[..., unread] = False
    message = "scores has NaN (a missing score), and missing='raise' forbids it"
    if torch.compiler.is_compiling():
        torch._assert_async(~missing.any(), message)
    elif missing.any():
        first = missing.nonzero()[0].tolist()
        raise ValueError(f"{message}; the first is scores{first}")


def aggregate_rewards(
    scores: Tensor,
    reference_reward: float | Tensor,
    *,
    formula: Formula | str | None = None,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
    missing: str = "propagate",
) -> Tensor:
    r"""The log-probability that an output is good: that K properties, judged independently, satisfy a formula.

    .. math:: u = \log P(\text{formula}), \qquad
        \log p_k = w_k \log\bigl(f_k + (1 - f_k)\,\sigma((r_k - r_{\mathrm{ref},k}) / s_k)\bigr)

    Without a formula, all of the properties are wanted, and :math:`u = \sum_k \log p_k`.

    Args:
        scores: r, [..., K]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        reference_reward: :math:`r_\mathrm{ref}`; a float or a tensor that broadcasts against ``scores``.
        formula: which outputs are good: a :class:`Formula`, as ``lk.prop("helpful") & ~lk.prop("verbose")`` makes
            one, or a string that says the same, ``"helpful & ~verbose"``. ``&``, ``|``, ``~``, :func:`at_least`,
            :func:`weakest`, and ``**`` for an exponent; at most 32 properties, by their names in ``names`` or their
            column numbers. Columns that it does not mention count for nothing. None is all of the properties.
        names: K names, one per property; they must differ.
        weights: w, a tensor that broadcasts against ``scores``: the exponent on each property's probability, times the
            formula's own. A property with weight 0 counts as certainly good, even where its score is -inf or NaN.
            None is 1. Finite; with a formula, not negative.
        scale: s > 0, each reward model's Bradley-Terry temperature; a float or a tensor that broadcasts.
        floor: f in [0, 1), the rate at which each judge is wrong; a float or a tensor that broadcasts.
        missing: what a NaN score means. ``propagate``: the utility is NaN. ``ignore``: the property counts as
            certainly good, so that ``~`` of it is certainly false, with a utility of -inf. ``raise``: an error (CPU
            only).

    Returns:
        u [...], fp32 (fp64 if an input is fp64), in nats.

    Gradients:
        To ``scores``, ``reference_reward``, ``scale`` and ``weights``, each in its dtype. Under :func:`weakest` only to
        the least probable. 0 where a property is certain. First derivative only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a formula that does not parse (the message points at the character), or that names a property which
            ``names`` does not have, or a column which ``scores`` does not have; no property, shapes that do not
            broadcast, devices that differ, a ``scale`` that is not finite and positive, a ``floor`` outside [0, 1) or
            that requires grad, ``weights`` that are not finite, or negative with a formula, names that do not fit, an
            unknown ``missing``; NaN scores with ``missing="raise"``, in columns that the formula reads. Tensors' values
            are checked on the CPU only.

    Source:
        Z. Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models" (2024),
        arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> scores = torch.tensor([[2.0, -1.0], [0.5, 0.5]])  # helpful, harmless
        >>> u = lk.aggregate_rewards(scores, torch.tensor([0.0, 0.0]), names=["helpful", "harmless"])
        >>> [round(x, 4) for x in u.tolist()]
        [-1.4402, -0.9482]
        >>> formula = lk.prop("helpful") & ~lk.prop("verbose")
        >>> u = lk.aggregate_rewards(scores, 0.0, formula=formula, names=["helpful", "verbose"])
        >>> [round(x, 4) for x in u.tolist()]
        [-0.4402, -1.4482]
        >>> torch.equal(u, lk.aggregate_rewards(scores, 0.0, formula="0 & ~1"))
        True
    """
    _checks.floating("scores", scores)
    if scores.dim() == 0:
        raise ValueError("scores must be [..., K]; got a scalar")
    device = scores.device
    columns = scores.shape[-1]
    names = check_properties(columns, names, missing, device)
    reference_reward = operand("reference_reward", reference_reward, device)
    scale = operand("scale", scale, device)
    floor = operand("floor", floor, device)
    if weights is not None:
        _checks.floating("weights", weights)
        _checks.same_device("weights", weights, "scores", device)
    program, read, weights = logic_of(formula, names, scores, weights)
    operands = {"reference_reward": reference_reward, "scale": scale, "floor": floor, "weights": weights}
    scores, (reference_reward, scale, floor, weights) = spread("scores", scores, operands)
    if scores.shape[-1] != columns:
        raise ValueError(
            "scores must have one column per property: what is broadcast against it has "
            f"{scores.shape[-1]}; got {columns}"
        )
    if missing == "raise":
        check_present(scores, read)

    kernels = select("aggregate_rewards", scores, reference_reward, scale, floor, weights)
    ignore_missing = missing == "ignore"
    if wants_grad(scores, reference_reward, scale, weights):
        call = (kernels, floor, ignore_missing, program)
        result: Tensor = _apply(call, scores, reference_reward, scale, weights)
    else:
        result = kernels.forward(scores, reference_reward, scale, floor, weights, ignore_missing, program)
    return result


class _AggregateRewards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, float | Tensor, bool, tuple[int, ...] | None],
        scores: Tensor,
        reference_reward: float | Tensor,
        scale: float | Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        kernels, floor, ignore_missing, program = call
        ctx.call = kernels, ignore_missing, program
        save_operands(ctx, scores, reference_reward, scale, floor, weights)
        result: Tensor = kernels.forward(
            scores, reference_reward, scale, floor, weights, ignore_missing, program
        )
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operands = saved_operands(ctx)
        kernels, *options = ctx.call
        with torch.no_grad():
            gradients = kernels.backward(grad, *operands, *options, *ctx.needs_input_grad[2:])
        sources = (grad, *tensors(*operands))
        return None, *(first_derivative("aggregate_rewards", each, *sources) for each in gradients)


_apply = quick_apply(_AggregateRewards)
