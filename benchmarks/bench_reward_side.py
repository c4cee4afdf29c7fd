"""The reward side: heads, transform, aggregation, placement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _measure import Outputs
from torch import Generator, Tensor

import lsc_kernels as lk

PROPERTIES = 4
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])


@BACKWARD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reward_head(
    compare: Any, size: Any, generator: Generator, dtype: torch.dtype, backward: bool
) -> None:
    """Four scores per sequence from the last counted position; only that row is needed of each sequence."""
    batch, length = 64, 256
    hidden = torch.randn(batch, length, size.hidden, generator=generator).to(dtype)
    weight = torch.randn(PROPERTIES, size.hidden, generator=generator).to(dtype) / size.hidden**0.5
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1), generator=generator)

    def ours(hidden: Tensor, weight: Tensor, mask: Tensor) -> Outputs:
        return {"scores": lk.reward_head(hidden, weight, attention_mask=mask)}

    def textbook(hidden: Tensor, weight: Tensor, mask: Tensor) -> Outputs:
        """A score head on every position, then the last one picked: what sequence classifiers do."""
        scores = hidden @ weight.T
        return {"scores": scores[torch.arange(scores.shape[0]), mask.sum(-1) - 1]}

    def truth(hidden: Tensor, weight: Tensor, mask: Tensor) -> Outputs:
        return {
            "scores": hidden[torch.arange(hidden.shape[0]), mask.sum(-1) - 1].double() @ weight.double().T
        }

    compare(
        "reward_head",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(hidden, weight, mask),
        reads=(hidden[torch.arange(batch), mask.sum(-1) - 1],),
        shape={"B": batch, "S": length, "H": size.hidden, "K": PROPERTIES},
        dtype=dtype,
        leaf=1 if backward else None,
    )


@BACKWARD
def test_lsc_transform(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    reward = 6 * torch.randn(size.sequences, size.length, generator=generator)
    reference = torch.randn(size.length, generator=generator)

    def ours(reward: Tensor, reference: Tensor) -> Outputs:
        return {"utility": lk.lsc_transform(reward, reference)}

    def textbook(reward: Tensor, reference: Tensor) -> Outputs:
        return {"utility": torch.nn.functional.logsigmoid(reward - reference)}

    def truth(reward: Tensor, reference: Tensor) -> Outputs:
        return {"utility": torch.nn.functional.logsigmoid(reward.double() - reference.double())}

    compare(
        "lsc_transform",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(reward, reference),
        reads=(reward,),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )


@BACKWARD
def test_aggregate_rewards(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    """As many scores as the other ops read: [B, T / 4, 4]."""
    scores = 6 * torch.randn(size.sequences, size.length // PROPERTIES, PROPERTIES, generator=generator)
    reference = torch.randn(PROPERTIES, generator=generator)
    weights = torch.rand(PROPERTIES, generator=generator) + 0.5

    def ours(scores: Tensor, reference: Tensor, weights: Tensor) -> Outputs:
        return {"utility": lk.aggregate_rewards(scores, reference, weights=weights)}

    def textbook(scores: Tensor, reference: Tensor, weights: Tensor) -> Outputs:
        return {"utility": (weights * torch.nn.functional.logsigmoid(scores - reference)).sum(-1)}

    def truth(scores: Tensor, reference: Tensor, weights: Tensor) -> Outputs:
        centred = scores.double() - reference.double()
        return {"utility": (weights.double() * torch.nn.functional.logsigmoid(centred)).sum(-1)}

    compare(
        "aggregate_rewards",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(scores, reference, weights),
        reads=(scores,),
        shape={"B": size.sequences, "T": size.length // PROPERTIES, "K": PROPERTIES},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )


@BACKWARD
def test_aggregate_rewards_formula(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    """One conjunction, one threshold, one complement; one row per sequence of a large batch."""
    rows = size.sequences * size.length // 16
    scores = 6 * torch.randn(rows, PROPERTIES, generator=generator)
    formula = lk.prop(0) & lk.at_least(1, 1, 2) & ~lk.prop(3)

    def ours(scores: Tensor) -> Outputs:
        return {"utility": lk.aggregate_rewards(scores, 0.0, formula=formula)}

    def textbook(scores: Tensor) -> Outputs:
        """The probability itself: its logarithm is wrong where it is near 0 or 1."""
        p = torch.sigmoid(scores)
        either = 1 - (1 - p[:, 1]) * (1 - p[:, 2])
        return {"utility": torch.log(p[:, 0] * either * (1 - p[:, 3]))}

    def truth(scores: Tensor) -> Outputs:
        good, bad = (torch.nn.functional.logsigmoid(sign * scores.double()) for sign in (1, -1))
        neither = bad[:, 1] + bad[:, 2]
        either = torch.where(neither > -0.7, torch.log(-torch.expm1(neither)), torch.log1p(-neither.exp()))
        return {"utility": good[:, 0] + either + bad[:, 3]}

    compare(
        "aggregate_rewards",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(scores,),
        reads=(scores,),
        shape={"B": rows, "K": PROPERTIES},
        dtype=torch.float32,
        case="a & (b | c) & ~d",
        leaf=0 if backward else None,
    )


@BACKWARD
def test_bradley_terry_loss(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    """As many pairs as the other ops read numbers."""
    chosen, rejected = 3 * torch.randn(2, size.sequences * size.length, generator=generator)

    def ours(chosen: Tensor, rejected: Tensor) -> Outputs:
        return {"loss": lk.bradley_terry_loss(chosen, rejected, center=0.01)}

    def textbook(chosen: Tensor, rejected: Tensor) -> Outputs:
        """As reward trainers write it."""
        loss = -torch.nn.functional.logsigmoid(chosen - rejected)
        return {"loss": (loss + 0.01 * (chosen + rejected) ** 2).mean()}

    def truth(chosen: Tensor, rejected: Tensor) -> Outputs:
        return textbook(chosen.double(), rejected.double())

    compare(
        "bradley_terry_loss",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(chosen, rejected),
        reads=(chosen, rejected),
        shape={"pairs": chosen.numel()},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )


@BACKWARD
def test_token_rewards(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    shape = (size.sequences, size.length)
    utility = -torch.rand(size.sequences, generator=generator)
    kl = 0.1 * torch.rand(shape, generator=generator)
    mask = torch.arange(size.length) < torch.randint(
        1, size.length + 1, (size.sequences, 1), generator=generator
    )

    def ours(utility: Tensor, kl: Tensor, mask: Tensor) -> Outputs:
        return {"rewards": lk.token_rewards(utility, kl, mask, beta=0.05)}

    def textbook(utility: Tensor, kl: Tensor, mask: Tensor) -> Outputs:
        """As TRL and its relatives: the penalty everywhere, then the score added at the last token."""
        rewards = torch.where(mask, -0.05 * kl, 0.0)
        rows = torch.arange(rewards.shape[0])
        return {"rewards": rewards.index_put((rows, mask.sum(-1) - 1), utility, accumulate=True)}

    def truth(utility: Tensor, kl: Tensor, mask: Tensor) -> Outputs:
        return textbook(utility.double(), kl.double(), mask)

    compare(
        "token_rewards",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(utility, kl, mask),
        reads=(kl,),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=1 if backward else None,
    )
