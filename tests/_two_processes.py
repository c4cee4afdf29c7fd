"""Run by test_trainers_trl on two processes: LSCGRPOTrainer where both have half of every group.

python -m torch.distributed.run --nproc-per-node 2 tests/_two_processes.py FOLDER, which has policy and tokenizer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoTokenizer
from trl import GRPOConfig

import lsc_kernels as lk
from lsc_kernels.reference import leave_one_out_quantile
from lsc_kernels.trainers.trl import GroupQuantile, LSCGRPOTrainer, LSCReward

constants.HF_HUB_OFFLINE = constants.HF_HUB_DISABLE_TELEMETRY = True
GROUP, BETA = 4, 0.3


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [0.3 * len(set(text)) for text in completions]


class Watched(LSCGRPOTrainer):
    """Every batch once more, from the logits and from the scores of both processes."""

    batches = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        everywhere, mask = self.accelerator.gather, batch["completion_mask"]
        with torch.no_grad():
            policy, ref = (self.logits(model, batch) for model in (self.model, self.ref_model))
        kl = lk.token_kl(policy, ref, batch["completion_ids"], kl="k1", mask=mask).kl
        own = self.reward_funcs[0].last
        scores = everywhere(own.scores)
        assert len(scores) == 2 * len(own.scores) == GROUP
        references = leave_one_out_quantile(scores.view(-1, GROUP, 1), 0.85, method="median_unbiased").view(
            -1, 1
        )
        utility = lk.aggregate_rewards(scores, references)
        here = slice(self.accelerator.process_index * len(mask), None)
        advantage = lk.group_advantages(utility, GROUP, method="dr_grpo")[here][: len(mask)]
        rewards = lk.token_rewards(advantage, kl, mask, beta=BETA)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(own.reference_reward, references[here][: len(mask)], **close)
        torch.testing.assert_close(batch["token_rewards"], rewards, **close)
        torch.testing.assert_close(batch["advantages"], lk.discounted_returns(rewards, mask), **close)
        total, count = everywhere(kl.sum()).sum(), everywhere(mask.sum()).sum()
        logged = torch.tensor(self._metrics["train"]["kl"][-1])
        torch.testing.assert_close(logged, total / count, rtol=1e-3, atol=1e-6)
        assert Watched.batches == 0 or total != 0
        Watched.batches += 1
        return batch

    def logits(self, model: Any, batch: dict[str, Any]) -> Tensor:
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        logits: Tensor = model(input_ids=ids, attention_mask=attention_mask).logits
        return logits[:, -batch["completion_ids"].shape[1] - 1 : -1]


def main(folder: str) -> None:
    config = GRPOConfig(
        output_dir=f"{folder}/run",
        **{"max_steps": 2, "per_device_train_batch_size": GROUP // 2, "num_generations": GROUP},
        **{"max_completion_length": 9, "learning_rate": 0.05, "beta": BETA, "scale_rewards": "none"},
        **{"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
    )
    trainer = Watched(
        model=folder,
        reward_funcs=LSCReward(letters, names=["letters"], reference_reward=GroupQuantile()),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["What is rain?", "Name a tree.", "And the sea?"]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    print(f"process {trainer.accelerator.process_index}: {Watched.batches} batches agree")


if __name__ == "__main__":
    main(sys.argv[1])
