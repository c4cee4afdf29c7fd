"""``lsc-kernels score`` on tiny models made on the spot, against each row computed alone in plain PyTorch.

Where numbers are compared the models run in float64, so that batching and padding cannot hide behind
rounding: what remains is the float32 of the output file, of the reward arithmetic and of the norms inside
Llama, a few units of 2^-23 (`CLOSE`).
"""

# ruff: noqa: E402  (the extras are looked for before what needs them is imported)

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

for extra in ("transformers", "datasets", "pyarrow", "rich", "matplotlib"):
    pytest.importorskip(extra, reason=f"{extra} comes with: pip install 'lsc-kernels[hf,plot]'")

import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import transformers
from rich.console import Console

from lsc_kernels import errors, files
from lsc_kernels.cli import main
from lsc_kernels.score import ScoreConfig, batching, data, encode, extras, pipeline, progress
from lsc_kernels.score import models as score_models

CLOSE = {"rtol": 2e-6, "atol": 2e-6}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WORDS = "yes no maybe the a cat dog sat on mat why how do you know because it is so said".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"


# Models and data


def byte_tokenizer(*more: str, **special: str) -> transformers.PreTrainedTokenizerFast:
    """One token per byte: any text, nothing to train; ``more`` are special tokens without a role."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special.values(), *(letter for letter in alphabet if letter not in special.values())]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(more))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, with the special tokens of an encoder around each text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def save(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Zoo:
    """Folders of saved models."""

    policy: str
    ref: str
    llama: str  # reward model with a plain head, no padding token at all
    gpt2: str  # reward model with a plain head, its padding token is its end-of-text token
    bert: str  # reward model with a pooled head and two scores
    chat: str  # policy with a chat template
    other: str  # policy with another vocabulary of the same size


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    # Large weights: the fresh ones of a configuration give nearly flat logits, where every error is small.
    wide = {"initializer_range": 0.3}
    texts = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    chats = byte_tokenizer("<|start|>", bos_token="<s>", eos_token="<|end|>")
    chats.chat_template = CHAT_TEMPLATE

    def gpt2(kind: Any, tokenizer: Any, **more: Any) -> Any:
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 512}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return kind(transformers.GPT2Config(vocab_size=len(tokenizer), **size, **ids, **wide, **more))

    policy = gpt2(transformers.GPT2LMHeadModel, texts)
    policy_folder = save(folder / "policy", policy, texts)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.03 * torch.randn_like(weight))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=len(texts), num_labels=1, pad_token_id=None, **size, **wide)
    )
    eos_padded = byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="</s>")
    plain = gpt2(
        transformers.GPT2ForSequenceClassification,
        eos_padded,
        num_labels=1,
        pad_token_id=eos_padded.pad_token_id,
    )
    words = word_tokenizer()
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(words), num_labels=2, max_position_embeddings=128, **size, **wide
        )
    )
    return Zoo(
        policy=policy_folder,
        ref=save(folder / "ref", policy, texts),
        llama=save(folder / "llama", llama, texts),
        gpt2=save(folder / "gpt2", plain, eos_padded),
        bert=save(folder / "bert", bert, words),
        other=save(folder / "other", policy, byte_tokenizer(bos_token="<t>", eos_token="</s>")),
        chat=save(folder / "chat", gpt2(transformers.GPT2LMHeadModel, chats), chats),
    )


def some_text(random: np.random.Generator, least: int, most: int) -> str:
    return " ".join(random.choice(WORDS, size=random.integers(least, most + 1)))


def some_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts and responses of very different lengths, some prompts with several responses."""
    random = np.random.default_rng(seed)
    prompts = [some_text(random, 1, 20) + "?" for _ in range(max(1, 2 * count // 3))]
    return [
        {"id": f"r{i}", "prompt": prompts[i % len(prompts)], "response": " " + some_text(random, 1, 15)}
        for i in range(count)
    ]


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def command(zoo: Zoo, source: Any, out: Path, *more: str, rewards: Sequence[str] | None = None) -> list[str]:
    models = [zoo.llama, zoo.gpt2] if rewards is None else rewards
    given = ["score", "--data", str(source), "--policy", zoo.policy, "--ref", zoo.ref, "--out", str(out)]
    for model in models:
        given += ["--reward-model", model]
    return [*given, *more]


def score(*args: Any, **options: Any) -> list[dict[str, Any]]:
    """Run the command and read back its output."""
    given = command(*args, **options)
    assert main(given) == 0
    return pq.read_table(given[given.index("--out") + 1]).to_pylist()


# Each row alone, in plain PyTorch


@functools.cache
def load(folder: str, kind: Any) -> tuple[Any, Any]:
    model = kind.from_pretrained(folder, dtype=torch.float64).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def row_alone(
    zoo: Zoo, prompt: str, response: str, kl: Callable[..., Any], temperature: float = 1.0
) -> dict[str, Any]:
    """Log-probabilities and KL of one response, without batch or padding."""
    policy, tokenizer = load(zoo.policy, transformers.AutoModelForCausalLM)
    ref, _ = load(zoo.ref, transformers.AutoModelForCausalLM)
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id]])
    one, other = (
        torch.log_softmax(model(ids).logits[0, start - 1 : -1] / temperature, dim=-1)
        for model in (policy, ref)
    )
    at = ids[0, start:, None]
    logprobs, ref_logprobs = one.gather(1, at)[:, 0], other.gather(1, at)[:, 0]
    return {
        "token_ids": ids[0, start:].tolist(),
        "logprobs": logprobs.numpy(),
        "ref_logprobs": ref_logprobs.numpy(),
        "kl": kl(logprobs - ref_logprobs, one, other).numpy(),
    }


KL = {
    "k1": lambda d, one, other: d,
    "abs": lambda d, one, other: d.abs(),
    "k2": lambda d, one, other: d**2 / 2,
    "k3": lambda d, one, other: torch.exp(-d) - 1 + d,
    "full": lambda d, one, other: (one.exp() * (one - other)).sum(-1),
    "full_reverse": lambda d, one, other: (other.exp() * (other - one)).sum(-1),
}


