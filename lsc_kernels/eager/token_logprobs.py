"""Log-probability of the action and entropy of the distribution: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(logits / temperature) in fp64; ``temperature`` is a float or [...]."""
    scaled = logits.double()
    if isinstance(temperature, Tensor):
        scaled = scaled / temperature.double().unsqueeze(-1)
    elif temperature != 1.0:
        scaled = scaled / temperature
    return torch.log_softmax(scaled, dim=-1)


def counted(actions: Tensor, mask: Tensor | None) -> Tensor:
    """[...] bool: positions that the mask and ``ignore_index`` leave in."""
    kept = actions != IGNORE_INDEX
    return kept if mask is None else kept & mask


def in_vocabulary(actions: Tensor, vocabulary: int) -> Tensor:
    return (actions >= 0) & (actions < vocabulary)


def check_actions(actions: Tensor, vocabulary: int, kept: Tensor) -> None:
    """Raise IndexError for a counted action outside [0, V). On a GPU the row becomes NaN instead: no host wait."""
    if actions.device.type != "cpu" or torch.compiler.is_compiling() or actions.numel() == 0:
        return
    wrong = kept & ~in_vocabulary(actions, vocabulary)
    if wrong.any():
        action = actions[wrong].flatten()[0].item()
        raise IndexError(
            f"actions must be in [0, V) with V = {vocabulary}, or {IGNORE_INDEX} to leave a position out; got {action}"
        )


def of_rows(values: Tensor, actions: Tensor, vocabulary: int, kept: Tensor) -> Tensor:
    """[...] or [..., V]: 0 in rows that are left out, NaN in others whose action is outside the vocabulary."""
    inside = in_vocabulary(actions, vocabulary)
    if values.dim() > kept.dim():
        inside, kept = inside.unsqueeze(-1), kept.unsqueeze(-1)
    return torch.where(kept & inside, values, torch.where(kept, torch.nan, 0.0))


def at_action(log_probabilities: Tensor, actions: Tensor) -> Tensor:
    """log p(a), of some token where the action is outside the vocabulary."""
    index = actions.long().clamp(0, log_probabilities.shape[-1] - 1)
    return log_probabilities.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def row_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, in two steps of a fixed split.

    torch splits one long row over threads, but not many rows: without this a row's last bit would depend on how many
    rows there are.
    """
    split = 4096
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[-1] % split))
    return padded.unflatten(-1, (-1, split)).sum(-1).sum(-1)


def minus_p_log_p(log_probabilities: Tensor) -> Tensor:
    """-p log p, 0 where p is 0."""
    return torch.where(log_probabilities == -torch.inf, 0.0, -log_probabilities.exp() * log_probabilities)


def forward(
    logits: Tensor, actions: Tensor, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logprobs, entropy, state); eager recomputes in backward, so its state is empty."""
    kept = counted(actions, mask)
    vocabulary = logits.shape[-1]
    check_actions(actions, vocabulary, kept)
    log_p = log_softmax(logits, temperature)
    logprobs = of_rows(at_action(log_p, actions), actions, vocabulary, kept)
    entropy = of_rows(row_sum(minus_p_log_p(log_p)), actions, vocabulary, kept)
    if logits.dtype is not torch.float64:
        logprobs, entropy = logprobs.float(), entropy.float()
    return logprobs, entropy, logprobs.new_empty(0)


def backward(
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    state: Tensor,
) -> Tensor:
    """d log p(a) / d x_v = 1[v = a] - p_v, d entropy / d x_v = -p_v (log p_v + entropy); x = logits / temperature."""
    kept = counted(actions, mask)
    log_p = log_softmax(logits, temperature)
    p = log_p.exp()
    grad = torch.zeros_like(log_p)
    if grad_logprobs is not None:
        one_hot = torch.zeros_like(p).scatter_(
            -1, actions.long().clamp(0, p.shape[-1] - 1).unsqueeze(-1), 1.0
        )
        grad = grad + grad_logprobs.double().unsqueeze(-1) * (one_hot - p)
    if grad_entropy is not None:
        terms = minus_p_log_p(log_p)
        grad = grad + grad_entropy.double().unsqueeze(-1) * (terms - p * row_sum(terms).unsqueeze(-1))
    grad = grad / (temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature)
    return of_rows(grad, actions, logits.shape[-1], kept).to(logits.dtype)
