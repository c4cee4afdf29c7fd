"""GRPO in TRL with two rewards and the KL in the reward, for a few real steps on a CPU, without a network.

    python examples/trl_grpo.py

The policy is a tiny model with random weights, made on the spot; the rewards are two functions that conflict. At every
step the rewards, the KL and the advantages that TRL trains on are compared with this library's own functions, applied
to the logits of policy and reference. Where TRL is not installed there is nothing to do, and it says so.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

if importlib.util.find_spec("trl") is None:
    print("trl_grpo: skipped; it wants TRL: pip install 'lsc-kernels[trl]'")
    sys.exit()

# before TRL is imported: nothing is asked of a hub, and nothing told
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig

import lsc_kernels as lk
from lsc_kernels.demo.models import build_language_model, build_tokenizer
from lsc_kernels.trainers.trl import LSCGRPOTrainer, LSCReward

GROUP, BETA = 4, 0.05
PROMPTS = ["Tell me of the sea.", "What is rain?", "Why is the sky blue?", "Name a tree."]


def vowels(completions: Sequence[str], **columns: Any) -> list[float]:
    """More vowels, up to a point: a reward model's score has no natural zero either."""
    return [4 * sum(map(completion.count, "aeiou")) / max(len(completion), 1) for completion in completions]


def brief(completions: Sequence[str], **columns: Any) -> list[float | None]:
    """Fewer characters; None where there is nothing to judge."""
    return [1 - len(completion) / 40 if completion else None for completion in completions]


class Watched(LSCGRPOTrainer):
    """The trainer, with every batch computed again from logits."""

    batches = 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        tokens, mask = batch["completion_ids"], batch["completion_mask"]
        with torch.no_grad():
            policy, ref = (self.logits(model, batch) for model in (self.model, self.ref_model))
        kl = lk.token_kl(policy, ref, tokens, kl="k1", mask=mask).kl
        scored = self.reward_funcs[0].last
        utility = lk.aggregate_rewards(scored.scores, scored.reference_reward, missing="ignore")
        centred = lk.group_advantages(utility, GROUP, method="dr_grpo")
        rewards = lk.token_rewards(centred, kl, mask, beta=BETA)
        torch.testing.assert_close(batch["token_kl"], kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch["token_rewards"], rewards, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            batch["advantages"], lk.discounted_returns(rewards, mask), rtol=1e-4, atol=1e-5
        )
        Watched.batches += 1
        return batch

    def logits(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """[B, T, V], where the model predicts the completion."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        return model(input_ids=ids, attention_mask=attention_mask).logits[:, -length - 1 : -1]


def main() -> None:
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    tokenizer = build_tokenizer(PROMPTS, vocab_size=300)
    with tempfile.TemporaryDirectory() as folder:
        # TRL loads the reference policy from where the policy is
        build_language_model(tokenizer, hidden_size=32, layers=1).save_pretrained(f"{folder}/policy")
        tokenizer.save_pretrained(f"{folder}/policy")
        reward = LSCReward([vowels, brief], names=["vowels", "brief"], reference_reward=[0.8, 0.5])
        config = GRPOConfig(
            output_dir=f"{folder}/run",
            **{"max_steps": 4, "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP},
            **{"max_completion_length": 16, "learning_rate": 1e-2, "beta": BETA, "scale_rewards": "none"},
            **{"use_cpu": True, "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no"},
            **{"disable_tqdm": True, "seed": 0},
        )
        trainer = Watched(
            model=f"{folder}/policy",
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    assert Watched.batches == 4
    logged = [each for each in trainer.state.log_history if "lsc/p_good" in each]
    assert len(logged) == 4 and logged[0]["kl"] == 0.0 and logged[-1]["kl"] != 0.0
    print("step  P(good)  P(vowels)  P(brief)     KL")
    for step, each in enumerate(logged, 1):
        ours = (each[f"lsc/{name}p_good"] for name in ("", "vowels/", "brief/"))
        print(f"{step:4d}  {'    '.join(f'{value:.3f}' for value in ours)}   {each['kl']: .4f}")
    print(f"rewards, KL and advantages of {Watched.batches} batches agree with those from the logits")


if __name__ == "__main__":
    main()
