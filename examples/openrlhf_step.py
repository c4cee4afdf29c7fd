"""Rewards, KL and advantages of a few PPO steps through the functions that OpenRLHF is given, on a CPU, without it.

    python examples/openrlhf_step.py

This file is one that ``--reward.remote_url`` could name: its ``reward_func`` scores by two functions that conflict. A
tiny policy with random weights, its reference and a critic, made on the spot, see padded responses.
``compute_approx_kl``, ``compute_reward`` and ``get_advantages_and_returns``, which ``patch()`` puts into OpenRLHF, make
advantages of them, and policy and critic take a step, three times. Rewards, KL and advantages are compared with this
library's own functions, applied to logits. What is not here: the rollout (responses are random tokens), Ray and
DeepSpeed.
"""

from __future__ import annotations

import torch

import lsc_kernels as lk
from lsc_kernels.demo.models import build_language_model, build_tokenizer
from lsc_kernels.trainers import openrlhf

B, P, R = 8, 6, 12  # responses, tokens of the prompt, tokens of the response
BETA, GAMMA, LAM = 0.05, 1.0, 0.95  # the price of KL, the discount, the trace
REFERENCE = {"vowels": 1.0, "brief": 0.0}


def responses_of(queries: list[str], prompts: list[str]) -> list[str]:
    return [query[len(prompt) :] for query, prompt in zip(queries, prompts, strict=True)]


def vowels(queries: list[str], prompts: list[str], labels: list[object]) -> list[float]:
    return [4 * sum(map(text.count, "aeiou")) / max(len(text), 1) for text in responses_of(queries, prompts)]


def brief(queries: list[str], prompts: list[str], labels: list[object]) -> list[float]:
    return [1 - len(text) / 20 for text in responses_of(queries, prompts)]


reward_func = openrlhf.make_reward_func({"vowels": vowels, "brief": brief}, reference_reward=REFERENCE)


def main() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(["Tell me of the sea.", "What is rain?"], vocab_size=300)
    policy, ref = (build_language_model(tokenizer, hidden_size=32, layers=1) for _ in range(2))
    ref.load_state_dict({name: w + 0.1 * torch.randn_like(w) for name, w in policy.state_dict().items()})
    ref.requires_grad_(False)
    critic = torch.nn.Linear(32, 1)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=1e-2)

    for step in range(3):
        tokens = torch.randint(len(tokenizer), (B, P + R))
        actions, action_mask = tokens[:, P:], (torch.arange(R) < torch.randint(2, R + 1, (B, 1))).long()
        prompts = tokenizer.batch_decode(tokens[:, :P])
        written = [row[mask.bool()] for row, mask in zip(actions, action_mask, strict=True)]
        queries = [
            prompt + text for prompt, text in zip(prompts, tokenizer.batch_decode(written), strict=True)
        ]
        # OpenRLHF asks for one query at a time
        scored = [
            reward_func([query], [prompt], [None]) for query, prompt in zip(queries, prompts, strict=True)
        ]
        reward = torch.cat([each["rewards"] for each in scored])

        output = policy(input_ids=tokens, output_hidden_states=True)
        logits, ref_logits = output.logits[:, P - 1 : -1], ref(input_ids=tokens).logits[:, P - 1 : -1]
        log_probs, ref_log_probs = (
            lk.token_logprobs(each, actions).logprobs for each in (logits, ref_logits)
        )
        values = critic(output.hidden_states[-1][:, P - 1 : -1]).squeeze(-1)
        kl = openrlhf.compute_approx_kl(log_probs.detach(), ref_log_probs, kl_estimator="k1")
        rewards = openrlhf.compute_reward(reward, BETA, kl, action_mask)
        advantages, returns = openrlhf.get_advantages_and_returns(
            None, values.detach(), rewards, action_mask, GAMMA, LAM
        )

        scores = torch.stack(
            [torch.cat([each["extra_logs"][name] for each in scored]) for name in REFERENCE], 1
        )
        utility = lk.aggregate_rewards(scores, torch.tensor(list(REFERENCE.values())))
        preset = lk.preset("openrlhf", kl="k1")
        exact = lk.token_kl(logits.detach(), ref_logits, actions, mask=action_mask, **preset.token_kl).kl
        expected = lk.token_rewards(utility, exact, action_mask, beta=BETA, **preset.token_rewards)
        ours = lk.gae(expected, values.detach(), action_mask, **preset.gae | {"gamma": GAMMA, "lam": LAM})
        for theirs, wanted in ((reward, utility), (kl * action_mask, exact), (rewards, expected)):
            torch.testing.assert_close(theirs, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((advantages, returns), ours, rtol=1e-4, atol=1e-5)

        gradient = -(advantages * log_probs)[action_mask.bool()].mean()
        critic_loss = (values - returns)[action_mask.bool()].square().mean()
        optimizer.zero_grad()
        (gradient + critic_loss).backward()
        optimizer.step()
        print(f"step {step + 1}: P(good) {utility.exp().mean():.3f}, critic loss {critic_loss:.4f}")
    print("rewards, KL and advantages of 3 batches agree with those from the logits")


if __name__ == "__main__":
    main()
