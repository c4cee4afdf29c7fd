"""TRL: our reward in its trainers, our trainers and drop-ins beside its own, on ordinary inputs and on hard ones."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _tolerances as tolerances
import pytest
import torch
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels.reference import ReferenceTable, leave_one_out_quantile, quantile_reference
from lsc_kernels.trainers import _versions
from lsc_kernels.trainers import trl as adapter
from lsc_kernels.trainers.trl import Canned, GroupQuantile, GroupScalingWarning, LSCReward

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'lsc-kernels[trl]'"
)
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="reward models need transformers"
)
PROMPTS = ["Tell me of the sea.", "What is rain?", "Why is the sky blue?", "Name a tree."]
NAMES = ("helpful", "harmless")


# the reward function


def scores_of(values: Tensor) -> list[Any]:
    """One reward function for each column of given scores."""

    def function(k: int) -> Any:
        def reward(completions: list[str], **columns: Any) -> list[float | None]:
            return [None if math.isnan(score) else score for score in values[: len(completions), k].tolist()]

        reward.__name__ = NAMES[k]
        return reward

    return [function(k) for k in range(values.shape[1])]


@pytest.fixture
def scores(generator: Generator) -> Tensor:
    return 3 * torch.randn(8, 2, generator=generator)


def call(reward: Any, **columns: Any) -> Tensor:
    """The rewards of eight completions, four for each of two prompts, NaN for None."""
    prompts, completions = [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4, [f"{row}" for row in range(8)]
    result = reward(prompts=prompts, completions=completions, completion_ids=[[1]] * 8, **columns)
    return torch.tensor([math.nan if each is None else each for each in result])


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-6, equal_nan=True)


def test_references_from_a_column(scores: Tensor, generator: Generator) -> None:
    reference = torch.randn(8, 2, generator=generator)
    expected = lk.aggregate_rewards(scores, reference)
    rewards = scores_of(scores)
    agree(call(LSCReward(rewards), reference_reward=reference.tolist()), expected)
    named = [dict(zip(NAMES, row, strict=True)) for row in reference.tolist()]
    agree(call(LSCReward(rewards, reference_reward="good"), good=named), expected)
    agree(
        call(LSCReward(rewards), reference_reward=reference[:, 0].tolist()),
        lk.aggregate_rewards(scores, reference[:, :1]),
    )


def test_references_that_are_numbers(scores: Tensor) -> None:
    rewards, numbers = scores_of(scores), torch.tensor([0.5, -1.0])
    agree(call(LSCReward(rewards, reference_reward=numbers.tolist())), lk.aggregate_rewards(scores, numbers))
    agree(call(LSCReward(rewards, reference_reward=0.25)), lk.aggregate_rewards(scores, 0.25))
    agree(call(LSCReward(rewards[0], reference_reward=0.25)), lk.lsc_transform(scores[:, 0], 0.25))


def test_references_from_a_table(scores: Tensor) -> None:
    rows = [
        (prompt, name, float(i + 2 * k)) for i, prompt in enumerate(PROMPTS) for k, name in enumerate(NAMES)
    ]
    table = ReferenceTable.fit(rows, properties=NAMES[::-1])  # in another order than the rewards
    reference = torch.tensor([[0.0, 2.0]] * 4 + [[1.0, 3.0]] * 4)
    reward = LSCReward(scores_of(scores), reference_reward=table)
    agree(call(reward), lk.aggregate_rewards(scores, reference))
    with pytest.raises(ValueError, match="reference table has no property 'kind'"):
        call(LSCReward(scores_of(scores), names=["helpful", "kind"], reference_reward=table))


def test_a_chat_is_looked_up_in_the_format_of_score(scores: Tensor) -> None:
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    table = ReferenceTable.fit([("\n\nHuman: Why?\n\nAssistant:", name, 1.5) for name in NAMES])
    reward = LSCReward(scores_of(scores), reference_reward=table)
    answer = [{"role": "assistant", "content": "So."}]
    agree(torch.tensor(reward([chat], [answer])), lk.aggregate_rewards(scores[:1], 1.5))
    assert table.lookups["prompt"] == 1


@pytest.mark.parametrize("method", ["linear", "median_unbiased", "gaussian"])
def test_references_from_the_group(scores: Tensor, method: str) -> None:
    groups = scores.view(2, 4, 2)
    others = leave_one_out_quantile(groups, 0.7, method=method).reshape(8, 2)
    kind = GroupQuantile(0.7, method, size=4)
    agree(call(LSCReward(scores_of(scores), reference_reward=kind)), lk.aggregate_rewards(scores, others))
    all_four = quantile_reference(groups, 0.7, method=method).repeat_interleave(4, 0)
    kind = GroupQuantile(0.7, method, leave_one_out=False, size=4)
    agree(call(LSCReward(scores_of(scores), reference_reward=kind)), lk.aggregate_rewards(scores, all_four))


def test_references_from_a_canned_response() -> None:
    asked: list[str] = []

    def length(prompts: list[str], completions: list[str], bonus: list[float], **columns: Any) -> list[float]:
        asked.extend(prompts)
        return [len(p) + len(c) + b for p, c, b in zip(prompts, completions, bonus, strict=True)]

    reward = LSCReward(length, reference_reward=Canned("No."))
    bonus = [1.0] * 4 + [2.0] * 4
    own = torch.tensor([float(len(PROMPTS[row // 4]) + 1 + bonus[row]) for row in range(8)])
    agree(call(reward, bonus=bonus), lk.lsc_transform(own, own + 2))  # "No." has two characters more
    assert asked == [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4 + PROMPTS[:2]  # once for each prompt
    call(reward, bonus=bonus)
    assert len(asked) == 8 + 2 + 8


def test_formula_weights_scale_and_floor(scores: Tensor) -> None:
    options: dict[str, Any] = {"weights": [0.5, 2.0], "scale": [1.0, 3.0], "floor": 0.05}
    as_tensors = {name: torch.tensor(value) for name, value in options.items()}
    reward = LSCReward(scores_of(scores), reference_reward=0.0, formula="helpful & ~harmless", **options)
    expected = lk.aggregate_rewards(scores, 0.0, formula="0 & ~1", **as_tensors)
    agree(call(reward), expected)


def test_missing_rewards(scores: Tensor) -> None:
    scores[0, 1] = scores[1] = torch.nan
    ignored = call(LSCReward(scores_of(scores), reference_reward=0.0))
    agree(
        ignored, lk.aggregate_rewards(scores, 0.0, missing="ignore").index_fill(0, torch.tensor(1), torch.nan)
    )
    assert ignored[0] == lk.lsc_transform(scores[0, 0], 0.0) and ignored[1].isnan()
    propagated = call(LSCReward(scores_of(scores), reference_reward=0.0, missing="propagate"))
    assert propagated.isnan().tolist() == [True, True] + [False] * 6
    with pytest.raises(ValueError, match="missing='raise'"):
        call(LSCReward(scores_of(scores), reference_reward=0.0, missing="raise"))
    # a formula that reads the missing column alone
    assert call(LSCReward(scores_of(scores), reference_reward=0.0, formula="harmless"))[0].isnan()
    with pytest.raises(ValueError, match="completion 0 has utility -inf"):
        call(LSCReward(scores_of(scores), reference_reward=0.0, formula="helpful & ~harmless"))


def test_async_functions_are_awaited(scores: Tensor) -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [float(score) for score in scores[:, 1]]

    rewards = [scores_of(scores)[0], later]
    agree(call(LSCReward(rewards, reference_reward=0.0)), lk.aggregate_rewards(scores, 0.0))


def test_what_is_logged(scores: Tensor) -> None:
    scores[2, 0] = torch.nan
    logged: dict[str, float] = {}
    columns: dict[str, list[float]] = {}
    reward = LSCReward(scores_of(scores), reference_reward=[0.5, 1.0], name="good")
    utility = call(reward, log_metric=logged.__setitem__, log_extra=columns.__setitem__)
    assert logged["good/helpful/missing"] == 1 / 8 and logged["good/harmless/missing"] == 0
    assert logged["good/helpful/score"] == pytest.approx(float(scores[:, 0].nanmean()))
    assert logged["good/harmless/reference_reward"] == 1.0
    assert logged["good/harmless/p_good"] == pytest.approx(float(torch.sigmoid(scores[:, 1] - 1).mean()))
    assert logged["good/p_good"] == pytest.approx(float(utility.exp().mean()))
    agree(torch.tensor(columns["harmless"]), scores[:, 1])
    assert reward.last is not None and torch.equal(reward.last.utility, utility)


def test_a_reward_function_for_each_property(scores: Tensor) -> None:
    scores[3, 1] = torch.nan
    calls = []

    def counted(**columns: Any) -> list[float]:
        calls.append(1)
        return scores[:, 0].tolist()

    reward = LSCReward([counted, scores_of(scores)[1]], names=NAMES, reference_reward=[0.5, 1.0])
    each = reward.per_property()
    assert [function.__name__ for function in each] == list(NAMES)
    batch: dict[str, Any] = {"prompts": ["?"] * 8, "completions": ["!"] * 8, "completion_ids": None}
    columns = [torch.tensor([math.nan if u is None else u for u in function(**batch)]) for function in each]
    agree(torch.stack(columns, 1), lk.lsc_transform(scores, torch.tensor([0.5, 1.0])))
    assert len(calls) == 1
    each[0](**{**batch, "completions": ["!"] * 8})
    assert len(calls) == 2
    agree(torch.stack(columns).nansum(0), call(LSCReward(scores_of(scores), reference_reward=[0.5, 1.0])))
    with pytest.raises(ValueError, match="leave out formula and weights"):
        LSCReward(scores_of(scores), formula="helpful").per_property()


def two_at_a_time(completions: list[str], **columns: Any) -> list[float]:
    return [1.0, 2.0]


BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"rewards": []}, {}, ValueError, "rewards must have at least one property"),
    ({"rewards": "a/model"}, {}, TypeError, "must be a function or a Hugging Face reward model"),
    ({"rewards": torch.nn.Linear(1, 1)}, {}, ValueError, "must be the tokenizer of Linear"),
    ({"names": ["a"]}, {}, ValueError, "names must be 2 distinct ones"),
    ({"names": ["a", "a"]}, {}, ValueError, "names must be 2 distinct ones"),
    ({"formula": "helpful & kind"}, {}, ValueError, "kind"),
    ({"missing": "drop"}, {}, ValueError, "missing must be one of"),
    ({"processing_class": [None]}, {}, ValueError, "one entry per reward, 2; got 1"),
    (
        {},
        {"good": [1.0] * 8},
        ValueError,
        r"'reference_reward' is no column of the data set, which has \['good'\]",
    ),
    ({}, {"reference_reward": [[1.0, 2.0, 3.0]] * 8}, ValueError, "a number or 2 per row"),
    ({"reference_reward": GroupQuantile()}, {}, ValueError, "GroupQuantile needs size"),
    ({"reference_reward": GroupQuantile(size=3)}, {}, ValueError, "groups of 3, and 8 samples"),
    ({"reference_reward": GroupQuantile(size=1)}, {}, ValueError, "at least 2 samples"),
    (
        {"rewards": [two_at_a_time]},
        {},
        ValueError,
        "two_at_a_time must return one reward per completion, 8; got 2",
    ),
]


@pytest.mark.parametrize("options, columns, error, message", BAD)
def test_bad_input(
    scores: Tensor, options: dict[str, Any], columns: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(LSCReward(**{"rewards": scores_of(scores), **options}), **columns)


# reward models of Hugging Face


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from lsc_kernels.demo.models import build_tokenizer

    return build_tokenizer(PROMPTS, vocab_size=300)


def reward_model(tokenizer: Any, labels: int = 1, pad: int | None = None) -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_labels": labels},
        pad_token_id=tokenizer.pad_token_id if pad is None else pad,
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    return model


def alone(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Scores of texts one by one, at their last token."""
    rows = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows.append(model.eval().score(model.model(input_ids=ids).last_hidden_state[0, -1]))
    return torch.stack(rows)


