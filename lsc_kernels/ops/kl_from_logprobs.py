"""KL estimators from log-probabilities that are already there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply

KINDS = ("k1", "abs", "k2", "k3")

_UNCLAMPED = {
    (kl, grad): KLOptions(kl, grad == "straight_through")
    for kl in (*KINDS, "full", "full_reverse")
    for grad in ("autograd", "straight_through")
}


def kl_options(
    kl: str,
    grad: str,
    log_ratio_clamp: tuple[float, float] | None,
    kl_clamp: tuple[float, float] | None,
    kinds: tuple[str, ...],
) -> KLOptions:
    """Check the options of a KL and put them in the form the backends take."""
    if kl not in kinds:
        hint = "; the full divergences need the logits: use token_kl" if str(kl).startswith("full") else ""
        raise ValueError(f"kl must be one of {', '.join(kinds)}; got {kl!r}{hint}")
    if grad not in ("autograd", "straight_through"):
        raise ValueError(f"grad must be 'autograd' or 'straight_through'; got {grad!r}")
    if log_ratio_clamp is not None and kl.startswith("full"):
        raise ValueError(
            f"log_ratio_clamp acts on the log ratio at the action, which kl={kl!r} does not use; use kl_clamp"
        )
    if log_ratio_clamp is None and kl_clamp is None:
        return _UNCLAMPED[kl, grad]
    return KLOptions(
        kl,
        grad == "straight_through",
        _checks.interval("log_ratio_clamp", log_ratio_clamp),
        _checks.interval("kl_clamp", kl_clamp),
    )


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
) -> Tensor:
    r"""A KL estimator at each token from the two policies' log-probabilities of the action.

    With :math:`d = \log p_a - \log q_a`: ``k1`` d, ``abs`` \|d\|, ``k2`` :math:`d^2/2`, ``k3`` :math:`e^{-d} - 1 + d`.

    Args:
        logprobs: :math:`\log p_a`, [...]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        ref_logprobs: :math:`\log q_a`, of the same shape.
        kl: the kind, see above.
        grad: ``autograd``, or ``straight_through``: the value of ``kl`` with the gradient of ``k2``.
        mask: [...], bool, int or float; nonzero positions count, the others give 0 and get exactly zero gradient.
        log_ratio_clamp: (low, high) on d before anything else.
        kl_clamp: (low, high) on the value. A clamped element has gradient exactly 0.
        old_logprobs: [...]; multiplies the (clamped) value by exp(log p_a - old), gradient included. A constant: it
            gets no gradient itself.

    Returns:
        KL [...], fp32 (fp64 for fp64 input), in nats. Equal log-probabilities give exactly 0.

    Gradients:
        To ``logprobs`` and ``ref_logprobs``, each in its dtype. First derivative only.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not match, devices that differ, an unknown ``kl`` or ``grad``, a bad clamp.

    Source:
        J. Schulman, "Approximating KL Divergence" (2020).

    Example:
        >>> import torch, lsc_kernels as lk
        >>> kl = lk.kl_from_logprobs(torch.tensor([-1.0]), torch.tensor([-1.5]), kl="k3")
        >>> round(kl.item(), 4)
        0.1065
    """
    _checks.floating("logprobs", logprobs)
    _checks.floating("ref_logprobs", ref_logprobs)
    tokens, device = logprobs.shape, logprobs.device
    _checks.like("ref_logprobs", ref_logprobs, tokens, "logprobs", "logprobs", device)
    counted = None if mask is None else _checks.counted("mask", mask, tokens, "logprobs", device)
    if old_logprobs is not None:
        old_logprobs = _checks.old_logprobs(old_logprobs, tokens, "logprobs", device)
    options = kl_options(kl, grad, log_ratio_clamp, kl_clamp, KINDS)

    kernels = select("kl_from_logprobs", logprobs, ref_logprobs, old_logprobs)
    fixed = (counted, old_logprobs, options)
    if torch.is_grad_enabled() and (logprobs.requires_grad or ref_logprobs.requires_grad):
        result: Tensor = _apply((kernels, *fixed), logprobs, ref_logprobs)
    else:
        result = kernels.forward(logprobs, ref_logprobs, *fixed)
    return result


class _KLFromLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, Tensor | None, Tensor | None, KLOptions],
        logprobs: Tensor,
        ref_logprobs: Tensor,
    ) -> Tensor:
        kernels, mask, old_logprobs, options = call
        ctx.save_for_backward(logprobs, ref_logprobs, mask, old_logprobs)
        ctx.call = kernels, options
        result: Tensor = kernels.forward(logprobs, ref_logprobs, mask, old_logprobs, options)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        logprobs, ref_logprobs, mask, old_logprobs = ctx.saved_tensors
        kernels, options = ctx.call
        with torch.no_grad():
            to_logprobs, to_ref = kernels.backward(
                *(grad, logprobs, ref_logprobs, mask, old_logprobs, options),
                *ctx.needs_input_grad[1:3],
            )
        sources = (grad, logprobs, ref_logprobs)
        to_logprobs = first_derivative("kl_from_logprobs", to_logprobs, *sources)
        to_ref = first_derivative("kl_from_logprobs", to_ref, *sources)
        return None, to_logprobs, to_ref


_apply = quick_apply(_KLFromLogprobs)
