"""Rewards and advantages of a PPO step through verl's own classes, on a CPU, without an inference server.

    scripts/trainer_environment.sh
    .venv-trainers/bin/python examples/verl_step.py

A tiny policy with random weights, its reference and a critic, made on the spot, see a few responses. The reward manager
``lsc`` scores them by two functions that conflict, the trainer ``lsc_sync`` makes advantages of them, and policy and
critic take a step, three times. Rewards, KL and advantages in verl are compared with this library's own functions. What
is not here: the rollout (responses are random tokens), Ray, and verl's queue, for which a dictionary stands in. Where
verl is not installed there is nothing to do, and it says so.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

if importlib.util.find_spec("verl") is None:
    print("verl_step: skipped; it wants verl, in an environment of its own: scripts/trainer_environment.sh")
    sys.exit()

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import get_trainer_cls

import lsc_kernels as lk
from lsc_kernels.demo.models import build_language_model, build_tokenizer

B, P, R = 8, 6, 12  # responses, tokens of the prompt, tokens of the response
BETA, LAM = 0.05, 0.95  # the price of KL, the trace
CONFIG = OmegaConf.create(
    {
        "reward": {
            "reward_kwargs": {
                "lsc": {
                    "properties": ["vowels", "brief"],
                    "reference_reward": {"vowels": 1.0, "brief": 0.0},
                }
            }
        },
        "algorithm": {
            "adv_estimator": "gae",
            "gamma": 1.0,
            "lam": LAM,
            "use_kl_in_reward": True,
            "kl_penalty": "kl",
        },
        "actor_rollout_ref": {"rollout": {"n": 1}},
    }
)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> dict[str, float]:
    """More vowels, and fewer characters."""
    vowels = sum(map(solution_str.count, "aeiou"))
    return {"vowels": 4 * vowels / max(len(solution_str), 1), "brief": 1 - len(solution_str) / 20}


class Queue:
    """In place of TransferQueue: what the trainer reads, and what it writes."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self.fields = TensorDict(fields, batch_size=B)

    def kv_batch_get(self, select_fields: list[str], **where: Any) -> TensorDict:
        return self.fields.select(*select_fields, strict=False)

    def kv_batch_put(self, fields: TensorDict, **where: Any) -> None:
        self.fields.update(fields)


def jagged(padded: Tensor, mask: Tensor) -> Tensor:
    rows = [row[: int(length)] for row, length in zip(padded, mask.sum(-1), strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def rewards_of(manager: Any, batch: TensorDict) -> tuple[Tensor, Tensor]:
    """What verl's reward loop does with a batch: scores [B, 2] by property, and rewards [B, R] per token."""
    objects = {
        "data_source": np.array(["example"] * B, dtype=object),
        "reward_model": np.array([{"ground_truth": ""}] * B, dtype=object),
        "extra_info": np.array([{} for _ in range(B)], dtype=object),
    }
    data = DataProto(batch=batch, non_tensor_batch=objects)
    results = [manager.loop.run_until_complete(manager.run_single(data[row : row + 1])) for row in range(B)]
    scores = [
        [result["reward_extra_info"][name] for name in manager.rewards.properties] for result in results
    ]
    return torch.tensor(scores), manager.assemble_rm_scores(data, [each["reward_score"] for each in results])


def main() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(
        ["Tell me of the sea.", "What is rain?", "Why is the sky blue?"], vocab_size=300
    )
    policy, ref = (build_language_model(tokenizer, hidden_size=32, layers=1) for _ in range(2))
    ref.load_state_dict({name: w + 0.1 * torch.randn_like(w) for name, w in policy.state_dict().items()})
    ref.requires_grad_(False)
    critic = torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)
    manager = get_reward_manager_cls("lsc")(CONFIG, tokenizer, compute_score)
    trainer = object.__new__(get_trainer_cls("lsc_sync"))  # its __init__ would set up a cluster
    trainer.config, trainer.kl_ctrl_in_reward = CONFIG, core_algos.FixedKLController(BETA)

    for step in range(3):
        tokens = torch.randint(len(tokenizer), (B, P + R))
        mask = (torch.arange(R) < torch.randint(2, R + 1, (B, 1))).long()
        batch = TensorDict(
            {
                "prompts": tokens[:, :P],
                "responses": tokens[:, P:],
                "attention_mask": torch.cat([torch.ones(B, P).long(), mask], 1),
            },
            batch_size=B,
        )
        scores, rm_scores = rewards_of(manager, batch)
        output = policy(input_ids=tokens, output_hidden_states=True)
        seen = (output.logits[:, P - 1 : -1], ref(input_ids=tokens).logits[:, P - 1 : -1])
        logprobs, ref_logprobs = (lk.token_logprobs(each, tokens[:, P:]).logprobs for each in seen)
        values = critic(output.hidden_states[-1][:, P - 1 : -1]).squeeze(-1)

        given = {
            "response_mask": mask,
            "rm_scores": rm_scores,
            "old_log_probs": logprobs.detach(),
            "ref_log_prob": ref_logprobs,
            "values": values.detach(),
        }
        queue = Queue({name: jagged(each, mask) for name, each in given.items()} | {"uid": torch.arange(B)})
        trainer_base.tq = queue
        metrics: dict[str, float] = {}
        keys = KVBatchMeta(keys=[f"{row}_0_0" for row in range(B)], partition_id="train", tags=[{}] * B)
        trainer._compute_advantage(keys, metrics)
        found = {
            name: queue.fields[name].to_padded_tensor(0.0, output_size=(B, R))
            for name in ("token_level_rewards", "advantages", "returns")
        }

        # the same by this library's functions alone, from the logits
        utility = lk.aggregate_rewards(scores, torch.tensor([1.0, 0.0]))
        kl = lk.token_kl(*(each.detach() for each in seen), tokens[:, P:], kl="k1", mask=mask).kl
        rewards = lk.token_rewards(utility, kl, mask, beta=BETA)
        advantages, returns = lk.gae(rewards, values.detach(), mask, gamma=1.0, lam=LAM)
        wanted = {
            "token_level_rewards": rewards,
            "advantages": lk.masked_whiten(advantages, mask),
            "returns": returns,
        }
        for name, each in wanted.items():
            torch.testing.assert_close(found[name], each, rtol=1e-4, atol=1e-5, msg=f"step {step}: {name}")
        mean_kl = ((kl.sum(-1) / mask.sum(-1)).mean()).item()
        assert abs(metrics["actor/reward_kl_penalty"] - mean_kl) < 1e-5

        ratio_loss = core_algos.agg_loss(
            -(logprobs - logprobs.detach()).exp() * found["advantages"], mask, "token-mean"
        )
        value_loss = core_algos.agg_loss((values - found["returns"]).square(), mask, "token-mean")
        optimizer.zero_grad()
        (ratio_loss + value_loss).backward()
        optimizer.step()
        print(
            f"step {step}: utility {utility.mean():.3f}, KL per token {mean_kl:+.4f}, value loss "
            f"{value_loss.item():.3f}; rewards, KL and advantages are verl's and ours"
        )


if __name__ == "__main__":
    main()