@torch.no_grad()
def reward_alone(folder: str, text: str) -> np.ndarray:
    """Scores of one text by the model's own forward pass; one row needs no padding."""
    model, tokenizer = load(folder, transformers.AutoModelForSequenceClassification)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert ids[0, -1] != model.config.pad_token_id  # else the model itself would pool at the wrong place
    return model(ids).logits[0].numpy()


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -np.asarray(z, dtype=np.float64))


def column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


# Numbers


@pytest.mark.parametrize("kl", KL)
def test_tokens_match_each_row_alone(zoo: Zoo, tmp_path: Path, kl: str) -> None:
    records = some_records(5, seed=1)
    temperature = 0.7
    options = ("--kl", kl, "--temperature", str(temperature), "--dtype", "float64", "--beta", "0.3")
    rows = score(zoo, write_lines(tmp_path / "d.jsonl", records), tmp_path / "out.parquet", *options)
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    for row, record in zip(rows, records, strict=True):
        truth = row_alone(zoo, record["prompt"], record["response"], KL[kl], temperature)
        assert row["token_ids"] == truth["token_ids"]
        for name in ("logprobs", "ref_logprobs", "kl"):
            np.testing.assert_allclose(row[name], truth[name], **CLOSE, err_msg=name)
        rewards = -0.3 * truth["kl"]
        rewards[-1] += row["utility"]
        np.testing.assert_allclose(row["rewards"], rewards, **CLOSE)


def test_scores_and_utilities_match_each_row_alone(zoo: Zoo, tmp_path: Path) -> None:
    """Three kinds of head: no padding token, padding token = end of text, pooled with two scores."""
    records = some_records(9, seed=2)
    names = ["helpful", "harmless", "short", "polite"]
    options = ["--names", ",".join(names), "--dtype", "float64", "--reference", "quantile:0.6"]
    options += ["--scale", "0.5,1,2,1.5", "--floor", "0,0.1,0,0.02", "--weights", "1,2,0.5,1"]
    models = [zoo.llama, zoo.gpt2, zoo.bert]
    rows = score(
        zoo, write_lines(tmp_path / "d.jsonl", records), tmp_path / "out.parquet", *options, rewards=models
    )
    truth = np.array(
        [
            np.concatenate([reward_alone(model, record["prompt"] + record["response"]) for model in models])
            for record in records
        ]
    )
    reference = np.quantile(truth, 0.6, axis=0)
    z = (truth - reference) / [0.5, 1, 2, 1.5]
    floor = np.array([0, 0.1, 0, 0.02])
    good = floor + (1 - floor) * np.exp(log_sigmoid(z))
    slope = (1 - floor) * np.exp(log_sigmoid(z) + log_sigmoid(-z)) / good
    for k, name in enumerate(names):
        np.testing.assert_allclose(column(rows, f"score_{name}"), truth[:, k], **CLOSE)
        np.testing.assert_allclose(column(rows, f"reference_{name}"), np.full(9, reference[k]), **CLOSE)
        np.testing.assert_allclose(column(rows, f"utility_{name}"), np.log(good[:, k]), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            column(rows, f"marginal_utility_{name}"), slope[:, k], rtol=1e-5, atol=1e-5
        )
    weights = [1, 2, 0.5, 1]
    np.testing.assert_allclose(column(rows, "utility"), np.log(good) @ weights, rtol=1e-5, atol=1e-5)
    assert [row["binding"] for row in rows] == [names[k] for k in (slope * weights).argmax(axis=1)]


def test_batches_and_padding_change_nothing(zoo: Zoo, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "d.jsonl", some_records(20, seed=3))
    together, alone = (
        score(
            zoo,
            source,
            tmp_path / f"{name}.parquet",
            *options,
            "--dtype",
            "float64",
            rewards=[zoo.llama, zoo.bert],
        )
        for name, options in (("together", ("--max-tokens", "100000")), ("alone", ("--batch-size", "1")))
    )
    assert_same_rows(together, alone, **CLOSE)


def assert_same_rows(
    one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], **close: float
) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, float) or (isinstance(value, list) and name != "token_ids"):
                np.testing.assert_allclose(value, right[name], **close, err_msg=name)
            else:
                assert value == right[name], name


