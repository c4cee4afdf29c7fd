"""One utility from the scores of several properties."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative
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
    properties: int, formula: object, names: Sequence[str] | None, missing: str, device: torch.device
) -> None:
    """Check the options that say how K properties make one utility."""
    if properties == 0:
        raise ValueError("scores must be [..., K] with K > 0: there is no property to aggregate")
    if formula is not None:
        raise ValueError(f"formula: this version has only None (all properties); got {formula!r}")
    if names is not None:
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names must be a sequence of strings; got {names!r}")
        if len(names) != properties:
            raise ValueError(f"names must have K = {properties} entries, one per property; got {len(names)}")
        if len(set(names)) != len(names):
            raise ValueError(f"names must differ from one another; got {list(names)}")
    if missing not in MISSING:
        raise ValueError(f"missing must be one of {', '.join(MISSING)}; got {missing!r}")
    if missing == "raise" and device.type != "cpu":
        raise ValueError(
            f"missing='raise' looks at values, so it works on the CPU only; got scores on {device}. "
            "Use 'propagate' or 'ignore'."
        )


def check_present(scores: Tensor) -> None:
    """``missing="raise"``. In a compiled graph the error is a RuntimeError: the graph knows no other."""
    message = "scores has NaN (a missing score), and missing='raise' forbids it"
    if torch.compiler.is_compiling():
        torch._assert_async(~scores.isnan().any(), message)
    elif scores.isnan().any():
        first = scores.isnan().nonzero()[0].tolist()
        raise ValueError(f"{message}; the first is scores{first}")


def aggregate_rewards(
    scores: Tensor,
    reference_reward: float | Tensor,
    *,
    formula: object = None,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
    missing: str = "propagate",
) -> Tensor:
    r"""The log-probability that an output has every one of K properties, which are judged independently.

    .. math:: u = \sum_k w_k \log\bigl(f_k + (1 - f_k)\,\sigma((r_k - r_{\mathrm{ref},k}) / s_k)\bigr)

    Args:
        scores: r, [..., K]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        reference_reward: :math:`r_\mathrm{ref}`; a float or a tensor that broadcasts against ``scores``.
        formula: only None, all of the properties, in this version.
        names: K names, one per property; they must differ.
        weights: w, a tensor that broadcasts against ``scores``: the exponent on each property's probability.
            A property with weight 0 counts for nothing, even where its score is -inf or NaN. None is 1.
        scale: s > 0, each reward model's Bradley-Terry temperature; a float or a tensor that broadcasts.
        floor: f in [0, 1), the rate at which each judge is wrong; a float or a tensor that broadcasts.
        missing: what a NaN score means. ``propagate``: the utility is NaN. ``ignore``: the property counts as
            certainly good. ``raise``: an error (CPU only).

    Returns:
        u [...], fp32 (fp64 if an input is fp64), in nats.

    Gradients:
        To ``scores``, ``reference_reward``, ``scale`` and ``weights``, each in its dtype. First derivative
        only.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: no property, shapes that do not broadcast, devices that differ, a ``scale`` that is not
            finite and positive, a ``floor`` outside [0, 1) or that requires grad, names that do not fit, an
            unknown ``missing``, a formula; NaN scores with ``missing="raise"``.

    Source:
        Z. Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models" (2024),
        arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> scores = torch.tensor([[2.0, -1.0], [0.5, 0.5]])  # helpful, harmless
        >>> u = lk.aggregate_rewards(scores, torch.tensor([0.0, 0.0]), names=["helpful", "harmless"])
        >>> [round(x, 4) for x in u.tolist()]
        [-1.4402, -0.9482]
    """
    _checks.floating("scores", scores)
    if scores.dim() == 0:
        raise ValueError("scores must be [..., K]; got a scalar")
    device = scores.device
    check_properties(scores.shape[-1], formula, names, missing, device)
    reference_reward = operand("reference_reward", reference_reward, device)
    scale = operand("scale", scale, device)
    floor = operand("floor", floor, device)
    if weights is not None:
        _checks.floating("weights", weights)
        _checks.same_device("weights", weights, "scores", scores)
    given = tensors(reference_reward, scale, floor, weights)
    if given:
        operands = {"reference_reward": reference_reward, "scale": scale, "floor": floor, "weights": weights}
        columns = scores.shape[-1]
        scores, (reference_reward, scale, floor, weights) = spread("scores", scores, operands)
        if scores.shape[-1] != columns:
            raise ValueError(
                "scores must have one column per property: what is broadcast against it has "
                f"{scores.shape[-1]}; got {columns}"
            )
        given = tensors(reference_reward, scale, floor, weights)
    if missing == "raise":
        check_present(scores)

    kernels = select("aggregate_rewards", scores, *given)
    arguments = (scores, reference_reward, scale, floor, weights, missing == "ignore")
    if wants_grad(*arguments):
        result: Tensor = _AggregateRewards.apply(kernels, *arguments)
    else:
        result = kernels.forward(*arguments)
    return result


class _AggregateRewards(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        scores: Tensor,
        reference_reward: float | Tensor,
        scale: float | Tensor,
        floor: float | Tensor,
        weights: Tensor | None,
        ignore_missing: bool,
    ) -> Tensor:
        ctx.kernels, ctx.ignore_missing = kernels, ignore_missing
        save_operands(ctx, scores, reference_reward, scale, floor, weights)
        result: Tensor = kernels.forward(scores, reference_reward, scale, floor, weights, ignore_missing)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        operands = saved_operands(ctx)
        _, _, want_reference, want_scale, _, want_weights, _ = ctx.needs_input_grad
        with torch.no_grad():
            gradients = ctx.kernels.backward(
                grad, *operands, ctx.ignore_missing, want_reference, want_scale, want_weights
            )
        sources = (grad, *tensors(*operands))
        to_scores, to_reference, to_scale, to_weights = (
            first_derivative("aggregate_rewards", each, *sources) for each in gradients
        )
        return None, to_scores, to_reference, to_scale, None, to_weights, None
