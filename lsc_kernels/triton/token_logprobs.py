"""token_logprobs in Triton: the kernels of token_kl, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.triton._launch import operator
from lsc_kernels.triton.token_kl import backward_rows, forward_rows, new_rows, split_temperature

_NO_LIMITS = (0.0, 0.0, 0.0, 0.0)
_ops = torch.ops.lsc_kernels_triton


@operator(
    "token_logprobs_forward(Tensor logits, Tensor actions, Tensor? mask, Tensor? temperatures, float temperature)"
    " -> (Tensor, Tensor, Tensor)",
    lambda logits, actions, *_: tuple(new_rows(actions, False)[index] for index in (1, 3, 4)),
)
def _forward(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperatures: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    _, logprobs, _, entropy, saved = forward_rows(
        logits, None, actions, mask, None, temperatures, temperature, None, False, *_NO_LIMITS
    )
    return logprobs, entropy, saved


@operator(
    "token_logprobs_backward(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, Tensor actions, Tensor? mask,"
    " Tensor? temperatures, float temperature, Tensor saved) -> Tensor",
    lambda grad_logprobs, grad_entropy, logits, *_: logits.new_empty(logits.shape),
)
def _backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    saved: Tensor,
) -> Tensor:
    gradient, _ = backward_rows(
        (None, grad_logprobs, None, grad_entropy), logits, None, actions, mask, None, temperatures, temperature,
        None, False, *_NO_LIMITS, saved, True, False,
    )  # fmt: skip
    return gradient


def forward(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _ops.token_logprobs_forward(
        logits, actions, mask, *split_temperature(temperature)
    )
    return outputs


def backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    state: Tensor,
) -> Tensor:
    gradient: Tensor = _ops.token_logprobs_backward(
        grad_logprobs, grad_entropy, logits, actions, mask, *split_temperature(temperature), state
    )
    return gradient
