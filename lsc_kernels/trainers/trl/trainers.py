"""TRL's trainers with the KL in per-token rewards, and with our Bradley-Terry loss.

They override methods that TRL does not promise to keep, so they refuse versions they were not tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.ops.bradley_terry_loss import bradley_terry_loss
from lsc_kernels.ops.discounted_returns import discounted_returns
from lsc_kernels.ops.kl_from_logprobs import kl_from_logprobs
from lsc_kernels.ops.token_rewards import token_rewards
from lsc_kernels.trainers.trl import known

known.check()

from trl import GRPOTrainer, RewardTrainer  # noqa: E402  (a version that is not known must be told first)

TokenReward = Callable[..., Sequence[Sequence[float]]]
PER_TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


class LSCGRPOTrainer(GRPOTrainer):
    r"""GRPOTrainer whose price of KL is paid token by token in the reward, not in the loss.

    .. math:: r_{bt} = -\beta\,\mathrm{kl}_{bt} + \mathrm{dense}_{bt} + A_b\,1[t = \text{last}], \qquad
        A_{bt} = \sum_{t' \ge t} \gamma^{t' - t} r_{bt'}

    :math:`A_b` is what GRPOTrainer makes of the rewards: it is centred in the group, and scaled as ``scale_rewards``
    says. A token answers for its own KL and what comes after it, not for what was before. The KL is that of the policy
    that wrote the completion, a constant: k1 in the reward gives the gradient of KL(policy || reference), where k3 in
    GRPOTrainer's loss gives that of KL(reference || policy).

    Args:
        *args, **kwargs: as for GRPOTrainer. ``beta`` in its configuration is the price of a nat, in units of
            :math:`A_b`: of the utility with ``scale_rewards="none"``.
        kl: ``k1``, ``abs``, ``k2`` or ``k3``, as in :func:`lsc_kernels.kl_from_logprobs`.
        gamma: the discount, in [0, 1].
        token_reward: a function that takes what reward functions take, and returns a score for each id of
            ``completion_ids``, as a list per completion: ``dense``, which is not centred.

    Per step, ``kl`` is logged as TRL logs it; the batch that goes into the loss has ``advantages`` [B, T] and, to look
    at, ``token_rewards`` and ``token_kl``. A completion that no reward function could score has :math:`A_b` = 0, and
    pays for its KL, as in GRPOTrainer.

    Raises:
        ValueError: an option of the configuration that wants one advantage per sequence (``loss_type`` ``luspo`` or
            ``vespo``, ``importance_sampling_level="sequence"``, ``off_policy_mask_threshold``).
    """

    beta: float

    def __init__(
        self,
        *args: Any,
        kl: str = "k1",
        gamma: float = 1.0,
        token_reward: TokenReward | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.kl, self.gamma, self.token_reward = kl, gamma, token_reward
        self._scored: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._dense: Tensor | None = None
        for name, per_token in (
            ("loss_type", self.args.loss_type in PER_TOKEN_LOSSES),
            ("importance_sampling_level", self.args.importance_sampling_level == "token"),
            ("off_policy_mask_threshold", self.args.off_policy_mask_threshold is None),
        ):
            if not per_token:
                raise ValueError(
                    f"{name}={getattr(self.args, name)!r} wants one advantage per sequence, and LSCGRPOTrainer has one "
                    "per token; use GRPOTrainer with it, or RLOOTrainer for k1 in the sequence's reward"
                )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"]
        if "tool_mask" in batch:
            mask = mask * batch["tool_mask"]
        kl = self._sampled_kl(batch, mask)
        batch["token_kl"] = kl
        batch["token_rewards"] = token_rewards(
            batch["advantages"], kl, mask, beta=self.beta, dense=self._dense_rewards(mask)
        )
        batch["advantages"] = discounted_returns(batch["token_rewards"], mask, gamma=self.gamma)
        return batch

    def _sampled_kl(self, batch: dict[str, Any], mask: Tensor) -> Tensor:
        """The KL of the policy that wrote the completions, [B, T]."""
        if self.beta == 0.0:
            return torch.zeros(mask.shape, device=mask.device)
        logprobs = batch.get("old_per_token_logps")
        if logprobs is None:  # TRL spares itself this pass where it trains on what it has just sampled
            args, kwargs = self._scored
            with torch.no_grad():
                logprobs, _, _ = self._get_per_token_logps_and_entropies(self.model, *args, **kwargs)
        kl = kl_from_logprobs(logprobs, batch["ref_per_token_logps"], kl=self.kl, mask=mask)
        sums = torch.stack([kl.sum(), (mask != 0).sum().to(kl.dtype)])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"]["kl"].append(total / max(count, 1.0))
        return kl

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not torch.is_grad_enabled():  # while completions are scored, not in the loss
            self._scored = (args, kwargs)
        scored: tuple[Tensor, Tensor | None, Tensor | None] = super()._get_per_token_logps_and_entropies(
            model, *args, **kwargs
        )
        return scored

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[Any],
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self._dense = None
        if self.token_reward is not None:
            columns = {key: [row[key] for row in inputs] for key in inputs[0] if key != "prompt"}
            dense = self.token_reward(
                prompts=prompts,
                completions=completions,
                completion_ids=completion_ids,
                trainer_state=self.state,
                **columns,
            )
            self._dense = _padded(dense, completion_ids, self.accelerator.device)
        return rewards

    def _dense_rewards(self, mask: Tensor) -> Tensor | None:
        if self._dense is None:
            return None
        # TRL pads completions to a multiple where it is told to
        return torch.nn.functional.pad(self._dense, (0, mask.shape[1] - self._dense.shape[1]))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0  # the KL is paid in the reward
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        return loss


def _padded(dense: Sequence[Sequence[float]], completion_ids: Sequence[Any], device: torch.device) -> Tensor:
    """Rewards per token [B, T], padded on the right as completions are."""
    lengths = [len(ids) for ids in completion_ids]
    found = [len(row) for row in dense]
    if found != lengths:
        raise ValueError(
            f"token_reward must return one score per id of each completion, {lengths}; got {found}"
        )
    rows = [torch.as_tensor(row, dtype=torch.float32) for row in dense]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class LSCRewardTrainer(RewardTrainer):
    """RewardTrainer with :func:`lsc_kernels.bradley_terry_loss`: in fp32 also of bf16 scores, with margin and centring.

    Which position the model scores stays as it is: where the padding token also ends a text, Hugging Face's models take
    the token before it, in training as later.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        margin = inputs.get("margin")
        # TRL runs the model and logs its metrics; its loss of the same scores is dropped
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss = bradley_terry_loss(
            chosen,
            rejected,
            margin=None if margin is None else margin.float(),
            center=self.args.center_rewards_coefficient or 0.0,
        )
        return (loss, outputs) if return_outputs else loss