@needs_transformers
def test_one_model_with_several_labels_and_a_function(tokenizer: Any, scores: Tensor) -> None:
    """The padding token also closes the texts, where the model's own forward pass takes the token before."""
    model = reward_model(tokenizer, labels=2, pad=tokenizer.eos_token_id)
    model.config.id2label = {0: "kind", 1: "true"}
    completions = ["Yes.<eos>", "It is so, most days.<eos>", "No<eos>"]
    function = scores_of(scores)[0]
    reward = LSCReward([model, function], processing_class=tokenizer, reference_reward=0.0)
    assert reward.names == ("kind", "true", "helpful")
    model.train()
    found = reward(PROMPTS[:3], completions)
    assert model.training and reward.last is not None
    expected = alone(model, tokenizer, [p + c for p, c in zip(PROMPTS, completions, strict=False)])
    torch.testing.assert_close(reward.last.scores[:, :2], expected, rtol=1e-4, atol=1e-4)
    agree(torch.tensor(found), lk.aggregate_rewards(reward.last.scores, 0.0))
    assert torch.equal(reward.last.scores[:, 2], scores[:3, 0])


@needs_transformers
def test_separate_models_on_chats(tokenizer: Any) -> None:
    models = [reward_model(tokenizer), reward_model(tokenizer)]
    own_template = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    own_template.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    reward = LSCReward(models, names=NAMES, processing_class=own_template, reference_reward=0.0)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    completions = [[{"role": "assistant", "content": "So" + "!" * k}] for k in range(4)]
    reward(prompts, completions)
    texts = [f"<user>{prompt}<assistant>So{'!' * k}" for k, prompt in enumerate(PROMPTS)]
    expected = torch.cat([alone(model, tokenizer, texts) for model in models], 1)
    assert reward.last is not None
    torch.testing.assert_close(reward.last.scores, expected, rtol=1e-4, atol=1e-4)


