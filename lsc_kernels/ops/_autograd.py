"""What the ops' autograd functions share.

Their first argument, ``call``, is a tuple of what no gradient reaches: kernels, options, masks and ids. The tensors
that may have one follow. PyTorch asks of each argument several times whether it is a tensor, and takes longest over
those that are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active


def quick_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for plain eager calls, without the 2 us that it takes to look for functorch's wrappers."""
    plain = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _are_functorch_transforms_active():
            return function.apply(*arguments)
        return plain(*arguments)

    return apply


class _FirstDerivativeOnly(torch.autograd.Function):
    """The identity on a first derivative; differentiating it again raises."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(f"lsc_kernels.{ctx.op} has a first derivative only; it was differentiated twice")


def first_derivative(op: str, gradient: Tensor | None, *sources: Tensor | None) -> Tensor | None:
    """Make ``gradient``, a function of ``sources``, raise a clear error when it is differentiated in its turn.

    Only ``create_graph=True`` turns gradients on in a backward pass; otherwise this returns ``gradient`` as it is.
    """
    if gradient is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient
    result: Tensor = _FirstDerivativeOnly.apply(
        op, gradient, *(source for source in sources if source is not None)
    )
    return result
