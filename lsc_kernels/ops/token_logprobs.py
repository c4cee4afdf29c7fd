"""Log-probability of the sampled action and entropy of the policy, from one read of the logits."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply


class TokenLogprobs(NamedTuple):
    r"""Outputs of :func:`token_logprobs`: each of the shape of ``actions``, fp32 (fp64 for fp64 logits), in nats.

    Where ``mask`` or an action of -100 leaves a position out, each is 0 and sends no gradient.

    Attributes:
        logprobs: :math:`\log p_a`. Differentiable in ``logits``.
        entropy: :math:`-\sum_v p_v \log p_v`. Differentiable in ``logits``.
    """

    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor,
    actions: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    process_group: object = None,
) -> TokenLogprobs:
    r"""Log-probabilities of the actions and the entropy, in one read of the logits.

    With :math:`p = \mathrm{softmax}(x / \tau)`, returns :math:`\log p_a` and :math:`-\sum_v p_v \log p_v`.

    Args:
        logits: x, [..., V]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        actions: a, [...], int64 or int32 ids in [0, V). ``-100`` leaves a position out.
        temperature: :math:`\tau` > 0, a float or a tensor [...]; not differentiated.
        mask: [...], bool, int or float; nonzero positions count, the others give 0 and get exactly zero gradient.
        process_group: not in this version; must be None.

    Returns:
        ``TokenLogprobs(logprobs, entropy)``, each [...], fp32 (fp64 for fp64 logits), in nats. The forward pass makes
        no [..., V] tensor. A column at -inf counts for nothing; a row with NaN or +inf, or all -inf, is NaN.

    Gradients:
        To ``logits``, in its dtype: :math:`\partial \log p_a / \partial x_v = (1[v=a] - p_v) / \tau`,
        :math:`\partial H / \partial x_v = -p_v (\log p_v + H) / \tau`. First derivative only.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not match, devices that differ, a temperature that is not finite and positive.
        IndexError: an action outside [0, V), on the CPU; on a GPU that row is NaN.

    Source:
        The definitions of both. A normaliser from one read of a row: M. Milakov and N. Gimelshein, "Online normalizer
        calculation for softmax" (2018), arXiv:1805.02867.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> out = lk.token_logprobs(logits, torch.tensor([2]))
        >>> [round(x.item(), 4) for x in out]
        [-1.3863, 1.3863]
    """
    _checks.floating("logits", logits)
    _checks.integer("actions", actions)
    rows, device = _checks.rows_of("logits", logits), logits.device
    _checks.like("actions", actions, rows, "logits without its last dimension", "logits", device)
    counted = None if mask is None else _checks.counted("mask", mask, rows, "actions", device)
    temperature = _checks.temperature(temperature, actions, counted, device)
    _checks.no_process_group(process_group)

    kernels = select("token_logprobs", logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return TokenLogprobs(*_apply((kernels, actions, counted, temperature), logits))
    return TokenLogprobs(*kernels.forward(logits, actions, counted, temperature)[:2])


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: tuple[ModuleType, Tensor, Tensor | None, float | Tensor], logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernels, actions, mask, temperature = call
        logprobs, entropy, state = kernels.forward(logits, actions, mask, temperature)
        ctx.set_materialize_grads(False)
        per_row = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(logits, actions, mask, per_row, state)
        ctx.call = kernels, temperature if per_row is None else 1.0
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        logits, actions, mask, per_row, state = ctx.saved_tensors
        kernels, temperature = ctx.call
        with torch.no_grad():
            grad = kernels.backward(
                *(grad_logprobs, grad_entropy, logits, actions, mask),
                *(temperature if per_row is None else per_row, state),
            )
        grad = first_derivative("token_logprobs", grad, grad_logprobs, grad_entropy, logits)
        return None, grad


_apply = quick_apply(_TokenLogprobs)
