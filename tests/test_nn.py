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
    for _ in range(150):
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


def classifier(labels: int = 1, hidden_size: int = 16, architecture: str = "Llama") -> Any:
    """A tiny random reward model of Hugging Face's; its padding token also ends a text."""
    transformers = pytest.importorskip("transformers", reason="Hugging Face's models need transformers")
    config = getattr(transformers, f"{architecture}Config")(
        **{"vocab_size": 50, "hidden_size": hidden_size, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_labels": labels, "pad_token_id": EOS},
    )
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config).eval()
    torch.nn.init.normal_(model.score.weight)
    return model


EOS = 3


@pytest.fixture
def texts(generator: Generator) -> list[torch.Tensor]:
    """Token ids of texts of several lengths, each closed by the token that also pads."""
    bodies = [torch.randint(4, 50, (length,), generator=generator) for length in (7, 1, 12, 4)]
    return [torch.cat([body, torch.tensor([EOS])]) for body in bodies]


def padded(texts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(texts), 17), EOS)
    mask = torch.zeros(len(texts), 17, dtype=torch.int64)
    for row, text in enumerate(texts):
        at = slice(0, len(text)) if side == "right" else slice(17 - len(text), 17)
        ids[row, at], mask[row, at] = text, 1
    return ids, mask


def last_hidden(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden: torch.Tensor = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions
        ).last_hidden_state
    return hidden


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labels, architecture", [(1, "Llama"), (3, "Qwen2"), (2, "Mistral")])
def test_the_head_of_a_sequence_classifier(
    texts: list[torch.Tensor], side: str, labels: int, architecture: str
) -> None:
    """The score at each text's own last token, with padding that looks like it: the model's own forward pass takes the
    token before."""
    model = classifier(labels, architecture=architecture)
    head = lk.nn.RewardHead.from_sequence_classifiers(model)
    ids, mask = padded(texts, side)
    hidden = last_hidden(model, ids, mask)
    alone = [
        model.score(last_hidden(model, text[None], torch.ones_like(text)[None])[0, -1]) for text in texts
    ]
    expected = torch.stack(alone)
    torch.testing.assert_close(head(hidden, attention_mask=mask), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
    assert ((own - expected).abs() > 1e-3).any(dim=-1).all()
    hidden[mask == 0] = torch.nan
    assert torch.equal(
        head(hidden, attention_mask=mask), head(hidden.nan_to_num(7.0), attention_mask=mask)
    )  # what is padding is not read


@pytest.mark.parametrize("sizes", [(16, 16), (16, 24, 8)])
def test_the_head_of_several_classifiers(texts: list[torch.Tensor], sizes: tuple[int, ...]) -> None:
    models = [classifier(hidden_size=size) for size in sizes]
    head = lk.nn.RewardHead.from_sequence_classifiers(models)
    masks = [padded(texts, side)[1] for side in ("right", "left", "right")[: len(models)]]
    hidden = [
        last_hidden(model, *padded(texts, side))
        for model, side in zip(models, ("right", "left", "right"), strict=False)
    ]
    scores = head(hidden, attention_mask=masks)
    for k, model in enumerate(models):
        one = lk.nn.RewardHead.from_sequence_classifiers([model])
        assert torch.equal(scores[:, k : k + 1], one(hidden[k], attention_mask=masks[k]))
    assert not any(
        mine is theirs for mine in head.parameters() for model in models for theirs in model.parameters()
    )
    assert f"num_properties={len(sizes)}" in repr(head)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert torch.equal(copy.deepcopy(head)(hidden, attention_mask=masks), scores)


def test_classifiers_without_such_a_head() -> None:
    transformers = pytest.importorskip("transformers", reason="Hugging Face's models need transformers")
    size = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24}
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**size, num_hidden_layers=1, num_attention_heads=2)
    )
    make = lk.nn.RewardHead.from_sequence_classifiers
    with pytest.raises(ValueError, match="linear layer `score`.*BertForSequenceClassification has none"):
        make(bert)
    with pytest.raises(ValueError, match=r"models\[1\] must have one label.* has 2"):
        make([classifier(), classifier(labels=2)])
    with pytest.raises(ValueError, match="at least one reward model"):
        make([])


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
