"""Where the scores of a property come from: a function as TRL calls them, or a Hugging Face reward model."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lsc_kernels.score.models import RewardScorer

Columns = Mapping[str, Any]
# Tokens of one batch of a reward model, padding included.
MAX_TOKENS = 16384


class FunctionReward:
    """A reward function: one property."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.names = [getattr(function, "__name__", type(function).__name__)]

    def __call__(self, device: torch.device | None, given: Columns) -> Any:
        return self._function(**given)

    def columns(self, result: Any, batch: int) -> Tensor:
        values = [math.nan if value is None else float(value) for value in result]
        if len(values) != batch:
            raise ValueError(
                f"reward function {self.names[0]} must return one reward per completion, {batch}; got {len(values)}"
            )
        return torch.tensor(values).unsqueeze(1)


class ModelReward:
    """A Hugging Face reward model: one property for each of its labels."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from lsc_kernels.score.models import LoadedModel, label_names

        label = (
            str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
            or type(model).__name__
        )
        self._loaded = LoadedModel(model, tokenizer, label, digest="")
        labels = label_names(self._loaded)
        self.names = labels if len(labels) > 1 else [label]
        self._scorer: RewardScorer | None = None

    def __call__(self, device: torch.device | None, given: Columns) -> Tensor:
        from lsc_kernels.score.models import RewardScorer, evaluating

        texts = self._texts(given["prompts"], given["completions"])
        ids = self._loaded.tokenizer(texts, add_special_tokens=False)["input_ids"]
        there = [row for row, each in enumerate(ids) if each]
        scores = torch.full((len(ids), len(self.names)), math.nan)
        if not there:
            return scores
        rows = [ids[row] for row in there]
        with torch.inference_mode(), evaluating([self._loaded]):
            if self._scorer is None:
                if device is not None:
                    nn.Module.to(self._loaded.model, device)
                self._scorer = RewardScorer(self._loaded, rows)
            scores[there] = self._scorer.score(rows, max_tokens=MAX_TOKENS, batch_size=None)
        return scores

    def _texts(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[str]:
        """As TRL gives them to a reward model."""
        if isinstance(prompts[0], str):
            return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return [
            str(self._loaded.tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def columns(self, result: Tensor, batch: int) -> Tensor:
        return result


def reward_source(reward: object, tokenizer: Any) -> FunctionReward | ModelReward:
    if isinstance(reward, nn.Module):
        if tokenizer is None:
            raise ValueError(
                f"processing_class must be the tokenizer of {type(reward).__name__}, a reward model; got None"
            )
        return ModelReward(reward, tokenizer)
    if not callable(reward):
        raise TypeError(
            f"a reward must be a function or a Hugging Face reward model; got {type(reward).__name__}: load a model by "
            "AutoModelForSequenceClassification.from_pretrained"
        )
    return FunctionReward(reward)


def awaited(results: list[Any]) -> list[Any]:
    """The results, those of ``async`` functions awaited together."""
    waiting = [each for each in results if inspect.isawaitable(each)]
    if not waiting:
        return results

    async def every() -> list[Any]:
        return list(await asyncio.gather(*waiting))

    with ThreadPoolExecutor(1) as aside:  # in a notebook this thread has a loop that runs already
        done = iter(aside.submit(asyncio.run, every()).result())
    return [next(done) if inspect.isawaitable(each) else each for each in results]
