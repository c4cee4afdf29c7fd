"""token_logprobs through the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.lsc_kernels

SAVED = 14
"""Floats that the forward pass saves per row: ``kSaved`` in csrc/arguments/rows.h."""


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """A temperature as the native ops take it: per row in fp64, or one number."""
    return (temperature.double(), 1.0) if isinstance(temperature, Tensor) else (None, temperature)


def forward(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor] = _ops.token_logprobs_forward.default(
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
    gradient: Tensor = _ops.token_logprobs_backward.default(
        grad_logprobs, grad_entropy, logits, actions, mask, *split_temperature(temperature), state
    )
    return gradient


def new_rows(actions: Tensor, count: int) -> list[Tensor]:
    """Fake per-row outputs, and what is saved of the rows."""
    outputs = [actions.new_empty(actions.shape, dtype=torch.float32) for _ in range(count)]
    return [*outputs, actions.new_empty((actions.numel(), SAVED), dtype=torch.float32)]


@torch.library.register_fake("lsc_kernels::token_logprobs_forward")
def _(logits: Tensor, actions: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(new_rows(actions, 2))


@torch.library.register_fake("lsc_kernels::token_logprobs_backward")
def _(grad_logprobs: object, grad_entropy: object, logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape)
