"""Logits of a policy and its reference, the token ops as trainers write them, and the same in fp64."""

from __future__ import annotations

import _truth
import torch
from _measure import Outputs
from torch import Generator, Tensor

import lsc_kernels as lk

DTYPES = [torch.float32, torch.bfloat16]
# how the reference differs: as after some training, or not at all alike
REFERENCES = {"near": 0.1, "independent": None}


def logits(
    generator: Generator, rows: int, vocabulary: int, dtype: torch.dtype, reference: str = "near"
) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference logits [N, V] of standard deviation 3, and actions [N] drawn from the policy."""
    policy = 3 * torch.randn(rows, vocabulary, generator=generator, device=generator.device)
    noise = torch.randn(rows, vocabulary, generator=generator, device=generator.device)
    distance = REFERENCES[reference]
    ref = 3 * noise if distance is None else policy + distance * noise
    actions = torch.multinomial(torch.softmax(policy, -1), 1, generator=generator).squeeze(-1)
    return policy.to(dtype), ref.to(dtype), actions


def log_softmax(logits: Tensor) -> Tensor:
    """Trainers upcast: log-probabilities in bf16 have two digits."""
    return torch.log_softmax(logits.float(), -1)


def at(log_p: Tensor, actions: Tensor) -> Tensor:
    return log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def textbook_logprobs(policy: Tensor, actions: Tensor) -> Outputs:
    log_p = log_softmax(policy)
    return {"logprobs": at(log_p, actions), "entropy": -(log_p.exp() * log_p).sum(-1)}


def textbook_k3(policy: Tensor, ref: Tensor, actions: Tensor) -> Outputs:
    """What a trainer needs for k3: both log-probabilities at the action, no more."""
    logprobs, ref_logprobs = at(log_softmax(policy), actions), at(log_softmax(ref), actions)
    d = logprobs - ref_logprobs
    return {"kl": torch.exp(-d) - 1 + d, "logprobs": logprobs, "ref_logprobs": ref_logprobs}


def textbook_full(policy: Tensor, ref: Tensor, actions: Tensor) -> Outputs:
    """Full KL, both log-probabilities, and the entropy."""
    log_p, log_q = log_softmax(policy), log_softmax(ref)
    p = log_p.exp()
    return {
        "kl": (p * (log_p - log_q)).sum(-1),
        "logprobs": at(log_p, actions),
        "ref_logprobs": at(log_q, actions),
        "entropy": -(p * log_p).sum(-1),
    }


TEXTBOOK = {"k3": textbook_k3, "full": textbook_full}
OUTPUTS = {
    "k3": ("kl", "logprobs", "ref_logprobs"),
    "full": ("kl", "logprobs", "ref_logprobs", "entropy"),
}


def token_kl(policy: Tensor, ref: Tensor, actions: Tensor, kl: str) -> Outputs:
    """This library's, the outputs that the textbook also has."""
    outputs = lk.token_kl(policy, ref, actions, kl=kl)._asdict()
    return {name: outputs[name] for name in OUTPUTS[kl]}


def true_token_kl(policy: Tensor, ref: Tensor, actions: Tensor, kl: str) -> Outputs:
    """In fp64, a few rows at a time: the intermediate tensors are large."""
    parts = [
        _truth.token_kl(x.double(), y.double(), a, kl=kl)
        for x, y, a in zip(policy.split(16), ref.split(16), actions.split(16), strict=True)
    ]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in OUTPUTS[kl]}
