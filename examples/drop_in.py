"""The reward half of an RLHF step in ten lines: from logits and reward scores to rewards per token."""

import torch

import lsc_kernels as lk

B, T, V = 4, 32, 32000  # sequences, response tokens, vocabulary
policy_logits = torch.randn(B, T, V, requires_grad=True)  # of your policy, where it predicts the response
ref_logits = policy_logits.detach() + 0.1 * torch.randn(B, T, V)  # of its reference
tokens, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.bool)  # the response; what counts of it
scores = torch.tensor([[3.1, 0.4], [9.8, -4.0], [-2.0, 6.5], [1.0, 1.2]])  # helpful, harmless; [B, K]
reference_reward = torch.tensor(
    [1.2, 0.3]
)  # what is good enough: say, the 85% quantile of the policy's samples

utility = lk.aggregate_rewards(scores, reference_reward)  # [B], log P(good in the sense of both)
policy = lk.token_kl(policy_logits, ref_logits, tokens, kl="k3", mask=mask)  # KL, log-probs, entropy; [B, T]
rewards = lk.token_rewards(utility, policy.kl.detach(), mask, beta=0.05)  # [B, T], utility at the last token
policy.kl.mean().backward()  # or the KL as a loss: its gradient goes to the policy's logits

print("raw sum ranks", scores.sum(-1).argsort(descending=True).tolist())
print("LSC-AND ranks", utility.argsort(descending=True).tolist(), "with P(good in both)", utility.exp())
print("rewards", tuple(rewards.shape), "summing to", rewards.sum(-1))
