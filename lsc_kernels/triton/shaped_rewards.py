"""shaped_rewards in Triton: one launch from hidden states and logits to per-token rewards.

Design constraint: no program waits for another. Program (sequence, token) makes its row state and KL, finds from the
end of the sequence's mask where the utility goes, and writes its own reward. The one whose place that is also does the
sequence's K dot products, centring, log-sigmoid and aggregation, with a formula too; where there is no such place, the
first token's does.

Bytes: each counted logit once, a part of the sequence's mask for each of its tokens (from the second-level cache), K
rows of weights and one of hidden per sequence. Few rows of a long vocabulary are read by several programs each; the
last of them to come goes on as the row's: see :data:`~lsc_kernels.triton.token_kl.SPLIT_BELOW`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions
from lsc_kernels.eager.shaped_rewards import Outputs, PolicySide, RewardSide
from lsc_kernels.eager.token_logprobs import check_actions, counted
from lsc_kernels.eager.token_rewards import RewardOptions, check_index
from lsc_kernels.triton import aggregate_rewards, kl_from_logprobs, reward_head, token_kl, token_rewards
from lsc_kernels.triton._launch import block, dense, launch, operator
from lsc_kernels.triton.aggregate_formula import evaluated, instructions, result, slots
from lsc_kernels.triton.aggregate_rewards import judged, weighed
from lsc_kernels.triton.formula import program_on
from lsc_kernels.triton.kl import clamp
from lsc_kernels.triton.kl_from_logprobs import evaluate_logprobs
from lsc_kernels.triton.log_sigmoid import Operand
from lsc_kernels.triton.lsc_transform import has_floor, joined, operand, split
from lsc_kernels.triton.positions import OUTSIDE, counted_at, placed
from lsc_kernels.triton.reward_head import check_positions, dot_products, pooling, positions, scored_position
from lsc_kernels.triton.token_kl import (
    aligned,
    forward_options,
    is_reverse,
    model,
    new_rows,
    rows_of,
    split_temperature,
    temperature_of,
)
from lsc_kernels.triton.token_rewards import one_stride, per_token, two_strides
from lsc_kernels.triton.token_rows import SAVED, forward_row, leaves_row, no_token

__all__ = ["aggregate_rewards", "forward", "kl_from_logprobs", "reward_head", "token_kl", "token_rewards"]

WIDTH = 128
"""Columns of hidden that a scoring program reads together, times up to 8 weights: few registers."""

BLOCK = block(512)
"""Positions a program takes where log-probabilities are given."""

_REWARD_NUMBERS = (
    "hidden_outer", "hidden_inner", "hidden_column", "hidden_length", "head_mask_row", "head_mask_step",
    "head_index_stride", "segment_stride", "weight_row", "weight_column", "bias_stride", "score_row", "score_column",
    "reference_row", "reference_column", "scale_row", "scale_column", "floor_row", "floor_column", "exponent_row",
    "exponent_column", "program_length", "place_stride", "dense_row", "dense_step", "length",
)  # fmt: skip
_REWARD_DATA = (
    "hidden", "head_mask", "head_index", "segments", "weight", "bias", "scores", "reference", "scale", "floor",
    "exponents", "program", "place_index", "dense", "utilities", "new_scores", "rewards", "mask", "actions",
    "old_logprobs", "kl", "logprobs", "ref_logprobs",
)  # fmt: skip
_LOGIT_NUMBERS = (
    "policy_outer", "policy_inner", "policy_step", "ref_outer", "ref_inner", "ref_step", "temperature_stride",
    "kind", "straight_through",
)  # fmt: skip
_LOGIT_DATA = ("policy", "ref", "temperatures", "states", "arrivals", "entropy", "saved")


@triton.jit
def _utility(
    sequence,
    hidden, hidden_outer, hidden_inner, hidden_column, hidden_length, width,
    head_mask, head_mask_row, head_mask_step, head_index, head_index_stride, segments, segment_stride,
    weight, weight_row, weight_column, bias, bias_stride, scores, score_row, score_column,
    reference, scale, floor, exponent, program, program_length, new_scores, properties,
    POOL: tl.constexpr, IGNORE_MISSING: tl.constexpr, HAS_FLOOR: tl.constexpr,
    WEIGHTS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """A sequence's utility, rounded to fp32, from its scores, or its hidden state, whose scores are then written."""
    total = tl.full((), 0.0, tl.float64)
    if program is not None:
        slot, column, inside, parent = instructions(program, program_length, SLOTS)
        named = tl.zeros([SLOTS], tl.float32)
    for first in range(0, properties, WEIGHTS):
        property_ = (first + tl.arange(0, WEIGHTS)).to(tl.int64)
        known = property_ < properties
        if hidden is None:
            score = tl.load(
                scores + sequence * score_row + property_ * score_column, mask=known, other=0.0
            ).to(tl.float32)
        else:
            outer, inner = scored_position(
                sequence, head_mask, head_mask_row, head_mask_step, head_index, head_index_stride, segments,
                segment_stride, hidden_length, POOL,
            )  # fmt: skip
            row = hidden + outer * hidden_outer + tl.maximum(inner, 0) * hidden_inner
            # nowhere no column is read, instead of a branch around all of it: Triton 3.6 has no code for one on AMD
            exact = dot_products(
                row, hidden_column, tl.where(inner >= 0, width, 0), weight, weight_row, weight_column,
                bias, bias_stride, property_, known, WIDTH,
            )  # fmt: skip
            score = tl.where(inner >= 0, exact, float("nan")).to(tl.float32)
            tl.store(new_scores + sequence * properties + property_, score, mask=known)
        if program is not None:
            # to the slots of their properties, without a way through memory that the program would have to wait for
            own = inside[:, None] & (column[:, None] == property_[None, :])
            named += tl.sum(tl.where(own, score[None, :], 0.0), 1)
        else:
            _, value, _, own_exponent, _ = judged(
                score,
                reference,
                scale,
                floor,
                exponent,
                sequence,
                property_,
                known,
                IGNORE_MISSING,
                HAS_FLOOR,
            )
            total += tl.sum(weighed(value, own_exponent, known), 0)
    if program is not None:
        _, _, _, values = evaluated(
            program, program_length, named.to(tl.float64), slot, column, inside, parent,
            reference, scale, floor, exponent, sequence, IGNORE_MISSING,
        )  # fmt: skip
        total = result(values, slot, program_length)
    return total.to(tl.float32).to(tl.float64)