def test_pools_the_last_token_even_where_it_is_the_padding_token(zoo: Zoo, tmp_path: Path) -> None:
    """With padding = end of text, the model's own forward pass would score the token before the end."""
    records = some_records(6, seed=4)
    options = ("--eos", "all", "--dtype", "float64", "--names", "r")
    rows = score(
        zoo, write_lines(tmp_path / "d.jsonl", records), tmp_path / "o.parquet", *options, rewards=[zoo.gpt2]
    )
    model, tokenizer = load(zoo.gpt2, transformers.AutoModelForSequenceClassification)
    for row, record in zip(rows, records, strict=True):
        ids = tokenizer(record["prompt"] + record["response"])["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            hidden = model.transformer(torch.tensor([ids])).last_hidden_state
            right = model.score(hidden)[0, -1, 0].item()
            own = model(torch.tensor([ids])).logits.item()
        assert row["score_r"] == pytest.approx(right, rel=2e-6, abs=2e-6)
        assert abs(own - right) > 1e-3  # the trap is there


def test_reward_model_whose_scores_padding_changes_runs_row_by_row(zoo: Zoo, tmp_path: Path) -> None:
    """A head that averages over all positions, padding included."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    class Averaging(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
            hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            return SequenceClassifierOutput(logits=self.score(hidden).mean(1))

    model = Averaging.from_pretrained(zoo.llama, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.llama)
    records = some_records(5, seed=5)
    config = ScoreConfig(
        records, zoo.policy, zoo.ref, [(model, tokenizer)], tmp_path / "o.parquet", names=["mean"]
    )
    pipeline.score(config, progress=False)
    for row, record in zip(pq.read_table(tmp_path / "o.parquet").to_pylist(), records, strict=True):
        ids = torch.tensor([tokenizer(record["prompt"] + record["response"])["input_ids"]])
        with torch.no_grad():
            assert row["score_mean"] == pytest.approx(model(ids).logits.item(), rel=2e-6, abs=2e-6)


def test_only_response_positions_reach_the_output_head(zoo: Zoo) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo.policy)
    tokenizer = transformers.AutoTokenizer.from_pretrained(zoo.policy)
    scorer = score_models.CausalScorer(score_models.LoadedModel(model, tokenizer, "policy", ""))
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    ids, mask = batching.pad_right([[5, 6, 7, 8, 9], [5, 6, 7]], 0, torch.device("cpu"))
    rows, positions = torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1])
    with torch.no_grad():
        logits = scorer.logits(ids, mask, rows, positions)
        everything = model(ids, attention_mask=mask).logits
    assert seen[0] == (1, 3, model.config.vocab_size)
    torch.testing.assert_close(logits, everything[rows, positions])


@pytest.mark.parametrize(
    ("placement", "more", "at"), [("last", 0, -1), ("before_last", 0, -2), ("eos_plus_one", 1, -1)]
)
def test_placement(zoo: Zoo, tmp_path: Path, placement: str, more: int, at: int) -> None:
    source = write_lines(tmp_path / "d.jsonl", some_records(4))
    rows = score(zoo, source, tmp_path / "o.parquet", "--placement", placement, "--beta", "0.2")
    for row in rows:
        assert len(row["rewards"]) == len(row["kl"]) + more
        expected = -0.2 * np.array(row["kl"] + [0.0] * more)
        expected[at] += row["utility"]
        np.testing.assert_allclose(row["rewards"], expected, **CLOSE)


# Reference rewards


def test_references_of_every_kind(zoo: Zoo, tmp_path: Path) -> None:
    records = [{**record, "bar": 0.25 * i} for i, record in enumerate(some_records(9, seed=6))]
    rules = ["0.5", "column:bar", "canned:no maybe", "prompt-quantile:0.75"]
    options = [word for rule in rules for word in ("--reference", rule)]
    options += ["--names", "number,column,canned,prompt", "--dtype", "float64"]
    models = [zoo.bert, zoo.llama, zoo.gpt2]
    rows = score(
        zoo, write_lines(tmp_path / "d.jsonl", records), tmp_path / "o.parquet", *options, rewards=models
    )
    assert column(rows, "reference_number") == pytest.approx([0.5] * 9)
    assert column(rows, "reference_column") == pytest.approx([0.25 * i for i in range(9)])
    canned = [reward_alone(zoo.llama, record["prompt"] + " no maybe")[0] for record in records]
    np.testing.assert_allclose(column(rows, "reference_canned"), canned, **CLOSE)
    scores = column(rows, "score_prompt")
    for row in rows:
        shared = np.array([other["prompt"] == row["prompt"] for other in rows])
        # A response alone with its prompt is compared with the whole file, not with itself.
        among = scores[shared] if shared.sum() > 1 else scores
        assert row["reference_prompt"] == pytest.approx(np.quantile(among, 0.75), rel=2e-6, abs=2e-6)
    assert {len([r for r in records if r["prompt"] == record["prompt"]]) for record in records} == {1, 2}


# Formats


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


HALF = "\ud83d"  # a lone surrogate: what a text cut in the middle of a character may end in
PROMPT, YES, NO = "\n\nHuman: why?\n\nAssistant:", " because", " no"


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        ({"prompt": "a", "response": "b"}, [(None, "a", "b")]),
        ({"prompt": "a", "completion": "b"}, [(None, "a", "b")]),
        ({"prompt": chat("why?"), "completion": chat("", "so")[1:]}, [(None, (("user", "why?"),), "so")]),
        ({"messages": chat("why?", "so")}, [(None, (("user", "why?"),), "so")]),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "why?"}]},
                    *chat("", "so")[1:],
                ]
            },
            [(None, (("user", "why?"),), "so")],
        ),
        (
            {"chosen": dialogue("why?", "because"), "rejected": dialogue("why?", "no")},
            [("chosen", PROMPT, YES), ("rejected", PROMPT, NO)],
        ),
        (
            {"prompt": PROMPT, "chosen": YES, "rejected": NO},
            [("chosen", PROMPT, YES), ("rejected", PROMPT, NO)],
        ),
        (
            {"prompt": PROMPT, "chosen": PROMPT + YES, "rejected": PROMPT + NO},
            [("chosen", PROMPT, YES), ("rejected", PROMPT, NO)],
        ),
        (
            {"chosen": chat("why?", "so"), "rejected": chat("why?", "no")},
            [("chosen", (("user", "why?"),), "so"), ("rejected", (("user", "why?"),), "no")],
        ),
        (
            {"prompt": "why?", "chosen": chat("", "so")[1:], "rejected": chat("", "no")[1:]},
            [("chosen", (("user", "why?"),), "so"), ("rejected", (("user", "why?"),), "no")],
        ),
        (
            {"prompt": chat("why?"), "chosen": chat("why?", "so"), "rejected": chat("why?", "no")},
            [("chosen", (("user", "why?"),), "so"), ("rejected", (("user", "why?"),), "no")],
        ),
    ],
)
def test_kinds_of_record(record: dict[str, Any], rows: list[tuple[Any, Any, str]]) -> None:
    assert [(e.side, e.prompt, e.response) for e in data.examples_of(1, record)] == rows


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ([1, 2], "not an object"),
        ({"prompt": "a"}, "no response"),
        ({"response": "a"}, "no prompt"),
        ({"text": "a"}, "neither prompt and response"),
        ({"prompt": "a", "response": " \n"}, "response is empty"),
        ({"prompt": "a", "response": 3}, "response is neither text nor a list of messages"),
        ({"chosen": "a"}, "chosen but no rejected"),
        ({"chosen": "a", "rejected": "b"}, "share no beginning"),
        ({"chosen": dialogue("a", "b"), "rejected": dialogue("a", "")}, "rejected response is empty"),
        ({"chosen": "a", "rejected": chat("a", "b")}, "different kinds"),
        ({"messages": chat("a")}, "does not end with a turn of the assistant"),
        ({"messages": chat("", "b")[1:]}, "no turn before the response"),
        ({"messages": [{"role": "user"}, *chat("", "b")[1:]]}, "content of a message is not text"),
        ({"messages": ["a"]}, "a role and a content"),
        ({"prompt": [], "response": "a"}, "prompt is empty"),
        ({"messages": 1}, "messages is no list of messages"),
        ({"prompt": "a", "response": HALF}, "response holds half a character"),
        ({"prompt": HALF, "response": "a"}, "prompt holds half a character"),
        ({"prompt": chat(HALF), "response": "a"}, "prompt holds half a character"),
        ({"id": HALF, "prompt": "a", "response": "a"}, "id holds half a character"),
        ({"prompt": "a", "chosen": "a", "rejected": HALF}, "rejected holds half a character"),
    ],
)
def test_records_that_cannot_be_scored(record: Any, says: str) -> None:
    with pytest.raises(data.BadRecord, match=re.escape(says)):
        data.examples_of(1, record)


def test_all_sources_read_the_same(tmp_path: Path) -> None:
    import datasets

    records = some_records(5)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "d.jsonl").write_text(lines)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "d.json").write_text(json.dumps(records, indent=1))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet")
    table = datasets.Dataset.from_list(records)
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"test": table, "train": table.select([0])}).save_to_disk(tmp_path / "splits")
    names = ("d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "saved", "splits:test")
    expected = [data.examples_of(i, record) for i, record in enumerate(records, start=1)]
    for source in (records, *(str(tmp_path / name) for name in names)):
        assert list(data.Data(source)) == expected, source
    with pytest.raises(errors.UserError, match="several splits.*test"):
        data.Data(tmp_path / "splits")


def test_a_reference_beyond_single_precision_is_told() -> None:
    for value in (1e300, 10**400):
        with pytest.raises(data.BadRecord, match="holds a number beyond 1e.12"):
            data.examples_of(1, {"prompt": "a", "response": "b", "bar": value}, ["bar"])


@pytest.mark.parametrize(
    "before",
    [b" " * 3000, b"\xef\xbb\xbf", b"\xef\xbb\xbf" + b"\n" * 99],
    ids=["white space", "byte order mark", "both"],
)
def test_an_array_behind_white_space_or_a_byte_order_mark(tmp_path: Path, before: bytes) -> None:
    records = some_records(3)
    (tmp_path / "d.json").write_bytes(before + json.dumps(records).encode())
    assert list(data.Data(tmp_path / "d.json")) == list(data.Data(records))


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress("".join(map(json.dumps, some_records(400))).encode(), mtime=0))
    middle = len(packed) // 2
    packed[middle : middle + 40] = bytes(255 - byte for byte in packed[middle : middle + 40])
    with pytest.raises(zlib.error):
        zlib.decompress(packed, wbits=31)
    (tmp_path / "d.jsonl.gz").write_bytes(packed)
    with pytest.raises(errors.UserError, match=r"d\.jsonl\.gz: cannot be read after line"):
        data.Data(tmp_path / "d.jsonl.gz").scan()


def test_limit_takes_the_first_or_a_random_sample_in_order() -> None:
    records = some_records(30)
    first = [item[0].line for item in data.Data(records, limit=4)]
    assert first == [1, 2, 3, 4]
    drawn = [item[0].line for item in data.Data(records, limit=8, seed=1)]
    assert drawn == sorted(drawn) and len(set(drawn)) == 8 and drawn != list(range(1, 9))
    assert drawn == [item[0].line for item in data.Data(records, limit=8, seed=1)]


def test_bad_lines_are_told_by_number_and_do_not_stop(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [json.dumps(record).encode() for record in some_records(3)]
    lines = [good[0], b"{broken", b"", b'{"prompt": "x"}', good[1], b'{"prompt": "\xff"}', good[2], b"{also"]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    rows = score(zoo, tmp_path / "d.jsonl", tmp_path / "o.parquet")
    assert [row["line"] for row in rows] == [1, 5, 7]
    shown = capsys.readouterr()
    for text in (shown.err, shown.out):
        assert "not valid JSON: lines 2, 8" in text
        assert "has prompt but no response: line 4" in text
        assert "not UTF-8 text: line 6" in text
    assert "4 of 7 records left out" in shown.out


@pytest.mark.parametrize(
    ("inner", "says"),
    [
        (tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}), "tokenizer refuses it"),
        (tokenizers.models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []), "makes no tokens"),
    ],
)
def test_rows_that_a_tokenizer_cannot_encode_are_bad_lines_too(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], inner: Any, says: str
) -> None:
    """Known once models are loaded. Of words they do not know one tokenizer fails, one drops them."""
    words = tokenizers.Tokenizer(inner)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(zoo.llama)
    records = [{"prompt": "why", "response": response} for response in (" so", " 12345", " no")]
    source = write_lines(tmp_path / "d.jsonl", records)
    folder = save(tmp_path / "r", model, tokenizer)
    rows = score(zoo, source, tmp_path / "o.parquet", rewards=[folder])
    assert [row["line"] for row in rows] == [1, 3]
    shown = capsys.readouterr().out
    assert says in shown and "line 2" in shown and "1 of 3 records left out" in shown


# Text to tokens


def encoder(folder: str, **options: Any) -> encode.TextEncoder:
    given = {"limit": None, "chat": "auto", "append_eos": True, "for_policy": True, **options}
    return encode.TextEncoder(transformers.AutoTokenizer.from_pretrained(folder), **given)


def one_encoded(of: encode.TextEncoder, prompt: Any, response: str) -> encode.Encoded:
    return encode.encoded(of.encode([data.Example(1, None, None, prompt, response)])[0])


def test_chat_template_marks_where_the_response_starts(zoo: Zoo) -> None:
    of = encoder(zoo.chat)
    found = one_encoded(of, (("user", "why?"),), "so")
    assert of.tokenizer.decode(found.ids[: found.start]) == "<|start|>user\nwhy?<|end|>\n<|start|>assistant\n"
    # The line feed that the template adds behind the end of the turn is never sampled, so it is no action.
    assert of.tokenizer.decode(found.ids[found.start :]) == "so<|end|>"
    whole = one_encoded(encoder(zoo.chat, for_policy=False), (("user", "why?"),), "so")
    assert of.tokenizer.decode(whole.ids[whole.start :]) == "so<|end|>\n"


def test_chats_without_a_template_get_the_plain_format(zoo: Zoo) -> None:
    of = encoder(zoo.policy)
    found = one_encoded(of, (("system", "Be brief."), ("user", "why?")), "so")
    assert of.tokenizer.decode(found.ids[: found.start]) == "Be brief.\n\nHuman: why?\n\nAssistant:"
    assert of.tokenizer.decode(found.ids[found.start :]) == " so</s>"


def test_chat_always_puts_plain_prompts_into_the_template(zoo: Zoo) -> None:
    always, never = encoder(zoo.chat, chat="always"), encoder(zoo.chat, chat="never")
    turns = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert one_encoded(always, dialogue("a", "b", "c") + "\n\nAssistant:", " d") == one_encoded(
        always, turns, "d"
    )
    assert one_encoded(always, "why?", "so") == one_encoded(always, (("user", "why?"),), "so")
    assert never.tokenizer.decode(one_encoded(never, turns, "d").ids).startswith(
        "\n\nHuman: a\n\nAssistant: b"
    )


def test_a_chat_template_that_fails_is_told(zoo: Zoo) -> None:
    of = encoder(zoo.chat)
    of.tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    told = of.encode([data.Example(1, None, None, (("system", "x"), ("user", "y")), "z")])[0]
    assert isinstance(told, str) and "no system turns" in told


def test_a_token_across_the_border_belongs_to_the_response() -> None:
    vocabulary = {token: i for i, token in enumerate(["</s>", "a", "b", "c", "bc"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    of = encode.TextEncoder(tokenizer, limit=None, chat="auto", append_eos=True, for_policy=True)
    assert one_encoded(of, "ab", "ca") == encode.Encoded([1, 4, 1, 0], 1)


def test_an_empty_prompt_begins_with_the_first_token_of_a_text(zoo: Zoo) -> None:
    of = encoder(zoo.policy)
    found = one_encoded(of, "", "so")
    assert (found.ids[0], found.start) == (of.tokenizer.bos_token_id, 1)


@pytest.mark.parametrize("limit", range(2, 14))
def test_what_is_too_long_loses_the_oldest_prompt_first(zoo: Zoo, limit: int) -> None:
    whole = one_encoded(encoder(zoo.policy), "abcde", "vwxyz")
    cut = one_encoded(encoder(zoo.policy, limit=limit), "abcde", "vwxyz")
    assert len(cut.ids) == min(limit, len(whole.ids))
    kept_prompt, kept_response = cut.start, len(cut.ids) - cut.start
    assert kept_prompt >= 1 and kept_response >= 1
    assert cut.ids[: cut.start] == whole.ids[whole.start - kept_prompt : whole.start]
    assert cut.ids[cut.start :] == whole.ids[whole.start :][:kept_response]
    assert (cut.prompt_cut, cut.response_cut) == (whole.start - kept_prompt, 6 - kept_response)
    assert cut.response_cut == 0 or kept_prompt == 1


def test_special_tokens_of_an_encoder_survive_cutting(zoo: Zoo) -> None:
    of = encoder(zoo.bert, append_eos=False, for_policy=False, limit=6)
    cut = one_encoded(of, "why do you know", " because it is so")
    assert of.tokenizer.convert_ids_to_tokens(cut.ids) == ["[CLS]", "because", "it", "is", "so", "[SEP]"]
    tighter = encoder(zoo.bert, append_eos=False, for_policy=False, limit=4)
    found = tighter.tokenizer.convert_ids_to_tokens(one_encoded(tighter, "why", " because it is so").ids)
    assert found == ["[CLS]", "because", "it", "[SEP]"]


def test_cutting_is_counted_and_told(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": "a" * 50, "response": " b"}, {"prompt": "a", "response": " b"}]
    source = write_lines(tmp_path / "d.jsonl", records)
    rows = score(zoo, source, tmp_path / "o.parquet", "--max-length", "20")
    assert [row["prompt_tokens_cut"] for row in rows] == [50 + 3 - 20, 0]
    assert [len(row["token_ids"]) for row in rows] == [3, 3]
    assert "cut: 1 prompt, 1 reward model text\n" in capsys.readouterr().out


# Batches


def test_batches_hold_every_row_once_and_keep_their_bounds() -> None:
    random = np.random.default_rng(0)
    lengths, counted = random.integers(1, 90, 200).tolist(), random.integers(1, 40, 200).tolist()
    batches = batching.plan_batches(lengths, max_tokens=256, batch_size=9, counted=counted, max_counted=100)
    assert sorted(row for batch in batches for row in batch) == list(range(200))
    for batch in batches:
        assert len(batch) <= 9
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= 256
        assert len(batch) == 1 or sum(counted[row] for row in batch) <= 100


# Interrupting and resuming


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline, "WINDOW", 8)
    yield


def test_interrupted_runs_go_on_without_losing_or_repeating_a_row(
    zoo: Zoo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_windows: None,
) -> None:
    source = write_lines(tmp_path / "d.jsonl", some_records(20))
    options = ("--batch-size", "3", "--reference", "canned:no", "--reference", "quantile:0.5")
    whole = score(zoo, source, tmp_path / "whole.parquet", *options)
    scored: list[int] = []
    plain = pipeline._token_values
    stop_after = [4]

    def counting(run: Any, texts: Sequence[Any]) -> Any:
        if stop_after[0] == 0:
            raise KeyboardInterrupt
        stop_after[0] -= 1
        scored.append(len(texts))
        return plain(run, texts)

    monkeypatch.setattr(pipeline, "_token_values", counting)
    given = command(zoo, source, tmp_path / "o.parquet", *options)
    for again in ([], ["--resume"]):
        stop_after[0] = 4 if not again else 2
        assert main([*given, *again]) == 130
        assert "--resume goes on" in capsys.readouterr().err
        assert not (tmp_path / "o.parquet").exists()
    stop_after[0] = -1
    assert main([*given, "--resume"]) == 0
    assert sum(scored) == 20  # every row went through the models once
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == whole
    assert not list(tmp_path.glob("o.parquet.*"))
    # A finished run asked to resume has nothing to do, and says the same again.
    assert main([*given, "--resume"]) == 0
    assert sum(scored) == 20
    assert "complete already" in capsys.readouterr().err


def run_process(given: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lsc_kernels.cli", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **options,
    )


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a thing of POSIX")
def test_a_killed_process_is_resumed_to_the_same_bytes(zoo: Zoo, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "d.jsonl", some_records(80))
    # One row per batch: slow enough to be killed in the middle. One thread: the same order of sums.
    options = ("--batch-size", "1", "--checkpoint-seconds", "0", "--threads", "1")
    given = command(zoo, source, tmp_path / "o.parquet", *options)
    parts = tmp_path / "o.parquet.parts"
    process = run_process(given)
    deadline = time.monotonic() + 60
    while len(list(parts.glob("part-*.parquet"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = sum(pq.read_metadata(path).num_rows for path in parts.glob("part-*.parquet"))
    assert 0 < kept < 80
    (parts / "part-000000-999999.parquet.tmp").write_bytes(b"PAR1")  # a part cut off in the middle of writing
    resumed = score(zoo, source, tmp_path / "o.parquet", *options, "--resume")
    whole = score(zoo, source, tmp_path / "whole.parquet", *options)
    assert resumed == whole
    assert [row["id"] for row in resumed] == [f"r{i}" for i in range(80)]


@pytest.fixture
def begun(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None) -> list[str]:
    """The command of a run that was interrupted after its first window."""
    source = write_lines(tmp_path / "d.jsonl", some_records(20))
    given = command(zoo, source, tmp_path / "o.parquet", "--batch-size", "8")
    plain = pipeline._score_window

    def first_only(run: Any, window: Any, *rest: Any) -> None:
        if window.number > 0:
            raise KeyboardInterrupt
        plain(run, window, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_score_window", first_only)
        assert main(given) == 130
    return given


def user_error(capsys: pytest.CaptureFixture[str], given: Sequence[str]) -> str:
    """The one line a mistake is answered with."""
    try:
        code = main(given)
    except SystemExit as stopped:  # argparse
        code = stopped.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert code == 2, shown
    errors_shown = [line for line in shown.err.splitlines() if not line.startswith("left out: ")]
    assert len(errors_shown) == 1, shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    return errors_shown[0]


def test_resume_refuses_other_options_data_and_models(
    zoo: Zoo, tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert "--beta was 0.05 and is 0.2" in user_error(capsys, [*begun, "--resume", "--beta", "0.2"])
    assert "--kl was k3 and is full" in user_error(capsys, [*begun, "--resume", "--kl", "full"])
    changed = [word.replace(zoo.ref, zoo.policy) for word in begun]
    assert "something else: ref;" in user_error(capsys, [*changed, "--resume"])
    write_lines(tmp_path / "d.jsonl", some_records(20, seed=9))
    assert "something else: the data;" in user_error(capsys, [*begun, "--resume"])
    write_lines(tmp_path / "d.jsonl", some_records(20))
    # Smaller batches are allowed: that is how a run that ran out of memory goes on.
    assert main([*begun, "--resume", "--batch-size", "2"]) == 0


def test_what_is_there_is_not_replaced_unasked(
    zoo: Zoo, tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert "unfinished run" in user_error(capsys, begun)
    assert main([*begun, "--overwrite"]) == 0
    capsys.readouterr()
    assert "is there already; --overwrite" in user_error(capsys, begun)
    assert "--beta was" in user_error(capsys, [*begun, "--resume", "--beta", "1"])
    (tmp_path / "o.parquet").write_bytes(b"something of mine")
    assert "no finished output of this command" in user_error(capsys, [*begun, "--resume"])


def test_a_damaged_part_is_named(
    tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    (part,) = (tmp_path / "o.parquet.parts").glob("part-*.parquet")
    part.write_bytes(part.read_bytes()[:100])
    assert f"{part} is damaged: delete it" in user_error(capsys, [*begun, "--resume"])
    part.unlink()
    assert main([*begun, "--resume"]) == 0
    assert pq.read_metadata(tmp_path / "o.parquet").num_rows == 20


def test_a_full_disk_at_the_end_keeps_the_rows(
    tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr("lsc_kernels.score.assemble._shape", full)
        line = user_error(capsys, [*begun, "--resume"])
    assert "No space left on device" in line and "kept for --resume" in line
    assert main([*begun, "--resume"]) == 0


def test_two_runs_do_not_write_the_same_output(
    zoo: Zoo, tmp_path: Path, begun: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import filelock

    capsys.readouterr()
    with filelock.FileLock(str(tmp_path / "o.parquet") + ".lock"):
        assert "another run is writing it" in user_error(capsys, [*begun, "--resume"])


# Mistakes of the user


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--data", "{tmp}/d.csv"], "unknown kind of file"),
        (["--data", "{tmp}/empty.jsonl"], "is empty"),
        (["--data", "{tmp}/bad.jsonl"], "none of its 2 records can be scored; line 1: not valid JSON"),
        (["--data", "{tmp}/broken.parquet"], "cannot be read as Parquet"),
        (["--data", "{tmp}/broken.jsonl.gz"], "cannot be read"),
        (["--data", "{tmp}/other.parquet"], "has the columns x; wants prompt and response"),
        (["--data", "{tmp}"], "not a dataset written by save_to_disk"),
        (["--policy", "{tmp}"], "holds no config.json"),
        (["--policy", "./nowhere"], "no such folder"),
        (["--policy", "{tmp}/junk"], "--policy {tmp}/junk: cannot be loaded"),
        (["--reward-model", "{policy}"], "the checkpoint lacks score.weight"),
        (["--policy", "{bert}"], "the checkpoint lacks"),
        (["--policy", "{gpt2}"], "is a reward model (GPT2ForSequenceClassification)"),
        (["--policy", "{chat}"], "has 259 logits and --ref {ref} 258"),
        (["--policy", "{other}"], "different vocabularies"),
        (["--names", "a"], "1 name, but the reward models give 2 scores"),
        (["--names", "a,a"], "'a' comes twice"),
        (["--names", "a,"], "none of them empty"),
        (["--reference", "high"], "wants a number, quantile:Q"),
        (["--reference", "nan"], "wants a number, quantile:Q"),
        (["--reference", "quantile:85"], "between 0 and 1"),
        (["--reference", "canned:"], "nothing stands after"),
        (["--reference", "1", "--reference", "2", "--reference", "3"], "3 values for 2 properties"),
        (["--reference", "column:bar"], "reference column 'bar' holds no finite number"),
        (["--scale", "0"], "wants finite numbers above 0"),
        (["--scale", "1,x"], "wants numbers with commas"),
        (["--scale", "1e-300"], "wants finite numbers above 0, from 1e-12"),
        (["--floor", "0.9999999999"], "below 1"),
        (["--weights", "1e300"], "wants finite numbers, at most 1e+12"),
        (["--reference", "1e300"], "wants a number of at most 1e+12"),
        (["--reference", "canned:\udcff"], "is not UTF-8 text"),
        (["--names", "a,\udcff"], "is not UTF-8 text"),
        (["--temperature", "1e-300"], "--temperature 1e-300: wants a number above 0"),
        (["--beta", "1e300"], "--beta 1e+300"),
        (["--threads", "100000"], "--threads 100000: wants at most"),
        (["--data", ""], "--data '': wants a name"),
        (["--out", ""], "--out '': wants a name"),
        (["--floor", "1"], "below 1"),
        (["--weights", "1,2,3"], "3 values for 2 properties"),
        (["--weights", "nan"], "wants finite numbers"),
        (["--beta", "nan"], "--beta nan"),
        (["--temperature", "0"], "--temperature 0"),
        (["--kl", "k4"], "invalid choice"),
        (["--max-length", "1"], "wants at least 2"),
        (["--batch-size", "0"], "--batch-size 0: wants at least 1"),
        (["--limit", "-1"], "--limit -1"),
        (["--seed", "1"], "give --limit too"),
        (["--checkpoint-seconds", "-1"], "wants 0 or more"),
        (["--resume", "--overwrite"], "contradict"),
        (["--device", "cuda:77"], "--device cuda:77: not available"),
        (["--device", "toaster"], "--device toaster: not available"),
        (["--device", "meta"], "--device meta: not available"),
        (["--plot", "figure.doc"], "wants a name ending in .png"),
        (["--out", "{tmp}"], "is a folder"),
        (["--out", "{tmp}/d.jsonl/o.parquet"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], says: str
) -> None:
    write_lines(tmp_path / "d.jsonl", some_records(2))
    for name, content in {
        "d.csv": b"prompt,response\n",
        "empty.jsonl": b"\n",
        "bad.jsonl": b"{\n{\n",
        "broken.parquet": b"PAR1",
        "broken.jsonl.gz": b"no gzip",
    }.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text("{}")
    places = {"tmp": tmp_path, **dataclasses.asdict(zoo)}
    change = [word.format(**places) for word in change]
    line = user_error(capsys, [*command(zoo, tmp_path / "d.jsonl", tmp_path / "o.parquet"), *change][:None])
    assert says.format(**places) in line
    assert not (tmp_path / "o.parquet").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--out", "{tmp}/d.jsonl"], "is what --data reads"),
        (["--data", "{tmp}/link.jsonl", "--out", "{tmp}/d.jsonl"], "is what --data reads"),
        (["--out", "{tmp}/link.jsonl"], "is what --data reads"),
        (["--data", "{tmp}/o.parquet.parts/d.jsonl"], "--out {tmp}/o.parquet.parts: is what --data reads"),
        (["--policy", "{tmp}/model", "--out", "{tmp}/model/config.json"], "is what --policy reads"),
        (["--data", "{tmp}/figure.png", "--plot", "{tmp}/figure.png"], "is what --data reads"),
        (["--out", "{tmp}/figure.png", "--plot", "{tmp}/figure.png"], "is what --out writes too"),
    ],
)
@pytest.mark.parametrize("given", ["--overwrite", "--resume"])
def test_what_is_read_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], says: str, given: str
) -> None:
    """Told before anything is loaded: there are no models."""
    (tmp_path / "o.parquet.parts").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("d.jsonl", "o.parquet.parts/d.jsonl", "model/config.json", "figure.png"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d.jsonl")
    before = sorted(tmp_path.rglob("*"))
    names = {"data": "d.jsonl", "out": "o.parquet", "policy": "p", "ref": "p", "reward-model": "r"}
    options = [word for name, value in names.items() for word in (f"--{name}", str(tmp_path / value))]
    line = user_error(capsys, ["score", *options, given, *(word.format(tmp=tmp_path) for word in change)])
    assert says.format(tmp=tmp_path) in line
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "{}" for path in before if path.is_file())


def test_an_earlier_output_in_a_folder_that_is_read_is_no_input(tmp_path: Path) -> None:
    out = tmp_path / "o.parquet"
    out.touch()
    files.check_outputs([("--out", out)], [("--data", tmp_path)])


def test_missing_extras_are_named_with_the_command_that_brings_them(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = command(zoo, write_lines(tmp_path / "d.jsonl", some_records(1)), tmp_path / "o.parquet")
    for missing, extra in (("transformers", "hf"), ("pyarrow", "hf"), ("matplotlib", "plot")):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, missing, None)  # importing it now fails as if it were not there
            line = user_error(capsys, [*given, "--plot", str(tmp_path / "f.png")])
        assert f"pip install 'lsc-kernels[{extra}]'" in line


def test_a_hub_that_cannot_be_reached_is_one_line_at_once(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    monkeypatch.setattr(extras.socket, "create_connection", unreachable)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    extras.offline_note.cache_clear()
    try:
        source = write_lines(tmp_path / "d.jsonl", some_records(1))
        given = command(zoo, source, tmp_path / "o.parquet")
        started = time.monotonic()
        for option in ("--policy", "--data"):
            line = user_error(capsys, [*given, option, "nobody/nothing-of-this-name"])
            assert "cannot be reached and it is not in the cache" in line
        assert time.monotonic() - started < 10  # the hub's own client tries for half a minute
    finally:
        extras.offline_note.cache_clear()


# What a person sees


def test_summary_figure_and_pairs(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(7)
    pairs = []
    for _ in range(12):
        shared = dialogue(some_text(random, 2, 9)) + "\n\nAssistant:"
        sides = {side: shared + " " + some_text(random, 1, 9) for side in ("chosen", "rejected")}
        pairs.append(sides)
    source = write_lines(tmp_path / "d.jsonl", pairs)
    options = ("--names", "helpful,harmless", "--plot", str(tmp_path / "figure.png"))
    rows = score(zoo, source, tmp_path / "o.parquet", *options)
    shown = capsys.readouterr().out
    assert [row["side"] for row in rows] == ["chosen", "rejected"] * 12
    assert [row["line"] for row in rows] == [line for line in range(1, 13) for _ in range(2)]
    config = ScoreConfig(
        pairs,
        zoo.policy,
        zoo.ref,
        [zoo.llama, zoo.gpt2],
        tmp_path / "again.parquet",
        names=["helpful", "harmless"],
    )
    summary = pipeline.score(config, progress=False)
    kl = [np.array(row["kl"]) for row in rows]
    assert summary.scored_now == 24 and summary.rows_per_second > 0
    assert summary.rows == 24 and summary.pairs == 12 and summary.tokens == sum(map(len, kl))
    assert summary.kl_per_token == pytest.approx(np.concatenate(kl).mean(), rel=1e-6)
    assert summary.kl_per_sequence == pytest.approx(np.mean([one.sum() for one in kl]), rel=1e-6)
    for one in summary.properties:
        scores, reference = column(rows, f"score_{one.name}"), column(rows, f"reference_{one.name}")
        assert one.mean_score == pytest.approx(scores.mean(), rel=1e-6, abs=1e-6)
        assert one.share_above == pytest.approx((scores > reference).mean())
        assert one.marginal_utility == pytest.approx(np.exp(log_sigmoid(reference - scores)).mean(), rel=1e-5)
        assert one.binds == pytest.approx(np.mean([row["binding"] == one.name for row in rows]))
        assert one.pair_accuracy == pytest.approx((scores[::2] > scores[1::2]).mean())
        assert f"{one.mean_score:.3f}" in shown and f"{one.share_above:.1%}" in shown
    assert sum(one.binds for one in summary.properties) == pytest.approx(1)
    assert math.isclose(summary.utility, column(rows, "utility").mean(), rel_tol=1e-6)
    figure = (tmp_path / "figure.png").read_bytes()
    assert figure.startswith(b"\x89PNG") and len(figure) > 20_000


def test_brackets_are_no_markup(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [{"prompt": "a", "response": " b", "bar": 1}, {"prompt": "a", "response": " b", "bar": "[/x]"}]
    source = write_lines(tmp_path / "d.jsonl", records)
    options = ["--names", "[/a],b", "--reference", "canned:no [/b]", "--reference", "column:bar"]
    score(zoo, source, tmp_path / "o.parquet", *options)
    shown = capsys.readouterr()
    assert "holds no finite number but '[/x]': line 2" in shown.err
    assert "references: [/a] canned:no [/b]; b column:bar" in shown.out
    for words in ("1 row ", "1 of 2 records left out:", "scored 1 row in ", "written to "):
        assert words in shown.out, shown.out


def test_the_rate_counts_scoring_alone(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late, load_all = [0.0], pipeline._load_all

    def slowly(*args: Any) -> Any:
        late[0] += 1000.0
        return load_all(*args)

    monkeypatch.setattr(pipeline, "_load_all", slowly)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(pipeline, "time", clock)
    config = ScoreConfig(some_records(2), zoo.policy, zoo.ref, [zoo.llama], tmp_path / "o.parquet")
    summary = pipeline.score(config, progress=False)
    assert summary.scored_now == 2 and 0 < summary.seconds < 1000


def test_time_is_left_once_it_is_known_how_much_there_is_to_do() -> None:
    def shown(known: bool) -> str:
        bar = progress.Progress(show=False)
        bar.say("loading the models")
        if known:
            bar.begin(10, 100)
        console = Console(file=io.StringIO(), width=200)
        with console.capture() as captured:
            console.print(bar._bar.make_tasks_table(bar._bar.tasks))
        return captured.get().rstrip()

    assert shown(known=False).endswith(" elapsed")
    assert shown(known=True).endswith(" left") and " elapsed " in shown(known=True)


def test_runs_as_a_process_and_keeps_its_output_apart(zoo: Zoo, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "d.jsonl", [*some_records(5), {"prompt": "x"}])
    process = run_process(command(zoo, source, tmp_path / "o.parquet"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "5 rows" in out and "written to" in out
    assert "left out: has prompt but no response: line 6" in err
    assert "Traceback" not in err and "Warning" not in err
    assert pq.read_metadata(tmp_path / "o.parquet").num_rows == 5


def test_package_imports_no_extra() -> None:
    code = (
        "import sys, argparse, lsc_kernels.score as s; s.add_arguments(argparse.ArgumentParser());"
        "extras = {'transformers', 'pyarrow', 'rich', 'datasets', 'matplotlib'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same(zoo: Zoo, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "d.jsonl", some_records(10))
    cpu, gpu = (
        score(zoo, source, tmp_path / f"{device}.parquet", "--device", device, "--dtype", "float64")
        for device in ("cpu", "cuda")
    )
    assert_same_rows(cpu, gpu, **CLOSE)