@needs_transformers
def test_a_text_without_a_token_is_not_scored(tokenizer: Any) -> None:
    reward = LSCReward(reward_model(tokenizer), processing_class=tokenizer, reference_reward=0.0)
    assert reward(["", "Why?"], ["", ""])[0] is None
    assert reward([""], [""]) == [None]


# versions


@needs_trl
def test_another_version_is_told_and_nothing_is_hooked(
    monkeypatch: pytest.MonkeyPatch, scores: Tensor
) -> None:
    from trl.trainer import utils

    before = utils.selective_log_softmax
    monkeypatch.setattr(_versions.metadata, "version", lambda package: "1.17.0")
    monkeypatch.delitem(sys.modules, "lsc_kernels.trainers.trl.trainers", raising=False)
    told = "trl 1.17.0 is installed, and this adapter knows trl>=1.16,<1.17 only"
    with pytest.raises(_versions.UnknownVersion, match=told):
        importlib.import_module("lsc_kernels.trainers.trl.trainers")
    with pytest.raises(_versions.UnknownVersion, match=told):
        _ = adapter.LSCGRPOTrainer
    with pytest.raises(_versions.UnknownVersion, match=told):
        adapter.patch()
    assert utils.selective_log_softmax is before
    trainer = Calling()
    with pytest.raises(_versions.UnknownVersion, match=told):
        call(LSCReward(scores_of(scores), reference_reward=0.0), log_metric=trainer.log_metric)
    agree(call(LSCReward(scores_of(scores), reference_reward=0.0)), lk.aggregate_rewards(scores, 0.0))


