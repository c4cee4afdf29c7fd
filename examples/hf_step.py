"""A training loop of one's own with Hugging Face models: two reward models, a reference, REINFORCE, on a CPU, offline.

    python examples/hf_step.py

Policy, reference and two reward models (sequence classifiers with one label) are tiny, have random weights, and are
made on the spot. The heads of the reward models become one ``RewardHead``, which reads their hidden states where each
text ends: prompts are padded on the left, responses on the right. The reference reward of each prompt is the 85%
quantile of samples from the reference policy. ``shaped_rewards`` makes per-token rewards of it all, for three steps.
Scores, KL, rewards and advantages are compared with the models' own forward passes and with the formulas in fp64.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any

if importlib.util.find_spec("transformers") is None:
    print("hf_step: skipped; it wants transformers: pip install 'lsc-kernels[hf]'")
    sys.exit()

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing is asked of a hub

import torch
from torch import Tensor

import lsc_kernels as lk
from lsc_kernels.demo.models import build_language_model, build_tokenizer, reward_model_from

PROMPTS = ["Tell me of the sea.", "What is rain?", "Why is the sky blue?", "Name a tree."]
SAMPLES, LONGEST, BETA, GAMMA = 8, 12, 0.05, 0.99


def sample(policy: Any, prompts: Any, times: int, eos: int) -> tuple[Tensor, Tensor]:
    """Responses [times B, T], those of a prompt together, and the mask of what each counts: up to its end token."""
    with torch.no_grad():
        texts = policy.generate(**prompts, do_sample=True, max_new_tokens=LONGEST, num_return_sequences=times)
    responses = texts[:, prompts["input_ids"].shape[1] :]
    ended_before = (responses == eos).cumsum(-1) - (responses == eos).long()
    return responses, ended_before == 0


def main() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(PROMPTS, vocab_size=300)
    tokenizer.padding_side = "left"
    policy, ref = (build_language_model(tokenizer, hidden_size=32, layers=1).eval() for _ in range(2))
    policy.load_state_dict({name: w + 0.02 * torch.randn_like(w) for name, w in ref.state_dict().items()})
    reward_models = [
        reward_model_from(build_language_model(tokenizer, hidden_size=size, layers=1)).eval()
        for size in (32, 48)
    ]
    for model in reward_models:
        torch.nn.init.normal_(model.score.weight, std=0.3)
    head = lk.nn.RewardHead.from_sequence_classifiers(reward_models).requires_grad_(False)

    prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    repeated = {name: rows.repeat_interleave(SAMPLES, 0) for name, rows in prompts.items()}
    start = prompts["input_ids"].shape[1]

    def together(responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.cat([repeated["input_ids"], responses], 1)
        return ids, torch.cat([repeated["attention_mask"], mask], 1)

    def scored(ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = [
                model.base_model(ids, attention_mask=attention_mask).last_hidden_state
                for model in reward_models
            ]
        return head(hidden, attention_mask=[attention_mask] * len(hidden))

    of_ref = scored(*together(*sample(ref, prompts, SAMPLES, tokenizer.eos_token_id)))
    good_enough = lk.reference.quantile_reference(of_ref.view(len(PROMPTS), SAMPLES, -1), 0.85)
    reference_reward = good_enough.repeat_interleave(SAMPLES, 0)  # [B, K]

    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for step in range(3):
        responses, mask = sample(policy, prompts, SAMPLES, tokenizer.eos_token_id)
        ids, attention_mask = together(responses, mask)
        scores = scored(ids, attention_mask)
        logits = policy(ids, attention_mask=attention_mask).logits[:, start - 1 : -1]
        with torch.no_grad():
            ref_logits = ref(ids, attention_mask=attention_mask).logits[:, start - 1 : -1]
        out = lk.shaped_rewards(
            *(None, None, reference_reward, logits, ref_logits, responses, mask),
            **{"beta": BETA, "kl": "k1", "scores": scores},
        )
        returns = lk.discounted_returns(out.rewards.detach(), mask, gamma=GAMMA)
        advantages = lk.masked_whiten(returns, mask)

        for row in (0, len(ids) // 2, len(ids) - 1):
            # alone, without padding, as the models take it
            text = ids[row][attention_mask[row].bool()][None]
            with torch.no_grad():
                alone = torch.cat([model(text).logits[0] for model in reward_models])
            torch.testing.assert_close(scores[row], alone, rtol=1e-4, atol=1e-4)
        written_out = textbook(scores, reference_reward, logits.detach(), ref_logits, responses, mask)
        for name, got in {"kl": out.kl, "rewards": out.rewards, "advantages": advantages}.items():
            torch.testing.assert_close(got.double().detach(), written_out[name], rtol=1e-4, atol=1e-4)

        loss = -(advantages * out.logprobs).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        good, kl = out.utility.exp().mean(), out.kl.sum() / mask.sum()
        print(f"step {step + 1}: P(good in both) {good:.3f}, KL {kl:.4f} nats a token")
    print(
        "scores, KL, rewards and advantages of 3 steps agree with the models' own and with the formulas in fp64"
    )


def textbook(
    scores: Tensor,
    reference_reward: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    actions: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """k1, rewards and whitened returns, one formula after another."""
    utility = torch.nn.functional.logsigmoid((scores - reference_reward).double()).sum(-1)
    logprobs, ref_logprobs = (
        each.double().log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
        for each in (logits, ref_logits)
    )
    kl = (logprobs - ref_logprobs) * mask
    last = mask.sum(-1, keepdim=True) - 1
    rewards = (-BETA * kl).scatter_add(1, last, utility[:, None])
    returns, after = torch.zeros_like(rewards), torch.zeros_like(utility)
    for t in reversed(range(rewards.shape[1])):
        after = returns[:, t] = (rewards[:, t] + GAMMA * after) * mask[:, t]
    counted = returns[mask]
    advantages = (returns - counted.mean()) / (counted.var() + 1e-8).sqrt() * mask
    return {"kl": kl, "rewards": rewards, "advantages": advantages}


if __name__ == "__main__":
    main()
