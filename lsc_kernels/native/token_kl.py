"""token_kl through the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.native.kl_from_logprobs import arguments, float_or_none
from lsc_kernels.native.token_logprobs import new_rows, split_temperature

_ops = torch.ops.lsc_kernels


def forward(
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    options: KLOptions,
) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _ops.token_kl_forward.default(
        *(policy_logits, ref_logits, actions, mask, float_or_none(old_logprobs)),
        *split_temperature(temperature),
        *arguments(options),
    )
    return outputs


def backward(
    grad_kl: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_ref_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    policy_logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    temperature: float | Tensor,
    options: KLOptions,
    state: Tensor,
    want_policy: bool,
    want_ref: bool,
) -> tuple[Tensor | None, Tensor | None]:
    policy, ref = _ops.token_kl_backward.default(
        *(grad_kl, grad_logprobs, grad_ref_logprobs, grad_entropy),
        *(policy_logits, ref_logits, actions, mask, float_or_none(old_logprobs)),
        *split_temperature(temperature),
        *arguments(options),
        *(state, want_policy, want_ref),
    )
    return policy if want_policy else None, ref if want_ref else None


@torch.library.register_fake("lsc_kernels::token_kl_forward")
def _(policy_logits: Tensor, ref_logits: Tensor, actions: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(new_rows(actions, 4))


@torch.library.register_fake("lsc_kernels::token_kl_backward")
def _(
    grad_kl: object,
    grad_logprobs: object,
    grad_ref_logprobs: object,
    grad_entropy: object,
    policy_logits: Tensor,
    ref_logits: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    want_policy, want_ref = rest[-2:]
    return (
        policy_logits.new_empty(policy_logits.shape if want_policy else (0,)),
        ref_logits.new_empty(ref_logits.shape if want_ref else (0,)),
    )