class Calling:
    """What a reward function sees of a trainer: the owner of ``log_metric``."""

    accelerator = type("Accelerator", (), {"device": torch.device("cpu"), "process_index": 1})()
    args: Any = None
    model = torch.nn.Identity()
    num_generations, num_generations_eval = 4, 2

    def log_metric(self, name: str, value: float) -> None:
        pass


@needs_trl
def test_a_group_that_is_spread_over_processes(scores: Tensor, generator: Generator) -> None:
    """This process has the second half of each of the two groups' batch: its references come from the whole."""
    first = 3 * torch.randn(8, 2, generator=generator)
    trainer = Calling()
    trainer.accelerator.gather = lambda own: torch.cat([first, own])
    reward = LSCReward(scores_of(scores), reference_reward=GroupQuantile())
    expected = leave_one_out_quantile(
        torch.cat([first, scores]).view(4, 4, 2), 0.85, method="median_unbiased"
    ).reshape(16, 2)[8:]
    agree(call(reward, log_metric=trainer.log_metric), lk.aggregate_rewards(scores, expected))
    trainer.model = torch.nn.Identity().eval()
    call(reward, log_metric=trainer.log_metric)
    assert reward.last is not None
    every = torch.cat([first, scores]).view(8, 2, 2)
    agree(reward.last.reference_reward, every.flip(1).reshape(16, 2)[8:])  # of two, the other one


# drop-ins


@pytest.fixture
def utils() -> Any:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'lsc-kernels[trl]'")
    return importlib.import_module("trl.trainer.utils")


SHAPES = [((3, 5), 1000), ((7,), 2), ((2, 1), 32001), ((2, 3, 2), 7)]


@pytest.mark.parametrize("shape, vocabulary", SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_drop_ins_on_ordinary_inputs(
    utils: Any,
    generator: Generator,
    shape: tuple[int, ...],
    vocabulary: int,
    temperature: float,
    masked: bool,
) -> None:
    """Values and gradients of the three functions, TRL's in fp64."""
    logits = 3 * torch.randn(*shape, vocabulary, generator=generator)
    index = torch.randint(vocabulary, shape, generator=generator)
    row_mask = (torch.rand(shape, generator=generator) < 0.7).int() if masked else None
    ours_leaf, theirs_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "row_mask": row_mask}
    ours = adapter.selective_log_softmax_and_entropy(ours_leaf, index, **options)
    theirs = utils.selective_log_softmax_and_entropy(theirs_leaf, index, **options)
    tolerances.check("logprobs", ours[0], theirs[0].detach(), tolerances.logprob(theirs[0].detach()))
    tolerances.check("entropy", ours[1], theirs[1].detach(), tolerances.entropy(theirs[1].detach()))
    assert torch.equal(adapter.selective_log_softmax(logits, index, **options), ours[0])
    tolerances.check(
        "entropy alone",
        adapter.entropy_from_logits(logits),
        utils.entropy_from_logits(logits.double()),
        tolerances.entropy(utils.entropy_from_logits(logits.double())),
    )
    upstream = torch.randn(2, *shape, generator=generator)
    (ours[0] * upstream[0] + ours[1] * upstream[1]).sum().backward()
    (theirs[0] * upstream[0] + theirs[1] * upstream[1]).sum().backward()
    assert ours_leaf.grad is not None and theirs_leaf.grad is not None
    torch.testing.assert_close(ours_leaf.grad.double(), theirs_leaf.grad, rtol=1e-5, atol=1e-5)
    _, detached = adapter.selective_log_softmax_and_entropy(ours_leaf, index, False)
    assert not detached.requires_grad


