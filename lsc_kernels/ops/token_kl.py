"""Per-token KL between policy and reference policy, with both log-probabilities and the entropy, from one read."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.ops import _checks
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.kl_from_logprobs import kl_options


class TokenKL(NamedTuple):
    r"""Outputs of :func:`token_kl`: each of the shape of ``actions``, fp32 (fp64 for fp64 logits), in nats.

    Where ``mask`` or an action of -100 leaves a position out, each is 0 and sends no gradient.

    Attributes:
        kl: the kind asked for, after its clamps, times the importance ratio if ``old_logprobs`` were given. Its
            gradient is the one that ``grad`` names.
        logprobs: :math:`\log p_a`, the policy's. Differentiable in ``policy_logits``.
        ref_logprobs: :math:`\log q_a`, the reference's. Differentiable in ``ref_logits``.
        entropy: the policy's, :math:`-\sum_v p_v \log p_v`. Differentiable in ``policy_logits``.
    """

    kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor


KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")


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
    process_group: object = None,
) -> TokenKL:
    r"""KL of the policy from the reference at each token, both log-probabilities and the policy's entropy.

    With :math:`p = \mathrm{softmax}(x/\tau)`, :math:`q = \mathrm{softmax}(y/\tau)`, :math:`d = \log p_a - \log q_a`:

    ================  =====================================================
    ``kl``            value
    ================  =====================================================
    ``k1``            :math:`d`
    ``abs``           :math:`|d|`
    ``k2``            :math:`d^2 / 2`
    ``k3``            :math:`e^{-d} - 1 + d`
    ``full``          :math:`\sum_v p_v (\log p_v - \log q_v)`
    ``full_reverse``  :math:`\sum_v q_v (\log q_v - \log p_v)`
    ================  =====================================================

    Each logit of both models is read once, and the forward pass makes no [..., V] tensor. The result stays accurate
    when the two models nearly agree: it is never negative for ``full``, and exactly 0 for equal logits.

    Args:
        policy_logits: x, [..., V]; fp32, bf16, fp16, or fp64 (computed in fp64). Any strides.
        ref_logits: y, of the same shape; its dtype may differ.
        actions: a, [...], int64 or int32 ids in [0, V). ``-100`` leaves a position out.
        kl: the kind, see above.
        grad: ``autograd``, or ``straight_through``: the value of ``kl`` with the gradient of ``k2``, which is unbiased
            on policy.
        temperature: :math:`\tau` > 0 for both models, a float or a tensor [...]; not differentiated.
        mask: [...], bool, int or float; nonzero positions count, the others give 0 and get exactly zero gradient.
        log_ratio_clamp: (low, high) on d before anything else; only for k1, abs, k2, k3.
        kl_clamp: (low, high) on the value. A clamped element has gradient exactly 0.
        old_logprobs: [...]; multiplies the (clamped) value by exp(log p_a - old), gradient included. A constant: it
            gets no gradient itself. Rounded to fp32 beside logits of fp32 or less.
        process_group: not in this version; must be None.

    Returns:
        ``TokenKL(kl, logprobs, ref_logprobs, entropy)``, each [...], fp32 (fp64 for fp64 input), in nats. A column at
        -inf in both models counts for nothing; at -inf in the reference alone, where p > 0, ``full`` is +inf. A row
        with NaN or +inf, or all -inf, is NaN in that row only.

    Gradients:
        To ``policy_logits``, and to ``ref_logits`` if it requires grad, each in its dtype. First derivative only. Until
        the backward pass ``policy_logits`` are kept, and ``ref_logits`` for the full divergences or their own gradient.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: shapes that do not match, devices that differ, an unknown ``kl`` or ``grad``, a bad clamp, a
            temperature that is not finite and positive.
        IndexError: an action outside [0, V), on the CPU; on a GPU that row is NaN.

    Source:
        The estimators: J. Schulman, "Approximating KL Divergence" (2020).

    Example:
        >>> import torch, lsc_kernels as lk
        >>> policy = torch.tensor([[1.0, 0.0, 0.0]])
        >>> ref = torch.tensor([[0.0, 0.0, 0.0]])
        >>> out = lk.token_kl(policy, ref, torch.tensor([0]), kl="full")
        >>> round(out.kl.item(), 3), round(out.logprobs.item(), 3), round(out.ref_logprobs.item(), 3)
        (0.123, -0.551, -1.099)
    """
    _checks.floating("policy_logits", policy_logits)
    _checks.floating("ref_logits", ref_logits)
    _checks.integer("actions", actions)
    rows, device = _checks.rows_of("policy_logits", policy_logits), policy_logits.device
    _checks.like("ref_logits", ref_logits, policy_logits.shape, "policy_logits", "policy_logits", device)
    meaning = "policy_logits without its last dimension"
    _checks.like("actions", actions, rows, meaning, "policy_logits", device)
    counted = None if mask is None else _checks.counted("mask", mask, rows, "actions", device)
    temperature = _checks.temperature(temperature, actions, counted, device)
    options = kl_options(kl, grad, log_ratio_clamp, kl_clamp, KINDS)
    if old_logprobs is not None:
        old_logprobs = _checks.old_logprobs(old_logprobs, rows, "actions", device)
    _checks.no_process_group(process_group)

    kernels = select("token_kl", policy_logits, ref_logits)
    fixed = (actions, counted, old_logprobs, temperature, options)
    if torch.is_grad_enabled() and (policy_logits.requires_grad or ref_logits.requires_grad):
        return TokenKL(*_apply((kernels, reads_ref(options, ref_logits), *fixed), policy_logits, ref_logits))
    return TokenKL(*kernels.forward(policy_logits, ref_logits, *fixed)[:4])


def reads_ref(options: KLOptions, ref_logits: Tensor) -> bool:
    """Whether the backward pass reads the reference's logits: otherwise it does not keep them alive."""
    return ref_logits.requires_grad or options.kind.startswith("full")


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, bool, Tensor, Tensor | None, Tensor | None, float | Tensor, KLOptions],
        policy_logits: Tensor,
        ref_logits: Tensor,
    ) -> tuple[Tensor, ...]:
        kernels, keep_ref, actions, mask, old_logprobs, temperature, options = call
        outputs: tuple[Tensor, ...] = kernels.forward(
            policy_logits, ref_logits, actions, mask, old_logprobs, temperature, options
        )
        ctx.set_materialize_grads(False)
        per_row = temperature if isinstance(temperature, Tensor) else None
        kept = ref_logits if keep_ref else None
        ctx.save_for_backward(policy_logits, kept, actions, mask, old_logprobs, per_row, outputs[4])
        ctx.call = kernels, options, temperature if per_row is None else 1.0
        return outputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        policy_logits, kept, actions, mask, old_logprobs, per_row, state = ctx.saved_tensors
        kernels, options, temperature = ctx.call
        ref_logits = policy_logits if kept is None else kept  # what is not read still has a shape
        want_policy, want_ref = ctx.needs_input_grad[1:3]
        with torch.no_grad():
            grad_policy, grad_ref = kernels.backward(
                *grads,
                *(policy_logits, ref_logits, actions, mask, old_logprobs),
                *(temperature if per_row is None else per_row, options, state, want_policy, want_ref),
            )
        sources = (*grads, policy_logits, ref_logits)
        grad_policy = first_derivative("token_kl", grad_policy, *sources)
        grad_ref = first_derivative("token_kl", grad_ref, *sources)
        return None, grad_policy, grad_ref


_apply = quick_apply(_TokenKL)
