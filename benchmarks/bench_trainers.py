"""The reward part of a step in TRL: its own functions and ours in their place, in its real trainer on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _logits
import pytest
import torch
from _measure import Outputs
from bench_token_logprobs import truth as logprobs_truth
from torch import Generator, Tensor

from lsc_kernels.trainers import trl as adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'lsc-kernels[trl]'"
)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", _logits.DTYPES, ids=str)
def test_logprobs_and_entropy(
    compare: Any, size: Any, generator: Generator, dtype: torch.dtype, backward: bool
) -> None:
    """What ``patch`` replaces, on two sequences."""
    from trl.trainer import utils

    logits, _, actions = _logits.logits(generator, size.rows, size.vocabulary, dtype)
    two = (2, size.rows // 2)

    def textbook(logits: Tensor, actions: Tensor) -> Outputs:
        both = utils.selective_log_softmax_and_entropy(logits, actions)
        return dict(zip(("logprobs", "entropy"), both, strict=True))

    def ours(logits: Tensor, actions: Tensor) -> Outputs:
        return adapter.selective_log_softmax_and_entropy(logits, actions)._asdict()

    def truth(logits: Tensor, actions: Tensor) -> Outputs:
        return {
            name: each.view(two)
            for name, each in logprobs_truth(logits.flatten(0, 1), actions.flatten()).items()
        }

    compare(
        "TRL logprobs and entropy",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(logits.view(*two, -1), actions.view(two)),
        reads=(logits,),
        shape={"N": size.rows, "V": size.vocabulary},
        dtype=dtype,
        leaf=0 if backward else None,
        compile=False,  # it loops over the sequences and chunks
    )


PROMPTS = ["Tell me of the sea.", "What is rain?", "Why is the sky blue?", "Name a tree."]
SAMPLES = 8


class RewardModels:
    """Two random reward models, completions of many lengths to score, and a GRPOTrainer for each way to score them."""

    def __init__(self, folder: Path, *, hidden_size: int, longest: int) -> None:
        from lsc_kernels.demo.models import build_language_model, build_tokenizer, reward_model_from

        torch.manual_seed(0)
        self.folder = folder
        self.tokenizer = build_tokenizer(PROMPTS, vocab_size=300)
        build_language_model(self.tokenizer, hidden_size=32, layers=1).save_pretrained(folder)
        bodies = [build_language_model(self.tokenizer, hidden_size=hidden_size) for _ in range(2)]
        self.models = [reward_model_from(body).eval() for body in bodies]
        for model in self.models:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        lengths = torch.randint(4, longest, (len(PROMPTS) * SAMPLES,)).tolist()
        self.completions = [
            "".join(chr(97 + (k * row) % 26) for k in range(n)) for row, n in enumerate(lengths)
        ]
        self.prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES)]

    def trainer(self, rewards: Any, tokenizers: Any) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer(
            model=str(self.folder),
            reward_funcs=rewards,
            reward_processing_classes=tokenizers,
            args=GRPOConfig(
                output_dir=str(self.folder / "run"),
                per_device_train_batch_size=SAMPLES,
                num_generations=SAMPLES,
                scale_rewards="none",
                use_cpu=True,
                bf16=False,
                report_to=[],
            ),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=self.tokenizer,
        )

    def calculate(self, trainer: Any) -> Tensor:
        """The rewards of the completions, [B, number of reward functions], by the trainer's own method."""
        rows = [{"prompt": prompt} for prompt in self.prompts]
        ids = [self.tokenizer(text)["input_ids"] for text in self.completions]
        rewards: Tensor = trainer._calculate_rewards(rows, self.prompts, self.completions, ids)
        trainer._pending_metrics.clear()
        trainer._pending_extra_logs.clear()
        return rewards

    def one_by_one(self) -> Tensor:
        scores = []
        for prompt, completion in zip(self.prompts, self.completions, strict=True):
            ids = self.tokenizer(prompt + completion, return_tensors="pt")["input_ids"]
            scores.append([model.double()(input_ids=ids).logits[0, 0] for model in self.models])
        for model in self.models:
            model.float()
        return torch.tensor(scores)


@pytest.fixture
def reward_models(size: Any, tmp_path: Path) -> Iterator[RewardModels]:
    from huggingface_hub import constants

    real = size.hidden > 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        yield RewardModels(tmp_path / "policy", hidden_size=256 if real else 32, longest=400 if real else 24)


def test_reward_models(compare: Any, reward_models: RewardModels) -> None:
    """Two reward models in GRPOTrainer: given to it as they are, and by LSCReward, utility and logging included."""
    here = reward_models
    reward = adapter.LSCReward(
        here.models, names=["one", "other"], reference_reward=0.0, processing_class=here.tokenizer
    )
    with_models = here.trainer(list(here.models), [here.tokenizer] * 2)
    with_ours = here.trainer(reward, None)

    def textbook() -> Outputs:
        return {"scores": here.calculate(with_models)}

    def ours() -> Outputs:
        here.calculate(with_ours)
        assert reward.last is not None
        return {"scores": reward.last.scores}

    compare(
        "TRL reward models",
        case=f"{len(here.models)} of them",
        ours=ours,
        textbook=textbook,
        truth=lambda: {"scores": here.one_by_one()},
        inputs=(),
        reads=(),
        shape={"B": len(here.prompts), "H": here.models[0].config.hidden_size},
        dtype=torch.float32,
        compile=False,
    )