def test_drop_in_for_several_tokens_of_a_row(utils: Any, generator: Generator) -> None:
    logits = 3 * torch.randn(2, 3, 50, generator=generator)
    index = torch.randint(50, (2, 3, 4), generator=generator)
    theirs = utils.selective_log_softmax(logits.double(), index)
    tolerances.check(
        "top-k", adapter.selective_log_softmax(logits, index), theirs, tolerances.logprob(theirs)
    )


def test_drop_ins_on_hard_inputs(utils: Any, generator: Generator) -> None:
    """Where TRL's functions lose their digits, give NaN or stop, and what these give instead."""
    logits = 3 * torch.randn(4, 1000, generator=generator)
    index = torch.randint(1000, (4,), generator=generator)

    shifted = logits + 10_000
    truth = utils.selective_log_softmax(shifted.double(), index)
    theirs, ours = (
        each(shifted, index) for each in (utils.selective_log_softmax, adapter.selective_log_softmax)
    )
    assert (theirs - truth).abs().max() > 1e-4  # two numbers of 1e4 subtracted in fp32
    tolerances.check("shifted", ours, truth, tolerances.logprob(truth))

    half = logits.bfloat16()
    truth = utils.selective_log_softmax(half.double(), index)
    theirs, ours = (
        each(half, index) for each in (utils.selective_log_softmax, adapter.selective_log_softmax)
    )
    assert theirs.dtype is torch.bfloat16 and (theirs - truth).abs().max() > 1e-3
    tolerances.check("bf16", ours, truth, tolerances.logprob(truth))

    forbidden = logits.clone()
    forbidden[:, 500:] = -torch.inf  # a token that cannot come adds p log p = 0
    assert utils.entropy_from_logits(forbidden).isnan().all()
    truth = utils.entropy_from_logits(forbidden[:, :500].double())
    tolerances.check("-inf", adapter.entropy_from_logits(forbidden), truth, tolerances.entropy(truth))
    assert (adapter.selective_log_softmax(forbidden, torch.full((4,), 999)) == -torch.inf).all()

    ignored = torch.full((4,), -100)
    with pytest.raises((RuntimeError, IndexError)):
        utils.selective_log_softmax(logits, ignored)
    assert (adapter.selective_log_softmax(logits, ignored) == 0).all()
    with pytest.raises(RuntimeError):
        utils.selective_log_softmax(logits[:0], index[:0])
    assert adapter.selective_log_softmax(logits[:0], index[:0]).shape == (0,)

    # NaN under a mask: there it comes back by the gradient, 0 * NaN
    poisoned = logits.clone()
    poisoned[0] = torch.nan
    mask = torch.tensor([0, 1, 1, 1])
    gradients = []
    for function in (utils.selective_log_softmax, adapter.selective_log_softmax):
        leaf = poisoned.clone().requires_grad_()
        function(leaf, index, row_mask=mask).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad[0])
    assert gradients[0].isnan().any() and (gradients[1] == 0).all()


def test_patch_and_unpatch(utils: Any, generator: Generator) -> None:
    a2po = importlib.import_module("trl.experimental.a2po.a2po_trainer")
    before = {name: getattr(utils, name) for name in ("selective_log_softmax", "entropy_from_logits")}
    try:
        done = adapter.patch()
        assert "trl.trainer.utils.entropy_from_logits" in done
        assert "trl.experimental.a2po.a2po_trainer.selective_log_softmax" in done
        assert a2po.selective_log_softmax is adapter.selective_log_softmax
        assert adapter.patch() == []
        forbidden = torch.tensor([[0.0, -torch.inf]])
        assert utils.selective_log_softmax_and_entropy(forbidden, torch.tensor([0]))[1] == 0
    finally:
        adapter.unpatch()
    assert all(getattr(utils, name) is function for name, function in before.items())
    assert a2po.selective_log_softmax is before["selective_log_softmax"]


# the trainers