@triton.jit(
    do_not_specialize=(*_REWARD_NUMBERS, *_LOGIT_NUMBERS),
    do_not_specialize_on_alignment=(*_REWARD_DATA, *_LOGIT_DATA),
)
def _logits_kernel(
    hidden, hidden_outer: tl.int64, hidden_inner: tl.int64, hidden_column: tl.int64, hidden_length: tl.int64, width,
    head_mask, head_mask_row: tl.int64, head_mask_step: tl.int64, head_index, head_index_stride: tl.int64,
    segments, segment_stride: tl.int64,
    weight, weight_row: tl.int64, weight_column: tl.int64, bias, bias_stride: tl.int64,
    scores, score_row: tl.int64, score_column: tl.int64,
    reference, reference_row: tl.int64, reference_column: tl.int64, reference_number: tl.float64,
    scale, scale_row: tl.int64, scale_column: tl.int64, scale_number: tl.float64,
    floor, floor_row: tl.int64, floor_column: tl.int64, floor_number: tl.float64,
    exponents, exponent_row: tl.int64, exponent_column: tl.int64, exponent_number: tl.float64,
    program, program_length, properties,
    place_index, place_stride: tl.int64, dense, dense_row: tl.int64, dense_step: tl.int64,
    beta: tl.float64, clip_low: tl.float64, clip_high: tl.float64, utilities, new_scores, rewards,
    mask, actions, old_logprobs, length: tl.int64,
    policy, policy_outer: tl.int64, policy_inner: tl.int64, policy_step,
    ref, ref_outer: tl.int64, ref_inner: tl.int64, ref_step,
    temperatures, temperature_stride: tl.int64, temperature: tl.float64, states, arrivals,
    kl, logprobs, ref_logprobs, entropy, saved, V,
    ratio_low: tl.float64, ratio_high: tl.float64, kl_low: tl.float64, kl_high: tl.float64, kind, straight_through,
    REVERSE: tl.constexpr, POLICY_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr,
    POOL: tl.constexpr, IGNORE_MISSING: tl.constexpr, HAS_FLOOR: tl.constexpr, PLACEMENT: tl.constexpr,
    HAS_KL: tl.constexpr, WEIGHTS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sequence, position = row, row * 0  # a batch of empty sequences has a program for each of them
    if length > 0:
        sequence, position = row // length, row % length
    own_mask = mask if mask is None else mask + sequence * length
    own_actions = actions + sequence * length
    own_saved = saved + row * SAVED
    is_counted = counted_at(own_mask, 1, own_actions, position, position < length)
    if arrivals is not None:
        own = leaves_row(
            policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
            temperatures, temperature_stride, temperature, states, arrivals, row, is_counted, length, V,
            REVERSE, POLICY_ALIGNED, REF_ALIGNED, GROUP, LANES,
        )  # fmt: skip
        if own == 0:
            return
    if is_counted:
        token = forward_row(
            policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
            actions, old_logprobs, temperatures, temperature_stride, temperature, states, own_saved,
            row, length, V, ratio_low, ratio_high, kl_low, kl_high, kind, straight_through,
            REVERSE, arrivals is None, POLICY_ALIGNED, REF_ALIGNED, GROUP, LANES,
        )  # fmt: skip
    elif length > 0:
        token = no_token(own_saved)
    else:
        token = no_token(None)
    own_kl = token.kl
    if length > 0:
        tl.store(kl + row, token.kl)
        tl.store(logprobs + row, token.logprob)
        tl.store(ref_logprobs + row, token.ref_logprob)
        tl.store(entropy + row, token.entropy)

    own_index = place_index if place_index is None else tl.load(place_index + sequence * place_stride)
    place = placed(own_mask, 1, own_actions, own_index, length, PLACEMENT)
    own_dense = own_kl
    if dense is not None:
        own_dense = tl.load(dense + sequence * dense_row + position * dense_step, mask=is_counted, other=0.0)
    value = per_token(own_kl, dense if dense is None else own_dense, is_counted, beta, HAS_KL)
    if (position == place) | ((position == 0) & (place < 0)):
        utility = _utility(
            sequence, hidden, hidden_outer, hidden_inner, hidden_column, hidden_length, width,
            head_mask, head_mask_row, head_mask_step, head_index, head_index_stride, segments, segment_stride,
            weight, weight_row, weight_column, bias, bias_stride, scores, score_row, score_column,
            Operand(reference, reference_row, reference_column, reference_number),
            Operand(scale, scale_row, scale_column, scale_number),
            Operand(floor, floor_row, floor_column, floor_number),
            Operand(exponents, exponent_row, exponent_column, exponent_number),
            program, program_length, new_scores, properties, POOL, IGNORE_MISSING, HAS_FLOOR, WEIGHTS, WIDTH, SLOTS,
        )  # fmt: skip
        tl.store(utilities + sequence, utility.to(tl.float32))
        value = tl.where(position == place, value + clamp(utility, clip_low, clip_high), value)
    if length > 0:
        tl.store(rewards + row, tl.where(place == OUTSIDE, float("nan"), value).to(tl.float32))


@triton.jit(
    do_not_specialize=(*_REWARD_NUMBERS, "policy_row", "policy_step", "ref_row", "ref_step"),
    do_not_specialize_on_alignment=(*_REWARD_DATA, "policy", "ref"),
)
def _logprobs_kernel(
    hidden, hidden_outer: tl.int64, hidden_inner: tl.int64, hidden_column: tl.int64, hidden_length: tl.int64, width,
    head_mask, head_mask_row: tl.int64, head_mask_step: tl.int64, head_index, head_index_stride: tl.int64,
    segments, segment_stride: tl.int64,
    weight, weight_row: tl.int64, weight_column: tl.int64, bias, bias_stride: tl.int64,
    scores, score_row: tl.int64, score_column: tl.int64,
    reference, reference_row: tl.int64, reference_column: tl.int64, reference_number: tl.float64,
    scale, scale_row: tl.int64, scale_column: tl.int64, scale_number: tl.float64,
    floor, floor_row: tl.int64, floor_column: tl.int64, floor_number: tl.float64,
    exponents, exponent_row: tl.int64, exponent_column: tl.int64, exponent_number: tl.float64,
    program, program_length, properties,
    place_index, place_stride: tl.int64, dense, dense_row: tl.int64, dense_step: tl.int64,
    beta: tl.float64, clip_low: tl.float64, clip_high: tl.float64, utilities, new_scores, rewards,
    mask, actions, old_logprobs, length: tl.int64,
    policy, policy_row: tl.int64, policy_step: tl.int64, ref, ref_row: tl.int64, ref_step: tl.int64,
    kl, logprobs, ref_logprobs,
    ratio_low: tl.float64, ratio_high: tl.float64, kl_low: tl.float64, kl_high: tl.float64,
    KIND: tl.constexpr, STRAIGHT_THROUGH: tl.constexpr, BLOCK: tl.constexpr,
    POOL: tl.constexpr, IGNORE_MISSING: tl.constexpr, HAS_FLOOR: tl.constexpr, PLACEMENT: tl.constexpr,
    HAS_KL: tl.constexpr, WEIGHTS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Program (sequence, block of positions): the same from log-probabilities."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * BLOCK
    own_mask = mask if mask is None else mask + sequence * length
    own_index = place_index if place_index is None else tl.load(place_index + sequence * place_stride)
    place = placed(own_mask, 1, actions, own_index, length, PLACEMENT)
    # before the tokens, whose registers it would otherwise have to leave alone
    addition = tl.full((), 0.0, tl.float64)
    if ((place >= first) & (place < first + BLOCK)) | ((first == 0) & (place < 0)):
        utility = _utility(
            sequence, hidden, hidden_outer, hidden_inner, hidden_column, hidden_length, width,
            head_mask, head_mask_row, head_mask_step, head_index, head_index_stride, segments, segment_stride,
            weight, weight_row, weight_column, bias, bias_stride, scores, score_row, score_column,
            Operand(reference, reference_row, reference_column, reference_number),
            Operand(scale, scale_row, scale_column, scale_number),
            Operand(floor, floor_row, floor_column, floor_number),
            Operand(exponents, exponent_row, exponent_column, exponent_number),
            program, program_length, new_scores, properties, POOL, IGNORE_MISSING, HAS_FLOOR, WEIGHTS, WIDTH, SLOTS,
        )  # fmt: skip
        tl.store(utilities + sequence, utility.to(tl.float32))
        addition = clamp(utility, clip_low, clip_high)

    position = first + tl.arange(0, BLOCK)
    inside = position < length
    counted = counted_at(own_mask, 1, actions, position, inside)
    x = tl.load(policy + sequence * policy_row + position * policy_step, mask=counted, other=0.0).to(
        tl.float64
    )
    y = tl.load(ref + sequence * ref_row + position * ref_step, mask=counted, other=0.0).to(tl.float64)
    old = x
    if old_logprobs is not None:
        old = tl.load(old_logprobs + sequence * length + position, mask=counted, other=0.0).to(tl.float64)
    token = evaluate_logprobs(
        x, y, old, ratio_low, ratio_high, kl_low, kl_high, KIND, STRAIGHT_THROUGH, old_logprobs is not None
    )
    own_kl = tl.where(counted, token.kl, 0.0).to(tl.float32)
    tl.store(kl + sequence * length + position, own_kl, mask=inside)
    tl.store(logprobs + sequence * length + position, x.to(tl.float32), mask=inside)
    tl.store(ref_logprobs + sequence * length + position, y.to(tl.float32), mask=inside)
    own_dense = own_kl
    if dense is not None:
        own_dense = tl.load(dense + sequence * dense_row + position * dense_step, mask=counted, other=0.0)
    value = per_token(own_kl, dense if dense is None else own_dense, counted, beta, HAS_KL)
    value = tl.where(position == place, value + addition, value)
    value = tl.where(place == OUTSIDE, float("nan"), value)
    tl.store(rewards + sequence * length + position, value.to(tl.float32), mask=inside)


def _new_outputs(*arguments: Any) -> Outputs:
    """Room for the outputs, from the op's arguments; empty where they are given or not asked for."""
    hidden, weight = arguments[:2]
    policy, actions = arguments[15], arguments[17]
    batch, length = policy.shape[:2]

    def new(*shape: int) -> Tensor:
        return policy.new_empty(shape, dtype=torch.float32)

    own_scores = new(0) if hidden is None else new(batch, weight.shape[0])
    if actions is None:
        kl, logprobs, ref_logprobs = (new(batch, length) for _ in range(3))
        return Outputs(new(batch, length), new(batch), own_scores, kl, logprobs, ref_logprobs, new(0), new(0))
    kl, logprobs, ref_logprobs, entropy, saved = new_rows(actions, True)
    return Outputs(new(batch, length), new(batch), own_scores, kl, logprobs, ref_logprobs, entropy, saved)


def _head(
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    segments: Tensor | None,
) -> tuple[Any, ...]:
    """Hidden states, what says which are read, weights and bias as the kernels take them."""
    if hidden is None or weight is None:
        return None, 0, 0, 0, 0, 0, None, 0, 0, None, 0, None, 0, None, 0, 0, None, 0
    rows = rows_of(hidden)
    return (
        *(rows, *rows.stride(), *rows.shape[1:]),
        *(*positions(hidden, mask, index, segments, False), weight, *weight.stride(), *one_stride(bias)),
    )


def _check_ids(policy: Tensor, actions: Tensor | None, mask: Tensor | None, place: Tensor | None) -> None:
    """On a GPU an id outside its range gives NaN instead: no host wait."""
    kept = None if mask is None else mask != 0
    if actions is not None:
        kept = counted(actions, kept)
        check_actions(actions, policy.shape[-1], kept)
    try:
        check_index(place, policy, kept)
    except IndexError as error:
        raise IndexError(f"placement_{error}") from None


@operator(
    "shaped_rewards_forward(Tensor? hidden, Tensor? weight, Tensor? bias, Tensor? attention_mask, Tensor? head_index,"
    " Tensor? cu_seqlens, Tensor? scores, Tensor? reference, float reference_number, Tensor? scale, float scale_number,"
    " Tensor? floor, float floor_number, Tensor? weights, int[]? program, Tensor policy, Tensor ref, Tensor? actions,"
    " Tensor? mask, Tensor? old_logprobs, Tensor? temperatures, float temperature, Tensor? place, Tensor? dense,"
    " bool ignore_missing, int kind, bool straight_through, float ratio_low, float ratio_high, float kl_low,"
    " float kl_high, float beta, int placement, float clip_low, float clip_high)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(_new_outputs(*arguments)),
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    hidden, weight, bias, head_mask, head_index, segments, scores = arguments[:7]
    operands = *(joined(*arguments[i : i + 2]) for i in range(7, 13, 2)), arguments[13]
    program, policy, ref, actions, mask, old = arguments[14:20]
    temperatures, temperature, place, dense_rewards = arguments[20:24]
    ignore_missing, kind, straight_through = arguments[24:27]
    limits, (beta, placement, *clip) = arguments[27:31], arguments[31:]
    out = _new_outputs(*arguments)
    batch, length = out.rewards.shape
    properties = (0 if scores is None else scores.shape[1]) if weight is None else weight.shape[0]
    if hidden is not None:
        check_positions(hidden, head_index, segments)
    own_mask, own_actions = dense(mask), dense(actions)
    formula = None if program is None else program_on(tuple(program), policy.device)
    if policy.is_cpu:
        _check_ids(policy, actions, mask, place)
    common = (
        *_head(hidden, weight, bias, head_mask, head_index, segments), *two_strides(scores),
        *(each for value in operands for each in operand(value, torch.Size((batch, properties)))),
        formula, 0 if formula is None else formula.shape[0], properties,
        *one_stride(place), *two_strides(dense_rewards), beta, *clip,
        out.utility, out.scores, out.rewards, own_mask, own_actions, dense(old), length,
    )  # fmt: skip
    constants = {
        "POOL": pooling(head_mask, head_index, segments, False), "IGNORE_MISSING": ignore_missing,
        "HAS_FLOOR": has_floor(operands[2]), "PLACEMENT": placement, "HAS_KL": beta != 0.0, "WIDTH": WIDTH,
        "WEIGHTS": reward_head.tile(properties)["WEIGHTS"],
        "SLOTS": 1 if formula is None else slots(formula),
    }  # fmt: skip
    if actions is None:
        launch(
            _logprobs_kernel, (batch, max(1, triton.cdiv(length, BLOCK))), policy.device, *common,
            *two_strides(policy), *two_strides(ref), *out[3:6], *limits,
            KIND=kind, STRAIGHT_THROUGH=straight_through, BLOCK=BLOCK, **constants,
        )  # fmt: skip
        return tuple(out)
    assert own_actions is not None
    programs, states, arrivals = token_kl.split(batch * length, policy)
    launch(
        _logits_kernel, (batch * max(1, length), programs), policy.device, *common, *model(policy), *model(ref),
        *temperature_of(temperatures, temperature), states, arrivals, *out[3:], policy.shape[-1], *limits,
        kind, int(straight_through), REVERSE=is_reverse(kind), POLICY_ALIGNED=aligned(policy), REF_ALIGNED=aligned(ref),
        **forward_options(policy, ref), **constants,
    )  # fmt: skip
    return tuple(out)


_ops = torch.ops.lsc_kernels_triton


def forward(
    reward: RewardSide, policy: PolicySide, kl_options: KLOptions, reward_options: RewardOptions
) -> Outputs:
    outputs = Outputs(
        *_ops.shaped_rewards_forward(
            *(reward.hidden, reward.weight, *reward[2:7]),
            *(*split(reward.reference_reward), *split(reward.scale), *split(reward.floor)),
            *(reward.weights, reward.program),
            *(policy.policy, policy.ref, policy.actions, policy.mask, policy.old_logprobs),
            *(*split_temperature(policy.temperature), policy.place, policy.dense, reward.ignore_missing),
            *(*kl_from_logprobs.arguments(kl_options), *token_rewards.arguments(reward_options)),
        )
    )
    return outputs if reward.scores is None else outputs._replace(scores=reward.scores)
