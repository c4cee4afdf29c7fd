"""The modules give what their ops give, and are saved, moved and trained as modules are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator

import lsc_kernels as lk


def test_reward_head_is_the_op_with_its_parameters(backend: str, generator: Generator) -> None:
    head = lk.nn.RewardHead(16, 3, bias=True)
    with torch.no_grad():
        head.bias.normal_(generator=generator)
    hidden = torch.randn(2, 5, 16, generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    scores = head(hidden, attention_mask=mask)
    assert torch.equal(scores, lk.reward_head(hidden, head.weight, head.bias, attention_mask=mask))
    assert head(hidden, pool="none").shape == (2, 5, 3)
    packed = head(hidden.view(10, 16), cu_seqlens=torch.tensor([0, 4, 10]))
    assert torch.equal(packed, head(hidden.view(1, 10, 16).expand(2, 10, 16), index=torch.tensor([3, 9])))
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert "hidden_size=16, num_properties=3, bias=True" in repr(head)


def test_reward_head_learns_preferences(generator: Generator) -> None:
    torch.manual_seed(0)
    head = lk.nn.RewardHead(8, 1)
    wanted = torch.randn(8, generator=generator)
    hidden = torch.randn(256, 2, 1, 8, generator=generator)
    better = (hidden @ wanted).squeeze(-1).argmax(-1)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(60):
        scores = head(hidden.view(512, 1, 8)).view(256, 2)
        chosen, rejected = scores.gather(1, better[:, None]), scores.gather(1, 1 - better[:, None])
        loss = lk.bradley_terry_loss(chosen, rejected)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    assert torch.cosine_similarity(head.weight[0], wanted, dim=0).item() > 0.95


def test_reward_aggregator_is_the_op_with_its_options(backend: str, generator: Generator) -> None:
    names = ["helpful", "harmless", "verbose"]
    reference, scale, weights, floor = (torch.rand(3, generator=generator) + 0.1 for _ in range(4))
    module = lk.nn.RewardAggregator(
        "helpful & (harmless | ~verbose)",
        names,
        reference_reward=reference,
        weights=weights,
        scale=scale.tolist(),
        floor=floor / 2,
        missing="ignore",
    )
    scores = torch.randn(4, 3, generator=generator)
    scores[1, 1] = torch.nan
    options: dict[str, Any] = {"weights": weights, "scale": scale, "floor": floor / 2, "missing": "ignore"}
    options |= {"formula": lk.prop(0) & (lk.prop(1) | ~lk.prop(2))}
    assert torch.equal(module(scores), lk.aggregate_rewards(scores, reference, **options))
    own = torch.randn(4, 3, generator=generator)
    assert torch.equal(module(scores, own), lk.aggregate_rewards(scores, own, **options))
    assert torch.equal(lk.nn.RewardAggregator()(own), lk.aggregate_rewards(own, 0.0))
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(same(scores), module(scores)) and same.formula == module.formula
    other = lk.nn.RewardAggregator(module.formula, names, **{**options_of_zeros(), "missing": "ignore"})
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(scores), module(scores))
    assert not list(module.parameters())


def options_of_zeros() -> dict[str, Any]:
    return {"reference_reward": [0.0] * 3, "weights": [1.0] * 3, "scale": [1.0] * 3, "floor": [0.0] * 3}


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.nn.RewardHead(0, 3), ValueError, "hidden_size must be at least 1; got 0"),
    (lambda: lk.nn.RewardHead(4, 2.0), TypeError, "num_properties must be an integer; got float"),
    (lambda: lk.nn.RewardAggregator("a & &"), ValueError, "formula: a property"),
    (
        lambda: lk.nn.RewardAggregator("a & b", ["a", "c"])(torch.zeros(1, 2)),
        ValueError,
        "'b', which is not in names",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
