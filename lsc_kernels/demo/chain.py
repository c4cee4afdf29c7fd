"""The models of the demo and the reference rewards: what stands between preference data and a scoring run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

from . import train
from .data import PROPERTIES, REFUSAL, Split, policy_texts
from .models import build_language_model, build_tokenizer, on_device, reward_model_from

QUANTILE = 0.85
# Two reward models rarely speak in the same unit. Here one is trained at twice the Bradley-Terry temperature
# of the other: for the same conviction its scores are twice as large. LSC divides by the scale; a raw sum
# does not.
SCALES = {"helpful": 2.0, "harmless": 1.0}
LONGEST_SAMPLE = 96

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is trained, and how many samples of the policy each prompt gets."""

    policy_epochs: int
    reward_epochs: int
    samples: int


FULL, QUICK = Size(12, 3, 16), Size(4, 3, 8)


@dataclass(frozen=True)
class Models:
    """A policy, its earlier checkpoint as reference, one reward model per property; one tokenizer for all."""

    tokenizer: PreTrainedTokenizerBase
    reference: LlamaForCausalLM
    policy: LlamaForCausalLM
    reward_models: dict[str, LlamaForSequenceClassification]

    def save(self, folder: Path) -> dict[str, Path]:
        """Write every model with its tokenizer into a folder of its own, as the hub has them."""
        folders = {}
        for name, model in {"reference": self.reference, "policy": self.policy, **self.reward_models}.items():
            folders[name] = folder / name
            model.save_pretrained(folders[name])
            self.tokenizer.save_pretrained(folders[name])
        return folders


def train_models(split: Split, size: Size, seed: int, say: Say) -> Models:
    """Train everything from nothing, in seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer([r.prompt + r.response for r in split.responses])
    reference = on_device(build_language_model(tokenizer), device)
    train.train_language_model(
        reference,
        tokenizer,
        policy_texts(split),
        epochs=size.policy_epochs,
        learning_rate=3e-3,
        seed=seed,
        progress=_told(say, "language model"),
    )
    # A policy a few steps after its reference, taken on the answers that neither judge minds.
    policy = copy.deepcopy(reference)
    liked = [(r.prompt, r.response) for r in split.responses if min(r.helpful, r.harmless) >= 3]
    train.train_language_model(
        policy, tokenizer, liked, epochs=1, learning_rate=3e-4, seed=seed, progress=_told(say, "policy")
    )
    reward_models = {}
    for name in PROPERTIES:
        reward_models[name] = reward_model_from(reference)
        train.train_reward_model(
            reward_models[name],
            tokenizer,
            split.pairs[name],
            scale=SCALES[name],
            epochs=size.reward_epochs,
            learning_rate=2e-3,
            seed=seed,
            progress=_told(say, f"reward model {name}"),
        )
    return Models(tokenizer, reference, policy, reward_models)


@dataclass(frozen=True)
class References:
    """Samples of the policy to each prompt, their scores [prompts, samples, properties], and a refusal's.

    ``canned`` holds the scores of the refusal, [prompts, properties].
    """

    samples: tuple[tuple[str, ...], ...]
    scores: Tensor
    canned: Tensor

    @property
    def sampled(self) -> Tensor:
        """The reference reward of each prompt and property: a quantile of the samples' scores."""
        return self.scores.quantile(QUANTILE, dim=1)

    @property
    def typical(self) -> Tensor:
        """The median of the samples' scores, [prompts, properties]."""
        return self.scores.quantile(0.5, dim=1)


def find_references(models: Models, split: Split, size: Size, say: Say) -> References:
    """Let the policy answer each prompt several times, and score what it says and the refusal."""
    prompts = split.prompts
    say(f"{size.samples} samples of the policy for each of {len(prompts)} prompts")
    samples = train.sample(models.policy, models.tokenizer, prompts, size.samples, LONGEST_SAMPLE)
    texts = [(prompt, text) for prompt, drawn in zip(prompts, samples, strict=True) for text in drawn]
    refusals = [(prompt, REFUSAL) for prompt in prompts]
    scores, canned = [], []
    for name in PROPERTIES:
        say(f"scoring the samples: {name}")
        model = models.reward_models[name]
        scores.append(train.score_texts(model, models.tokenizer, texts).view(len(prompts), size.samples))
        canned.append(train.score_texts(model, models.tokenizer, refusals))
    return References(tuple(map(tuple, samples)), torch.stack(scores, dim=-1), torch.stack(canned, dim=-1))


def write_rows(folder: Path, split: Split, references: References) -> Path:
    """Write the held-out responses with their reference rewards as columns, and the samples they come from.

    Returns the file that ``lsc-kernels score`` is to read.
    """
    place = {prompt: at for at, prompt in enumerate(split.prompts)}
    sampled = references.sampled
    path = folder / "held_out.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for r in split.responses:
            row: dict[str, str | float] = {"id": f"{r.topic}: {r.recipe}"}
            row |= {"prompt": r.prompt, "response": r.response}
            row |= _named("reference", sampled[place[r.prompt]])
            file.write(json.dumps(row) + "\n")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for prompt, drawn, scores in zip(split.prompts, references.samples, references.scores, strict=True):
            for text, score in zip(drawn, scores, strict=True):
                file.write(json.dumps({"prompt": prompt, "response": text} | _named("score", score)) + "\n")
    return path


def _named(head: str, values: Tensor) -> dict[str, float]:
    return {f"{head}_{name}": value for name, value in zip(PROPERTIES, values.tolist(), strict=True)}


def _told(say: Say, what: str) -> train.Progress:
    return lambda done, steps, loss: say(f"training the {what}: step {done} of {steps}, loss {loss:.2f}")
