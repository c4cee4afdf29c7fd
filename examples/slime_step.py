"""Rewards, advantages and loss of a few steps through the functions that slime is given, on a CPU, without slime.

    python examples/slime_step.py

A tiny policy with random weights and its reference, made on the spot, see responses in slime's layout: samples with a
prompt, a response and a group, and a list of tensors of different lengths for each step. ``custom_rm`` scores them by
two functions that conflict, ``custom_reward_post_process`` compares those of a prompt, ``custom_advantage`` adds the
price of KL, and the policy takes a step on them and on the KL loss, three times. Rewards, KL and advantages are
compared with this library's own functions, applied to logits. What is not here: the rollout (responses are random
tokens), Megatron, and slime's own policy loss, for which a policy gradient stands in.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels.demo.models import build_language_model, build_tokenizer
from lsc_kernels.trainers import slime

PROMPTS = ["Tell me of the sea.", "What is rain?"]
GROUP, LONGEST, BETA = 4, 12, 0.05
REFERENCE = {"vowels": 1.0, "brief": 0.0}
ARGS = Namespace(
    lsc={
        "scorers": {"vowels": f"{__name__}.vowels", "brief": f"{__name__}.brief"},
        "reference_reward": REFERENCE,
    },
    reward_key="utility",
    advantage_estimator="reinforce_plus_plus_baseline",
    rewards_normalization=True,
    grpo_std_normalization=False,
    n_samples_per_prompt=GROUP,
    kl_coef=BETA,
)


@dataclass
class Sample:
    """What the functions read of slime's."""

    prompt: str
    response: str
    group_index: int
    reward: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def get_reward_value(self, args: Namespace) -> float:
        return self.reward[args.reward_key]


def vowels(args: Namespace, sample: Sample) -> float:
    return 4 * sum(map(sample.response.count, "aeiou")) / max(len(sample.response), 1)


async def brief(args: Namespace, sample: Sample) -> float:
    """A scorer may ask a server."""
    return 1 - len(sample.response) / 20


def where_responses_are(per_token: Tensor, prompt: int, lengths: list[int]) -> list[Tensor]:
    """From [B, prompt + T, ...], the rows that predict each response."""
    return [row[prompt - 1 : prompt - 1 + length] for row, length in zip(per_token, lengths, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(PROMPTS, vocab_size=300)
    policy, ref = (build_language_model(tokenizer, hidden_size=32, layers=1) for _ in range(2))
    ref.load_state_dict({name: w + 0.1 * torch.randn_like(w) for name, w in policy.state_dict().items()})
    ref.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    shortest = min(map(len, prompts))  # the prompts without their beginnings, of one length

    for step in range(3):
        lengths = torch.randint(2, LONGEST + 1, (len(PROMPTS) * GROUP,)).tolist()
        responses = [torch.randint(len(tokenizer), (length,)) for length in lengths]
        samples = [
            Sample(PROMPTS[row // GROUP], tokenizer.decode(tokens.tolist()), row // GROUP)
            for row, tokens in enumerate(responses)
        ]
        for sample, reward in zip(samples, asyncio.run(slime.custom_rm(ARGS, samples)), strict=True):
            sample.reward = reward
        raw, rewards = slime.custom_reward_post_process(ARGS, samples)

        ids = torch.nn.utils.rnn.pad_sequence(
            [
                torch.cat([torch.tensor(prompts[row // GROUP][-shortest:]), tokens])
                for row, tokens in enumerate(responses)
            ],
            batch_first=True,
        )
        logits, ref_logits = (
            where_responses_are(model(input_ids=ids).logits, shortest, lengths) for model in (policy, ref)
        )
        log_probs, ref_log_probs = (
            [lk.token_logprobs(row, tokens).logprobs for row, tokens in zip(each, responses, strict=True)]
            for each in (logits, ref_logits)
        )
        data: dict[str, Any] = {
            "kl": [
                slime.compute_approx_kl(p.detach(), q, "k1")
                for p, q in zip(log_probs, ref_log_probs, strict=True)
            ],
            "rewards": rewards,
            "loss_masks": [torch.ones(length) for length in lengths],
        }
        slime.custom_advantage(ARGS, data)
        kl_loss = slime.compute_approx_kl(torch.cat(log_probs), torch.cat(ref_log_probs), "low_var_kl").mean()

        scores = torch.tensor([[sample.reward[name] for name in REFERENCE] for sample in samples])
        utility = lk.aggregate_rewards(scores, torch.tensor(list(REFERENCE.values())))
        centred = lk.group_advantages(utility, GROUP, method="dr_grpo")
        torch.testing.assert_close(torch.tensor(raw), utility, rtol=1e-5, atol=1e-6)
        for row, tokens in enumerate(responses):
            kl = lk.token_kl(logits[row].detach(), ref_logits[row], tokens, kl="k1").kl
            torch.testing.assert_close(data["kl"][row], kl, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                data["advantages"][row], centred[row] - BETA * kl, rtol=1e-4, atol=1e-5
            )
        every = [torch.cat(each) for each in (logits, ref_logits, responses)]
        k3 = lk.token_kl(*every, **lk.preset("slime", kl="low_var_kl").token_kl).kl
        torch.testing.assert_close(kl_loss, k3.mean(), rtol=1e-4, atol=1e-6)

        gradient = -(torch.cat(data["advantages"]) * torch.cat(log_probs)).mean()
        optimizer.zero_grad()
        (gradient + 0.01 * kl_loss).backward()
        optimizer.step()
        print(f"step {step + 1}: P(good) {utility.exp().mean():.3f}, KL loss {kl_loss:.4f}")
    print("rewards, KL and advantages of 3 batches agree with those from the logits")


if __name__ == "__main__":
    main()
