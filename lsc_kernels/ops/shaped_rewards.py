"""From reward models' hidden states and two models' logits to per-token rewards, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsc_kernels.backends import select
from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.shaped_rewards import PolicySide, RewardSide, left_in, with_counted
from lsc_kernels.eager.token_logprobs import counted
from lsc_kernels.eager.token_rewards import RewardOptions
from lsc_kernels.formula import Formula
from lsc_kernels.ops import _checks, kl_from_logprobs, token_kl
from lsc_kernels.ops._autograd import first_derivative, quick_apply
from lsc_kernels.ops.aggregate_rewards import check_present, check_properties, logic_of
from lsc_kernels.ops.lsc_transform import operand, save_operands, saved_operands, spread, tensors, wants_grad
from lsc_kernels.ops.reward_head import check_head, reward_head
from lsc_kernels.ops.token_rewards import reward_options


class ShapedRewards(NamedTuple):
    """Outputs of :func:`shaped_rewards`: fp32, or fp64 where fp64 came in.

    What is per token is 0, and sends no gradient, where ``mask`` or an action of -100 leaves a position out.

    Attributes:
        rewards: [B, T], in units of utility: -beta kl, plus ``dense``, plus the utility (clipped by ``utility_clip``)
            at one position. Differentiable in all that it is made of.
        utility: [B], in nats: the log-probability that the sequence is good, before ``utility_clip``. Differentiable in
            hidden, weight and bias, or scores, and in reference_reward, scale and weights.
        scores: [B, K], in units of the reward models: what the heads give, or the ``scores`` given. Differentiable in
            hidden, weight and bias, or scores.
        kl: [B, T], in nats, as in :class:`TokenKL`.
        logprobs: [B, T], in nats, of the actions under the policy; given ones come back as they are.
        ref_logprobs: [B, T], in nats, likewise under the reference.
        entropy: [B, T], in nats, the policy's; None where log-probabilities were given instead of logits.
    """

    rewards: Tensor
    utility: Tensor
    scores: Tensor
    kl: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor | None


def shaped_rewards(
    hidden: Tensor | Sequence[Tensor] | None,
    weight: Tensor | Sequence[Tensor] | None,
    reference_reward: float | Tensor,
    policy: Tensor | None,
    ref: Tensor | None,
    actions: Tensor | None,
    mask: Tensor | None,
    *,
    beta: float,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    index: Tensor | Sequence[Tensor | None] | None = None,
    attention_mask: Tensor | Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | Sequence[Tensor | None] | None = None,
    scores: Tensor | None = None,
    formula: Formula | str | None = None,
    names: Sequence[str] | None = None,
    weights: Tensor | None = None,
    scale: float | Tensor = 1.0,
    floor: float | Tensor = 0.0,
    missing: str = "propagate",
    policy_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: str = "k3",
    grad: str = "autograd",
    temperature: float | Tensor = 1.0,
    log_ratio_clamp: tuple[float, float] | None = None,
    kl_clamp: tuple[float, float] | None = None,
    old_logprobs: Tensor | None = None,
    process_group: object = None,
    placement: str = "last",
    placement_index: Tensor | None = None,
    dense: Tensor | None = None,
    utility_clip: tuple[float, float] | None = None,
) -> ShapedRewards:
    r"""The reward half of an RLHF step: head, centring, log-sigmoid, aggregation, per-token KL, placement.

    The same as ``reward_head``, ``aggregate_rewards``, ``token_kl`` and ``token_rewards`` one after another, with their
    options and their accuracy, in one pass: on the CPU one parallel region, in which the thread that finishes a
    sequence's last token also scores the sequence and places its rewards.

    .. math:: r_{bt} = -\beta\,\mathrm{KL}_{bt} + 1[t = p(b)] \sum_k w_k \log\sigma((s_{bk} - r_{\mathrm{ref},k}) / c_k)

    with the log-probability of ``formula`` in place of the sum where one is given.

    Args:
        hidden: the reward model's hidden states [B, S, H], or packed [N, H] with ``cu_seqlens``; a list for K separate
            reward models (their heads then run first). None with ``scores``.
        weight: the heads, [K, H]; a list for separate models.
        reference_reward: a float or a tensor that broadcasts against the scores [B, K].
        policy: policy logits [B, T, V], or None with ``policy_logprobs``.
        ref: reference logits [B, T, V], or None with ``ref_logprobs``.
        actions: [B, T] ids; ``-100`` leaves a position out. Beside log-probabilities they say no more than that, and
            may be None.
        mask: [B, T], nonzero counts; None counts everything.
        beta: the price of a nat of KL in units of utility.
        bias, index, attention_mask, cu_seqlens: as in :func:`reward_head`; ``index`` is the position of ``hidden``.
        scores: [B, K], instead of ``hidden`` and ``weight``.
        formula, names, weights, scale, floor, missing: as in :func:`aggregate_rewards`.
        policy_logprobs, ref_logprobs: [B, T], both, instead of logits: the softmax is skipped.
        kl, grad, temperature, log_ratio_clamp, kl_clamp, old_logprobs, process_group: as in :func:`token_kl`.
        placement, dense, utility_clip: as in :func:`token_rewards`.
        placement_index: the ``index`` of :func:`token_rewards`, in [0, T). With ``scores``, where there is no hidden
            state to index, ``index`` says the same.

    Returns:
        ``ShapedRewards(rewards, utility, scores, kl, logprobs, ref_logprobs, entropy)``, fp32 (fp64 for fp64 input),
        0 at what the mask leaves out. ``entropy`` is None where log-probabilities were given.

    Gradients:
        To hidden, weight, bias, scores, reference_reward, scale, weights, both models' logits or log-probabilities, and
        dense, like its parts. First derivative only.

    Raises:
        TypeError, ValueError, IndexError: as its parts do; ValueError also where both or neither of two alternatives
            (hidden or scores, logits or log-probabilities) are given.

    Source:
        Z. Wang et al., "Transforming and Combining Rewards for Aligning Large Language Models" (2024),
        arXiv:2402.00742.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> out = lk.shaped_rewards(
        ...     None, None, torch.tensor([0.0, 0.0]), None, None, None, torch.tensor([[1, 1, 1]]), beta=0.1, kl="k1",
        ...     scores=torch.tensor([[2.0, -1.0]]), policy_logprobs=torch.tensor([[-1.0, -2.0, -1.0]]),
        ...     ref_logprobs=torch.tensor([[-1.0, -1.0, -3.0]]))
        >>> [round(x, 4) for x in out.rewards[0].tolist()]
        [0.0, 0.1, -1.6402]
    """
    _checks.no_process_group(process_group)
    if (hidden is None) == (scores is None):
        raise ValueError(
            "give either hidden and weight, or scores; got " + ("neither" if scores is None else "both")
        )
    if hidden is None and placement_index is None and isinstance(index, Tensor):
        index, placement_index = None, index
    head: tuple[Any, ...] = (hidden, weight, bias, attention_mask, index, cu_seqlens)
    if hidden is not None and (isinstance(hidden, (list, tuple)) or missing == "raise"):
        masks: dict[str, Any] = {"attention_mask": attention_mask, "index": index, "cu_seqlens": cu_seqlens}
        scores = reward_head(hidden, weight, bias, **masks)  # type: ignore[arg-type]
    elif hidden is not None:
        check_head(*head)

    first, second, ids, kept, tau = _policy_side(
        policy, ref, actions, mask, policy_logprobs, ref_logprobs, temperature
    )
    per_token, device = first.shape[:2], first.device
    kinds = kl_from_logprobs.KINDS if ids is None else token_kl.KINDS
    kl_options = kl_from_logprobs.kl_options(kl, grad, log_ratio_clamp, kl_clamp, kinds)
    placing = reward_options(beta, placement, placement_index, utility_clip, "placement_index")
    _check_placement(placement_index, dense, first, per_token)
    if old_logprobs is not None:
        old_logprobs = _checks.old_logprobs(old_logprobs, per_token, "[B, T]", device)
    policy_side = PolicySide(first, second, ids, kept, old_logprobs, tau, placement_index, dense)
    head = head if scores is None else (None,) * 6
    operands = {"reference_reward": reference_reward, "scale": scale, "floor": floor, "weights": weights}
    reward_side = _reward_side(head, scores, operands, formula, names, missing, per_token[0], device)

    every = (*tensors(*reward_side), first, second, *tensors(dense))
    kernels = select("shaped_rewards", *every)
    if wants_grad(*every):
        keep_ref = ids is None or token_kl.reads_ref(kl_options, second)
        leaves, fixed = _parted(reward_side, policy_side)
        outputs = _apply((kernels, kl_options, placing, keep_ref, fixed), *leaves)
    else:
        outputs = kernels.forward(reward_side, policy_side, kl_options, placing)
    rewards, utility, own_scores, divergence, logprobs, reference, entropy = outputs[:7]
    return ShapedRewards(
        *(rewards, utility, own_scores if scores is None else scores.to(utility.dtype), divergence),
        *(logprobs, reference, None if ids is None else entropy),
    )


def _policy_side(
    policy: object,
    ref: object,
    actions: object,
    mask: object,
    policy_logprobs: object,
    ref_logprobs: object,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | Tensor]:
    """Check what says what the two models think: :class:`PolicySide` down to the mask, and the temperature."""
    if (policy_logprobs is None) != (ref_logprobs is None):
        raise ValueError("policy_logprobs and ref_logprobs go together; got only one of them")
    if (policy is None and ref is None) == (policy_logprobs is None):
        what = "neither" if policy_logprobs is None else "both"
        raise ValueError(
            f"give either policy and ref (logits), or policy_logprobs and ref_logprobs; got {what}"
        )
    from_logits = policy_logprobs is None
    names = ("policy", "ref") if from_logits else ("policy_logprobs", "ref_logprobs")
    first = _checks.floating(names[0], policy if from_logits else policy_logprobs)
    second = _checks.floating(names[1], ref if from_logits else ref_logprobs)
    wanted = 3 if from_logits else 2
    if first.dim() != wanted or (from_logits and first.shape[-1] == 0):
        form = "[B, T, V] with V > 0" if from_logits else "[B, T]"
        raise ValueError(f"{names[0]} must be {form}; got {list(first.shape)}")
    _checks.like(names[1], second, first.shape, names[0], names[0], first.device)
    per_token = first.shape[:2]
    given = None if mask is None else _checks.mask("mask", mask, per_token, "[B, T]", first.device)
    if not from_logits and actions is None:
        return first, second, None, given, 1.0
    ids = _checks.integer("actions", actions)
    _checks.like("actions", ids, per_token, "[B, T]", names[0], first.device)
    if not from_logits:  # what was sampled is in the log-probabilities; here it only says what does not count
        return first, second, None, counted(ids, None if given is None else given != 0), 1.0
    tau = _checks.temperature(temperature, ids, given, first.device)
    return first, second, ids, given, tau


def _check_placement(
    index: Tensor | None, dense: Tensor | None, policy: Tensor, per_token: torch.Size
) -> None:
    if index is not None:
        _checks.integer("placement_index", index)
        _checks.like("placement_index", index, per_token[:1], "[B]", "policy", policy.device)
    if dense is not None:
        _checks.floating("dense", dense)
        _checks.like("dense", dense, per_token, "[B, T]", "policy", policy.device)


def _reward_side(
    head: tuple[Any, ...],
    scores: object,
    operands: dict[str, Any],
    formula: Formula | str | None,
    names: Sequence[str] | None,
    missing: str,
    batch: int,
    device: torch.device,
) -> RewardSide:
    """Check the reward side, of which the head is checked, and broadcast its operands against the scores [B, K]."""
    if scores is not None:
        given = columns = _checks.floating("scores", scores)
        if columns.dim() != 2:
            raise ValueError(f"scores must be [B, K]; got {list(columns.shape)}")
        source = "scores"
    else:
        given = None
        hidden, weight, *_, cu_seqlens = head
        sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        columns = weight.new_empty(1).expand(sequences, weight.shape[0])
        source = "hidden"
    if columns.shape[0] != batch:
        raise ValueError(f"{source} must have one entry per sequence, B = {batch}; got {columns.shape[0]}")
    _checks.same_device(source, columns, "policy", device)
    names = check_properties(columns.shape[1], names, missing, device)
    weights = operands["weights"]
    if weights is not None:
        _checks.floating("weights", weights)
        _checks.same_device("weights", weights, "policy", device)
    program, read, weights = logic_of(formula, names, columns, weights)
    if missing == "raise" and given is not None:
        check_present(given, read)
    checked = {name: operand(name, operands[name], device) for name in ("reference_reward", "scale", "floor")}
    shaped, spread_out = spread("scores", columns, {**checked, "weights": weights})
    if shaped.shape != columns.shape:
        raise ValueError(
            f"reference_reward, scale, floor and weights must broadcast to [B, K] = {list(columns.shape)}; "
            f"got {list(shaped.shape)}"
        )
    return RewardSide._make((*head, given, *spread_out, missing == "ignore", program))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


class _Leaves(NamedTuple):
    """What a gradient may be wanted of: of each its value, whether it is wanted, or the gradient."""

    hidden: Any = None
    weight: Any = None
    bias: Any = None
    scores: Any = None
    reference_reward: Any = None
    scale: Any = None
    weights: Any = None
    policy: Any = None
    ref: Any = None
    dense: Any = None


def _parted(reward: RewardSide, policy: PolicySide) -> tuple[_Leaves, tuple[Any, ...]]:
    """Both sides as their leaves and the rest, for :func:`_joined`."""
    leaves = _Leaves(*reward[:3], *reward[6:9], reward.weights, *policy[:2], policy.dense)
    return leaves, (*reward[3:6], reward.floor, *reward[11:], *policy[2:7])


def _joined(leaves: Sequence[Any], fixed: Sequence[Any]) -> tuple[RewardSide, PolicySide]:
    *head_and_scale, weights, policy, ref, dense = leaves
    reward = (*head_and_scale[:3], *fixed[:3], *head_and_scale[3:], fixed[3], weights, *fixed[4:6])
    return RewardSide._make(reward), PolicySide._make((policy, ref, *fixed[6:], dense))


class _ShapedRewards(torch.autograd.Function):
    """Forward in one pass; backward through the parts of the same backend, in reverse."""

    @staticmethod
    def forward(
        ctx: Any,
        call: tuple[ModuleType, KLOptions, RewardOptions, bool, tuple[Any, ...]],
        *given: Any,
    ) -> tuple[Tensor | None, ...]:
        kernels, kl_options, placing, keep_ref, fixed = call
        leaves = _Leaves(*given)
        outputs = kernels.forward(*_joined(leaves, fixed), kl_options, placing)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs.state)
        ctx.call = kernels, kl_options, placing
        kept = leaves if keep_ref else leaves._replace(ref=None)
        save_operands(ctx, *kept, *fixed, outputs.utility, outputs.scores, outputs.kl, outputs.state)
        rewards, utility, scores, *rest = outputs
        return rewards, utility, scores if leaves.scores is None else None, *rest

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
        operands = saved_operands(ctx)
        split = len(_Leaves._fields)
        sides = _joined(operands[:split], operands[split:-4])
        with torch.no_grad():
            wants = _Leaves._make(ctx.needs_input_grad[1:])
            gradients = _gradients(ctx.call, *sides, operands[-4:], upstream, wants)
        sources = (*upstream, *tensors(*operands[:-4]))
        return None, *(first_derivative("shaped_rewards", each, *sources) for each in gradients)


_apply = quick_apply(_ShapedRewards)


def _gradients(
    call: tuple[ModuleType, KLOptions, RewardOptions],
    reward: RewardSide,
    policy: PolicySide,
    saved: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    wants: _Leaves,
) -> _Leaves:
    kernels, kl_options, placing = call
    policy = with_counted(policy)
    utility, scores, kl, state = saved
    to_rewards, to_utility, to_scores, to_kl, to_logprobs, to_ref_logprobs, to_entropy, _ = upstream
    gradients = _Leaves()
    wants_reward_side, wants_policy_side = any(wants[:7]), wants.policy or wants.ref
    if to_rewards is not None:
        from_rewards = kernels.token_rewards.backward(
            *(to_rewards, utility, kl, policy.mask, policy.place, policy.dense, placing),
            *(wants_reward_side, wants_policy_side, wants.dense),
        )
        to_utility, to_kl = _sum(to_utility, from_rewards[0]), _sum(to_kl, from_rewards[1])
        gradients = gradients._replace(dense=from_rewards[2])

    if wants_reward_side and to_utility is not None:
        to_given, to_reference, to_scale, to_weights = kernels.aggregate_rewards.backward(
            *(to_utility, scores, *reward[7:], wants.reference_reward, wants.scale, wants.weights)
        )
        to_scores = _sum(to_scores, to_given)
        gradients = gradients._replace(reference_reward=to_reference, scale=to_scale, weights=to_weights)
    if reward.scores is not None:
        gradients = gradients._replace(scores=to_scores if wants.scores else None)
    elif to_scores is not None:
        to_hidden, to_weight, to_bias = kernels.reward_head.backward(
            to_scores, reward.hidden, reward.weight, *reward[3:6], False, *wants[:3]
        )
        if to_bias is not None and reward.bias is not None:
            to_bias = to_bias.to(reward.bias.dtype)
        gradients = gradients._replace(hidden=to_hidden, weight=to_weight, bias=to_bias)

    if not wants_policy_side:
        return gradients
    if policy.actions is not None:
        ref = policy.policy if policy.ref is None else policy.ref  # what is not read still has a shape
        to_policy, to_ref = kernels.token_kl.backward(
            *(to_kl, to_logprobs, to_ref_logprobs, to_entropy, policy.policy, ref, *policy[2:6]),
            *(kl_options, state, wants.policy, wants.ref),
        )
        return gradients._replace(policy=to_policy, ref=to_ref)
    to_policy = to_ref = None
    if to_kl is not None:
        # a sum of two gradients is rounded once
        both = ((policy.policy, to_logprobs), (policy.ref, to_ref_logprobs))
        precise = (given if also is None else given.to(kl.dtype) for given, also in both)
        to_policy, to_ref = kernels.kl_from_logprobs.backward(
            to_kl, *precise, policy.mask, policy.old_logprobs, kl_options, wants.policy, wants.ref
        )

    def with_copy(
        wanted: bool, gradient: Tensor | None, copied: Tensor | None, given: Tensor
    ) -> Tensor | None:
        """The gradient with that to the copy among the outputs."""
        if copied is None or not wanted:
            return gradient
        total = _sum(gradient, left_in(copied, policy.mask))
        return None if total is None else total.to(given.dtype)

    return gradients._replace(
        policy=with_copy(wants.policy, to_policy, to_logprobs, policy.policy),
        ref=with_copy(wants.ref, to_ref, to_ref_logprobs, policy.ref),
    )
