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
            epochs=size.reward_epochs,
            learning_rate=2e-3,
            seed=seed,
            progress=_told(say, f"reward model {name}"),
        )
    return Models(tokenizer, reference, policy, reward_models)


@dataclass(frozen=True)
class References:
    """The policy's samples; reference rewards [prompts, properties] from them and from a canned refusal."""

    samples: tuple[tuple[str, ...], ...]
    sampled: Tensor
    median: Tensor
    canned: Tensor


def find_references(models: Models, split: Split, size: Size, say: Say) -> References:
    """Score samples of the policy for each prompt and take a quantile of them; score the refusal too."""
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
    table = torch.stack(scores, dim=-1)  # [prompts, samples, properties]
    return References(
        samples=tuple(map(tuple, samples)),
        sampled=table.quantile(QUANTILE, dim=1),
        median=table.quantile(0.5, dim=1),
        canned=torch.stack(canned, dim=-1),
    )


def write_rows(path: Path, split: Split, references: References) -> None:
    """The held-out responses as JSON lines for ``lsc-kernels score``, reference rewards as columns."""
    place = {prompt: at for at, prompt in enumerate(split.prompts)}
    with path.open("w", encoding="utf-8") as file:
        for r in split.responses:
            row: dict[str, str | float] = {"id": f"{r.topic}: {r.recipe}"}
            row |= {"prompt": r.prompt, "response": r.response}
            for k, name in enumerate(PROPERTIES):
                row[f"reference_{name}"] = references.sampled[place[r.prompt], k].item()
            file.write(json.dumps(row) + "\n")


def _told(say: Say, what: str) -> train.Progress:
    return lambda done, steps, loss: say(f"training the {what}: step {done} of {steps}, loss {loss:.2f}")
