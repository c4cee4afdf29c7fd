"""shaped_rewards: the whole chain, from logits, and from log-probabilities that are already there."""

from __future__ import annotations

from typing import Any

import _logits
import _truth
import pytest
import torch
from _measure import Function, Outputs
from torch import Generator, Tensor

import lsc_kernels as lk

BETA, PROPERTIES, HIDDEN, CONTEXT = 0.05, 4, 1024, 64


def score(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden[:, -1] @ weight.T


def place(utility: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
    """The penalty everywhere, the utility at the last token: what TRL and its relatives do."""
    rewards = torch.where(mask, -BETA * kl, 0.0)
    rows = torch.arange(rewards.shape[0], device=rewards.device)
    return rewards.index_put((rows, mask.sum(-1) - 1), utility, accumulate=True)


def reward_side(
    generator: Generator, batch: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    drawn = {"generator": generator, "device": generator.device}
    hidden = torch.randn(batch, CONTEXT, HIDDEN, **drawn).to(dtype)
    weight = (torch.randn(PROPERTIES, HIDDEN, **drawn) / HIDDEN**0.5).to(dtype)
    reference = torch.randn(PROPERTIES, **drawn)
    lengths = torch.randint(1, length + 1, (batch, 1), **drawn)
    mask = torch.arange(length, device=generator.device) < lengths
    mask[0] = True
    return hidden, weight, reference, mask


def utility_of(scores: Tensor, reference: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(scores.to(reference.dtype) - reference).sum(-1)


def ours(*tensors: Tensor) -> Outputs:
    out = lk.shaped_rewards(*tensors, beta=BETA, kl="k3")
    return {"rewards": out.rewards, "utility": out.utility, "kl": out.kl}


def textbook(
    hidden: Tensor,
    weight: Tensor,
    reference: Tensor,
    policy: Tensor,
    ref: Tensor,
    actions: Tensor,
    mask: Tensor,
) -> Outputs:
    utility = utility_of(score(hidden, weight), reference)
    kl = torch.where(mask, _logits.textbook_k3(policy, ref, actions)["kl"], 0.0)
    return {"rewards": place(utility, kl, mask), "utility": utility, "kl": kl}


def truth(
    hidden: Tensor,
    weight: Tensor,
    reference: Tensor,
    policy: Tensor,
    ref: Tensor,
    actions: Tensor,
    mask: Tensor,
) -> Outputs:
    utility = utility_of(score(hidden.double(), weight.double()), reference.double())
    parts = [
        _truth.token_kl(x.double(), y.double(), a, mask=m).kl
        for x, y, a, m in zip(policy, ref, actions, mask, strict=True)
    ]
    kl = torch.stack(parts)
    return {"rewards": place(utility, kl, mask), "utility": utility, "kl": kl}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", _logits.DTYPES, ids=str)
def test_from_logits(
    compare: Any, size: Any, generator: Generator, dtype: torch.dtype, backward: bool
) -> None:
    """As many rows as the other token ops, in 8 sequences."""
    batch, length = 8, size.rows // 8
    policy, ref, actions = _logits.logits(generator, batch * length, size.vocabulary, dtype)
    hidden, weight, reference, mask = reward_side(generator, batch, length, dtype)
    logits = (policy.view(batch, length, -1), ref.view(batch, length, -1))
    compare(
        "shaped_rewards",
        case="from logits, k3",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(hidden, weight, reference, *logits, actions.view(batch, length), mask),
        reads=(policy, ref),
        shape={"B": batch, "T": length, "V": size.vocabulary},
        dtype=dtype,
        leaf=3 if backward else None,
    )


def from_logprobs(reference: Tensor, mask: Tensor) -> tuple[Function, Function, Function]:
    """The chain from scores and two log-probabilities: the textbook's, in fp64, and this library's."""

    def textbook(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
        d = logprobs - ref_logprobs
        kl = torch.where(mask, torch.exp(-d) - 1 + d, 0.0)
        utility = utility_of(scores, reference)
        return {"rewards": place(utility, kl, mask), "utility": utility, "kl": kl}

    def truth(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
        kl = _truth.kl_from_logprobs(logprobs.double(), ref_logprobs.double(), mask=mask).kl
        utility = utility_of(scores.double(), reference.double())
        return {"rewards": place(utility, kl, mask), "utility": utility, "kl": kl}

    def ours(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor) -> Outputs:
        out = lk.shaped_rewards(
            *(None, None, reference, None, None, None, mask),
            beta=BETA,
            kl="k3",
            scores=scores,
            policy_logprobs=logprobs,
            ref_logprobs=ref_logprobs,
        )
        return {"rewards": out.rewards, "utility": out.utility, "kl": out.kl}

    return textbook, truth, ours


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_from_logprobs(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    batch, length = size.sequences, size.length // 4
    hidden, weight, reference, mask = reward_side(generator, batch, length, torch.float32)
    logprobs = -5 * torch.rand(batch, length, generator=generator)
    ref_logprobs = logprobs + 0.1 * torch.randn(batch, length, generator=generator)
    textbook, truth, ours = from_logprobs(reference, mask)
    compare(
        "shaped_rewards",
        case="from log-probabilities, k3",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(score(hidden, weight), logprobs, ref_logprobs),
        reads=(logprobs, ref_logprobs),
        shape={"B": batch, "T": length},
        dtype=torch.float32,
        leaf=1 if backward else None,
    )