@pytest.fixture(scope="module")
def offline() -> Iterator[None]:
    """Nothing is asked of a hub, and nothing told."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'lsc-kernels[trl]'")
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield


@pytest.fixture(scope="module")
def policy(offline: None, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random policy, from which TRL also loads the reference."""
    from lsc_kernels.demo.models import build_language_model

    folder = tmp_path_factory.mktemp("trl") / "policy"
    build_language_model(tokenizer, hidden_size=16, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(**options: Any) -> dict[str, Any]:
    return {
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 9,
        },
        **{"learning_rate": 0.05, "beta": 0.3, "use_cpu": True, "bf16": False, "report_to": []},
        **{"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **options},
    }


def letters(completions: list[str], **columns: Any) -> list[float | None]:
    """Scores that differ; one completion in each batch has none."""
    return [None if row == 5 else 0.3 * len(set(text)) for row, text in enumerate(completions)]


def trained(kind: str, policy: Path, tokenizer: Any, reward: Any, own: Any = None, **options: Any) -> Any:
    """A trainer after its steps, with each batch that it made, as ``batches``."""
    import trl
    from datasets import Dataset

    base = {"grpo": trl.GRPOTrainer, "rloo": trl.RLOOTrainer, "lsc": adapter.LSCGRPOTrainer}[kind]
    config = {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig, "lsc": trl.GRPOConfig}[kind]

    class Recording(base):  # type: ignore[misc, valid-type]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            self.batches.append({**batch, "policy": self.logits(self.model, batch)})
            self.batches[-1]["ref"] = self.logits(self.ref_model, batch)
            return batch

        def logits(self, model: Any, batch: Any) -> Tensor:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            with torch.no_grad():
                logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return logits[:, -batch["completion_ids"].shape[1] - 1 : -1]

    Recording.__name__ = base.__name__
    Recording.batches = []
    trainer = Recording(
        model=str(policy),
        reward_funcs=reward,
        args=config(output_dir=str(policy.parent / "run"), **settings(**options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS, "good": [0.5, 1.0, 1.5, 2.0]}),
        processing_class=tokenizer,
        **(own or {}),
    )
    trainer.train()
    assert len(trainer.batches) == trainer.args.max_steps
    return trainer


def utilities(reward: LSCReward) -> Tensor:
    assert reward.last is not None
    return lk.lsc_transform(reward.last.scores[:, 0], reward.last.reference_reward[:, 0])


def centred(utility: Tensor) -> Tensor:
    """What is left of the mean of a group's others, which have a reward."""
    return torch.stack([row - row.nanmean() for row in utility.view(-1, 4)]).flatten().nan_to_num(0.0)


@pytest.mark.parametrize("scale", ["none", "group"])
def test_grpo_with_our_reward(policy: Path, tokenizer: Any, scale: str) -> None:
    """Rewards and advantages in GRPOTrainer, with a missing reward; the KL that it logs from its loss."""
    reward = LSCReward(letters, names=["letters"], reference_reward="good")
    if scale == "group":
        with pytest.warns(GroupScalingWarning, match='scale_rewards="group" divides rewards by their spread'):
            trainer = trained("grpo", policy, tokenizer, reward, scale_rewards=scale)
    else:
        trainer = trained("grpo", policy, tokenizer, reward, scale_rewards=scale)
    utility = utilities(reward)
    assert utility.isnan().tolist() == [False] * 5 + [True] + [False] * 2
    found = trainer._logs["advantages"]
    expected = centred(utility)
    if scale == "group":
        kept = utility[:4]  # the group without a gap
        expected[:4] = lk.group_advantages(kept, 4, method="grpo")
        torch.testing.assert_close(torch.tensor(found)[-8:-4], expected[:4], rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(torch.tensor(found)[-8:], expected, rtol=1e-5, atol=1e-6)
        log = [each for each in trainer.state.log_history if "lsc/p_good" in each]
        assert log[-1]["rewards/lsc/mean"] == pytest.approx(float(utility.nanmean()), rel=1e-4)
        assert log[-1]["lsc/letters/missing"] == 1 / 8
        batch = trainer.batches[-1]
        mask = batch["completion_mask"]
        both = lk.token_kl(
            batch["policy"], batch["ref"], batch["completion_ids"], mask=mask, **lk.preset("trl").token_kl
        )
        assert log[-1]["kl"] == pytest.approx(float(both.kl.sum() / mask.sum()), rel=1e-3)


def test_rloo_with_our_reward(policy: Path, tokenizer: Any) -> None:
    """RLOOTrainer's k1 in the reward of a sequence, and its leave-one-out baseline."""
    reward = LSCReward(letters, names=["letters"], reference_reward=GroupQuantile(0.6))
    trainer = trained("rloo", policy, tokenizer, reward)
    batch, utility = trainer.batches[-1], utilities(reward)
    mask = batch["completion_mask"]
    options = lk.preset("trl", kl="k1")
    kl = lk.token_kl(batch["policy"], batch["ref"], batch["completion_ids"], mask=mask, **options.token_kl).kl
    sequence = lk.token_rewards(utility, kl, mask, beta=0.3, **options.token_rewards).sum(-1)
    whole = torch.tensor(trainer._logs["advantages"])[-8:]
    expected = lk.group_advantages(sequence[:4], 4, method="rloo")
    torch.testing.assert_close(whole[:4], expected, rtol=1e-4, atol=1e-5)
    assert whole[5] == 0.0
    three = sequence[[4, 6, 7]]
    torch.testing.assert_close(
        whole[[4, 6, 7]], lk.group_advantages(three, 3, method="rloo"), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kl, gamma, dense", [("k1", 1.0, False), ("k3", 0.9, True)])
def test_kl_in_the_rewards_of_tokens(
    policy: Path, tokenizer: Any, kl: str, gamma: float, dense: bool
) -> None:
    """LSCGRPOTrainer's rewards, KL and advantages are those of our functions from the logits."""
    reward = LSCReward(letters, names=["letters"], reference_reward="good")

    def token_reward(completion_ids: list[list[int]], good: list[float], **columns: Any) -> list[list[float]]:
        return [
            [0.1 * (token % 7) + level for token in ids]
            for ids, level in zip(completion_ids, good, strict=True)
        ]

    own = {"kl": kl, "gamma": gamma, "token_reward": token_reward if dense else None}
    trainer = trained("lsc", policy, tokenizer, reward, own, scale_rewards="none", pad_to_multiple_of=4)
    batch = trainer.batches[-1]
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    assert ids.shape[1] % 4 == 0
    utility = utilities(reward)
    scored = utility.nan_to_num(0.0)
    shaped = lk.shaped_rewards(
        *(None, None, 0.0, batch["policy"], batch["ref"], ids, mask),
        scores=scored.unsqueeze(1),
        **{"beta": 0.3, "kl": kl, "weights": torch.zeros(1)},
    )  # the chain without its reward: the advantage goes to the last token, in its place
    torch.testing.assert_close(batch["token_kl"], shaped.kl, rtol=1e-3, atol=1e-5)
    expected = shaped.rewards + lk.token_rewards(
        centred(utility), torch.zeros_like(shaped.kl), mask, beta=0.0
    )
    if dense:
        good = torch.tensor([[0.5, 1.0, 1.5, 2.0][PROMPTS.index(text)] for text in trainer._logs["prompt"]])[
            -8:
        ]
        expected += torch.where(mask.bool(), 0.1 * (ids % 7) + good.unsqueeze(1), 0.0)
    torch.testing.assert_close(batch["token_rewards"], expected, rtol=1e-3, atol=1e-5)
    returns = lk.discounted_returns(expected, mask, gamma=gamma)
    torch.testing.assert_close(batch["advantages"], returns, rtol=1e-3, atol=1e-5)
    log = [each for each in trainer.state.log_history if "kl" in each]
    assert log[-1]["kl"] == pytest.approx(float(shaped.kl.sum() / mask.sum()), rel=1e-3, abs=1e-6)
    assert log[-1]["kl"] != 0.0 and trainer.beta == 0.3


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch knows no process groups")
def test_two_processes_that_share_each_group(policy: Path) -> None:
    """References, advantages and the logged KL are those of the whole group, on both; the worker compares them."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(Path(__file__).with_name("_two_processes.py")), str(policy)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(lk.__file__).parents[1])},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f"process {rank}: 2 batches agree" in run.stdout for rank in range(2)), run.stdout


@needs_trl
def test_the_loss_has_no_kl_of_its_own(policy: Path, tokenizer: Any) -> None:
    """Advantages of 0 leave nothing, whatever the reference says; and per-token ones are what the loss multiplies."""
    trainer = trained("lsc", policy, tokenizer, letters, scale_rewards="none", loss_type="grpo", max_steps=1)
    batch = {name: value for name, value in trainer.batches[0].items() if name not in ("policy", "ref")}
    zeros = torch.zeros_like(batch["advantages"])
    assert trainer._compute_loss(trainer.model, {**batch, "advantages": zeros}).item() == 0.0
    mask, advantages = batch["completion_mask"], batch["advantages"]
    loss = trainer._compute_loss(trainer.model, batch)  # ratios are 1: what is left are the advantages
    each = -(advantages * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(loss.detach(), each.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", [{"loss_type": "luspo"}, {"importance_sampling_level": "sequence"}])
def test_options_for_one_advantage_per_sequence(policy: Path, tokenizer: Any, option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}='.*' wants one advantage per sequence"):
        trained("lsc", policy, tokenizer, letters, **option)


def test_token_rewards_of_another_length(policy: Path, tokenizer: Any) -> None:
    own = {"token_reward": lambda completion_ids, **columns: [[0.0]] * len(completion_ids)}
    with pytest.raises(ValueError, match="one score per id of each completion"):
        trained("lsc", policy, tokenizer, letters, own)


HARD = torch.tensor([0.0, 1e-4, -1e-4, 3.0, -3.0, 20.0, -20.0, -80.0])


@needs_trl
@pytest.mark.parametrize("corrected", [False, True])
def test_preset_against_the_loss_of_grpo(
    policy: Path, tokenizer: Any, generator: Generator, corrected: bool
) -> None:
    """The KL in GRPOTrainer's own loss, value and gradient, at given log-probabilities; then where it breaks."""
    trainer = trained(
        "grpo", policy, tokenizer, letters, scale_rewards="none", loss_type="grpo", max_steps=1,
        use_bias_correction_kl=corrected,
    )  # fmt: skip
    logp = -5 * torch.rand(4, 8, generator=generator) - 1
    old = logp - 0.3 * torch.randn(4, 8, generator=generator)
    mask = (torch.arange(8) < torch.tensor([[8], [5], [1], [7]])).int()

    def loss(difference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss and its gradient, TRL's and ours."""
        theirs, ours = logp.clone().requires_grad_(), logp.clone().requires_grad_()
        trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (theirs, torch.zeros(4, 8), None)
        batch = {
            **{name: torch.ones(4, 1, dtype=torch.int64) for name in ("prompt_ids", "prompt_mask")},
            **{"completion_ids": torch.ones(4, 8, dtype=torch.int64), "completion_mask": mask},
            **{"advantages": torch.zeros(4), "ref_per_token_logps": logp - difference},
            "old_per_token_logps": old,
        }
        value = trainer._compute_loss(trainer.model, batch)
        value.backward()
        options = lk.preset("trl").token_kl | ({"old_logprobs": old} if corrected else {})
        kl = lk.kl_from_logprobs(ours, logp - difference, mask=mask, **options)
        own = 0.3 * (kl.sum(1) / mask.sum(1)).mean()
        own.backward()
        assert theirs.grad is not None and ours.grad is not None
        return value.detach(), own.detach(), theirs.grad, ours.grad

    ordinary = HARD[:5][torch.randint(5, (4, 8), generator=generator)]
    value, own, gradient, own_gradient = loss(ordinary)
    torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-4, atol=1e-6)

    # log pi - log ref = -200 after the end of a completion: exp overflows, and inf * 0 is NaN in the whole batch.
    # What a mask leaves out does not reach ours.
    hard = ordinary.clone()
    hard[2, 4] = -200.0
    value, own, gradient, own_gradient = loss(hard)
    assert value.isnan() and gradient.isnan().any()
    assert own.isfinite() and own_gradient.isfinite().all() and own_gradient[2, 4] == 0
    # the same at a token that counts: both are inf, as k3 without a clamp is, and only in that place
    hard = ordinary.clone()
    hard[0, 2] = -200.0
    value, own, gradient, own_gradient = loss(hard)
    assert value == torch.inf and own == torch.inf
    if not corrected:
        assert own_gradient[0, 2] == -torch.inf
    assert own_gradient.isfinite().sum() >= 31


@needs_trl
@pytest.mark.parametrize("center", [None, 0.1])
def test_reward_training(
    offline: None, tokenizer: Any, generator: Generator, tmp_path: Path, center: float | None
) -> None:
    """Our loss in RewardTrainer: TRL's own value and gradient on the same batch, and fp32 digits of bf16 scores."""
    import trl
    from datasets import Dataset

    rows = {
        "chosen": [f"{prompt} Yes." for prompt in PROMPTS],
        "rejected": [f"{prompt} No, never." for prompt in PROMPTS],
        "margin": [0.0, 0.5, 1.0, 2.0],
    }
    config = trl.RewardConfig(
        output_dir=str(tmp_path),
        center_rewards_coefficient=center,
        **{"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True},
        **{"bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1},
    )
    trainers = [
        kind(
            model=reward_model(tokenizer),
            args=config,
            train_dataset=Dataset.from_dict(rows),
            processing_class=tokenizer,
        )
        for kind in (trl.RewardTrainer, adapter.LSCRewardTrainer)
    ]
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())
    for trainer in trainers:
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.compute_loss(trainer.model, dict(batch)).backward()
    batch = next(iter(trainers[0].get_train_dataloader()))
    for with_margin in (True, False):
        given = {name: value for name, value in batch.items() if with_margin or name != "margin"}
        theirs, ours = (trainer.compute_loss(trainer.model, dict(given)) for trainer in trainers)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        gradients = [torch.autograd.grad(loss, trainer.model.score.weight)[0]
                     for loss, trainer in zip((theirs, ours), trainers, strict=True)]  # fmt: skip
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    half = adapter.LSCRewardTrainer.compute_loss(
        trainers[1], torch.nn.Module.to(trainers[1].model, torch.bfloat16), dict(batch), return_outputs=True
    )
    chosen, rejected = half[1].logits.double().squeeze(-1).chunk(2)
    truth = lk.bradley_terry_loss(chosen, rejected, margin=batch["margin"].double(), center=center or 0.0)
    assert half[0].dtype is torch.float32
    torch.testing.assert_close(half[0].double(), truth, rtol=1e-6, atol=1e-7)
    torch.nn.Module.to(trainers[1].model, torch.float32)
    trainers[1].train()
    logged = [each for each in trainers[1].state.log_history if "loss" in each]
    assert len(logged) == 2 and "accuracy" in logged[0]
