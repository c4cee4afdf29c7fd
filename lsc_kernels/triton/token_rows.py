"""Forward and backward of one token's row in Triton; shared by token_logprobs, token_kl and shaped_rewards.

Forward, per row: read both models' logits once, write 4 floats and the 11 doubles that backward needs. Few rows of a
long vocabulary are read by a program per chunk; the last of a row's programs to come merges what all have left.
Backward, per chunk of a row: combine the upstream gradients into nine coefficients, read each logit once, write each
wanted gradient once; the reference is read only where a gradient needs it. A row that does not count is left before
its logits are read.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from lsc_kernels.triton.kl import FULL, FULL_REVERSE, evaluate_kl, expm1_negative
from lsc_kernels.triton.positions import IGNORE_INDEX
from lsc_kernels.triton.row_state import (
    CHUNK,
    INF,
    INTERPRETED,
    SMALL_LOG_RATIO,
    RowState,
    at,
    centred_difference,
    exp_scaled,
    expm1_remainder,
    limited,
    make_scale,
    merge,
    read_chunk,
    read_chunk_alone,
    scaled,
    summarise,
    two_floats,
)

# What forward saves of a row, in doubles.
SAVED = tl.constexpr(11)
SCALE, INVERSE_S, MEAN_LOGIT, LOGPROB, REF_SCALE, REF_LOG_S, CENTRE, L, OFFSET, DIVERGENCE, LOG_RATIO = (
    tl.constexpr(index) for index in range(11)
)


class Logits(NamedTuple):
    """[outer, inner, V] of one model, or of one of its rows: ``data`` is then a pointer to it."""

    data: tl.tensor
    outer: tl.tensor
    inner: tl.tensor
    step: tl.tensor  # between columns; None where they are neighbours, so that loads can be wide


class Token(NamedTuple):
    """Outputs of one row in fp32."""

    kl: tl.tensor
    logprob: tl.tensor
    ref_logprob: tl.tensor
    entropy: tl.tensor


@triton.jit
def row_pointer(data, outer, inner, outer_stride, inner_stride, ALIGNED: tl.constexpr):
    """ALIGNED: every row begins at a multiple of 16 bytes."""
    pointer = data + outer.to(tl.int64) * outer_stride + inner.to(tl.int64) * inner_stride
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def is_counted(actions, mask, row):
    kept = tl.full((), True, tl.int1)
    if actions is not None:
        kept = tl.load(actions + row) != IGNORE_INDEX
    if mask is not None:
        kept = kept & (tl.load(mask + row) != 0)
    return kept


@triton.jit
def temperature_at(temperatures, row, stride, temperature):
    if temperatures is None:
        return tl.full((), temperature, tl.float64)  # the interpreter has it as a float
    else:
        return tl.load(temperatures + row * stride).to(tl.float64)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """fp32 as DTYPE, to nearest even."""
    if INTERPRETED and DTYPE == tl.bfloat16:  # whose own conversion drops a carry into the exponent
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


# ---------------------------------------------------------------------------------------------- forward


@triton.jit
def read_row_alone(row, step, V, temperature, GROUP: tl.constexpr, LANES: tl.constexpr):
    state = read_chunk_alone(row, step, 0, tl.minimum(V, CHUNK), temperature, GROUP, LANES)
    for begin in range(CHUNK, V, CHUNK):
        end = tl.minimum(begin + CHUNK, V)
        chunk = read_chunk_alone(row, step, begin, end, temperature, GROUP, LANES)
        state = merge(state, chunk, temperature, False, False)
    return state


@triton.jit
def read_part(
    policy, policy_step, ref, ref_step, begin, end, temperature,
    REVERSE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One chunk of a row. The main model is the policy; for the reverse divergence it is the reference."""
    if ref is None:
        return read_chunk_alone(policy, policy_step, begin, end, temperature, GROUP, LANES)
    elif REVERSE:
        return read_chunk(ref, ref_step, policy, policy_step, begin, end, temperature, REVERSE, GROUP, LANES)
    else:
        return read_chunk(policy, policy_step, ref, ref_step, begin, end, temperature, REVERSE, GROUP, LANES)


@triton.jit
def store_state(states, index, state):
    for field in tl.static_range(10):
        tl.store(states + index * 10 + field, state[field])


@triton.jit
def load_field(states, index, FIELD: tl.constexpr):
    """From the second-level cache, which all programs share."""
    return tl.load(states + index * 10 + FIELD, cache_modifier=".cg")


@triton.jit
def load_state(states, index):
    return RowState(
        main_scale=load_field(states, index, 0), S=load_field(states, index, 1), D=load_field(states, index, 2),
        A=load_field(states, index, 3), B=load_field(states, index, 4), other_scale=load_field(states, index, 5),
        other_S=load_field(states, index, 6), H=load_field(states, index, 7), centre=load_field(states, index, 8),
        other_misses=load_field(states, index, 9),
    )  # fmt: skip


@triton.jit
def merged_row(states, row, V, temperature, PAIR: tl.constexpr, REVERSE: tl.constexpr):
    """The chunks of a row, merged in order."""
    chunks = (V + CHUNK - 1) // CHUNK
    first = row.to(tl.int64) * chunks
    state = load_state(states, first)
    for chunk in range(1, chunks):
        state = merge(state, load_state(states, first + chunk), temperature, PAIR, REVERSE)
    return state


@triton.jit
def is_last(arrivals, row):
    """Whether all programs of a row have left their chunk's state, which can then be read. The counter is 0 again."""
    tl.debug_barrier()  # every thread has written
    last = tl.atomic_add(arrivals + row, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        tl.store(arrivals + row, 0)
    return last


@triton.jit
def finish_row(
    state, policy, policy_step, ref, ref_step, action, old_logprob, temperature, V, saved,
    ratio_low, ratio_high, kl_low, kl_high, kind, straight_through,
    REVERSE: tl.constexpr, WEIGHTED: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """From the state of a whole row to its outputs, and to what is saved of it. An action outside [0, V) makes all
    outputs NaN, and the sums by which backward divides: so all gradients too."""
    PAIR: tl.constexpr = ref is not None
    inside = (action >= 0) & (action < V)
    column = tl.where(inside, action, 0)
    x = at(policy, column, policy_step).to(tl.float64)
    x = tl.where(inside, x, float("nan"))
    own_scale, S, H = state.main_scale, state.S, state.H
    log_S = tl.where(S > 0, tl.log(S), float("nan"))
    kl, ref_logprob, d = own_scale * 0, own_scale * 0, own_scale * 0
    if PAIR:
        summary = summarise(state, temperature)
        ref_scale, ref_log_S = state.other_scale, summary.log_other_S
        centre, difference = state.centre, summary.L
        if REVERSE:
            ref_scale, ref_log_S = state.main_scale, summary.log_S
            own_scale, S, log_S = state.other_scale, state.other_S, summary.log_other_S
            centre, difference = -centre, -difference
        if difference != difference:
            # the main model's row is undefined; the other's is not, but came from sums that the two share
            if REVERSE:
                alone = read_row_alone(policy, policy_step, V, temperature, GROUP, LANES)
                own_scale, S, H = alone.main_scale, alone.S, alone.H
                log_S = tl.where(S > 0, tl.log(S), float("nan"))
            else:
                alone = read_row_alone(ref, ref_step, V, temperature, GROUP, LANES)
                ref_scale = alone.main_scale
                ref_log_S = tl.where(alone.S > 0, tl.log(alone.S), float("nan"))
    logprob = (x - own_scale) / temperature - log_S
    entropy = log_S - H / S
    if PAIR:
        y = at(ref, column, ref_step).to(tl.float64)
        y = tl.where(inside, y, float("nan"))
        ref_logprob = (y - ref_scale) / temperature - ref_log_S
        # models that nearly agree are told by their difference, others by their log-probabilities; so is a column
        # that one of them masks with a number before which ref_logprob = logprob - d would be nothing
        d = (x - y - centre) / temperature + difference
        by_difference = summary.near & (tl.abs(d) < 1e6)
        d = tl.where(by_difference, d, logprob - ref_logprob)
        # equal logits agree exactly, -inf included; and one column leaves nothing to differ
        equal = ((x == y) & (tl.abs(x) == INF)) | (V == 1)
        d = tl.where(equal & (difference == difference), 0.0, d)
        divergence = tl.where(V == 1, scaled(summary.kl, 0.0), summary.kl)
        divergence = tl.where(kind < FULL, 0.0, divergence)
        log_weight = d
        if WEIGHTED:
            log_weight = logprob - old_logprob
        value = evaluate_kl(
            d,
            divergence,
            log_weight,
            ratio_low,
            ratio_high,
            kl_low,
            kl_high,
            kind,
            straight_through,
            WEIGHTED,
        )
        kl = tl.where(inside, value.kl, float("nan"))
        ref_logprob = tl.where(by_difference, logprob - d, ref_logprob)
        tl.store(saved + REF_SCALE, ref_scale)
        tl.store(saved + REF_LOG_S, tl.where(inside, ref_log_S, float("nan")))
        tl.store(saved + CENTRE, centre)
        tl.store(saved + L, difference)
        tl.store(saved + OFFSET, difference + divergence if REVERSE else difference - divergence)
        tl.store(saved + DIVERGENCE, divergence)
        tl.store(saved + LOG_RATIO, d)
    tl.store(saved + SCALE, own_scale)
    tl.store(saved + INVERSE_S, tl.where(inside, 1 / S, float("nan")))
    tl.store(saved + MEAN_LOGIT, H / S)
    tl.store(saved + LOGPROB, logprob)
    return Token(
        kl=kl.to(tl.float32),
        logprob=logprob.to(tl.float32),
        ref_logprob=ref_logprob.to(tl.float32),
        entropy=tl.where(inside, entropy, float("nan")).to(tl.float32),
    )


@triton.jit
def no_token(saved):
    """A row that does not count."""
    if saved is not None:
        for field in tl.static_range(SAVED):
            tl.store(saved + field, tl.full((), 0.0, tl.float64))
    zero = tl.full((), 0.0, tl.float32)
    return Token(kl=zero, logprob=zero, ref_logprob=zero, entropy=zero)


# ---------------------------------------------------------------------------------------------- backward


class Coefficients(NamedTuple):
    """The upstream gradients of a row, combined: with p, q the probabilities and delta + L the log ratio of a column,

    d / d x = p (p0 + p_logit (x - m)/T + p_delta delta) + p_minus_q (p - q) + at the action: policy_action
    d / d y = q (q0 + q_delta delta) + q_minus_p (q - p)                     + at the action: ref_action
    """

    p0: tl.tensor
    p_logit: tl.tensor
    p_delta: tl.tensor
    p_minus_q: tl.tensor
    policy_action: tl.tensor
    q0: tl.tensor
    q_delta: tl.tensor
    q_minus_p: tl.tensor
    ref_action: tl.tensor


@triton.jit
def upstream(gradient, row, stride):
    if gradient is None:
        return tl.full((), 0.0, tl.float64)
    else:
        return tl.load(gradient + row * stride).to(tl.float64)


@triton.jit
def chain(gradient, factor):
    """An overflowed slope that nobody asked for is not NaN."""
    return tl.where(gradient == 0, gradient, gradient * factor)


@triton.jit
def coefficients(
    to_kl, to_logprob, to_ref_logprob, to_entropy, old_logprob, temperature, saved,
    ratio_low, ratio_high, kl_low, kl_high, kind, straight_through, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """``kind`` None: there is one model, and no KL."""
    zero = tl.full((), 0.0, tl.float64)
    p0 = chain(to_entropy, tl.load(saved + MEAN_LOGIT))
    to_full, to_reverse, offset = zero, zero, zero
    if kind is not None:
        log_weight = zero
        if WEIGHTED:
            log_weight = tl.load(saved + LOGPROB) - old_logprob
        value = evaluate_kl(
            tl.load(saved + LOG_RATIO), tl.load(saved + DIVERGENCE), log_weight,
            ratio_low, ratio_high, kl_low, kl_high, kind, straight_through, WEIGHTED,
        )  # fmt: skip
        to_logprob += chain(to_kl, value.on_logprob)
        to_ref_logprob -= chain(to_kl, value.on_ratio)
        to_divergence = chain(to_kl, value.on_divergence)
        to_full = tl.where(kind == FULL, to_divergence, 0.0)
        to_reverse = tl.where(kind == FULL_REVERSE, to_divergence, 0.0)
        offset = tl.load(saved + OFFSET)
    return Coefficients(
        p0=(p0 - to_logprob + chain(to_full, offset)) / temperature,
        p_logit=-to_entropy / temperature,
        p_delta=to_full / temperature,
        p_minus_q=to_reverse / temperature,
        policy_action=to_logprob / temperature,
        q0=(-to_ref_logprob - chain(to_reverse, offset)) / temperature,
        q_delta=-to_reverse / temperature,
        q_minus_p=to_full / temperature,
        ref_action=to_ref_logprob / temperature,
    )


@triton.jit
def action_gradients(x, y, c, saved, temperature, READS_REF: tl.constexpr):
    """The action's column, in double: where 1 - p is tiny, -expm1(log p) keeps what is left of it."""
    logit = (x.to(tl.float64) - tl.load(saved + SCALE)) / temperature
    logprob = tl.load(saved + LOGPROB)
    p = tl.exp(logprob)
    to_policy = scaled(c.policy_action, -expm1_negative(-logprob)) + scaled(
        p, c.p0 + c.policy_action + scaled(c.p_logit, logit)
    )
    to_ref = p * 0
    if READS_REF:
        d = tl.load(saved + LOG_RATIO)
        raw = (x.to(tl.float64) - y.to(tl.float64) - tl.load(saved + CENTRE)) / temperature
        delta = tl.where(tl.abs(raw) < INF, raw, 0.0)
        ref_logprob = (y.to(tl.float64) - tl.load(saved + REF_SCALE)) / temperature - tl.load(
            saved + REF_LOG_S
        )
        q = tl.exp(ref_logprob)
        difference = tl.where(tl.abs(d) < SMALL_LOG_RATIO, -p * expm1_negative(d), p - q)
        to_policy += scaled(p, scaled(c.p_delta, delta)) + scaled(difference, c.p_minus_q)
        to_ref = (
            scaled(c.ref_action, -expm1_negative(-ref_logprob))
            + scaled(q, c.q0 + c.ref_action + scaled(c.q_delta, delta))
            - scaled(difference, c.q_minus_p)
        )
    return to_policy.to(tl.float32), to_ref.to(tl.float32)


@triton.jit
def write_gradients(
    policy, policy_step, ref, ref_step, to_policy, to_ref, begin, end, action, c, saved, temperature,
    READS_REF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a row's gradients; ``to_ref`` None where it is not wanted."""
    scale = make_scale(temperature)
    m = tl.load(saved + SCALE).to(tl.float32)
    inverse_S = tl.load(saved + INVERSE_S).to(tl.float32)
    p0, p_logit = c.p0.to(tl.float32), (c.p_logit / temperature).to(tl.float32)
    at_policy, at_ref = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if (action >= begin) & (action < end):
        x = at(policy, action, policy_step)
        y = x
        if READS_REF:
            y = at(ref, action, ref_step)
        at_policy, at_ref = action_gradients(x, y, c, saved, temperature, READS_REF)
    if READS_REF:
        p_delta, p_minus_q = c.p_delta.to(tl.float32), c.p_minus_q.to(tl.float32)
        q0, q_delta, q_minus_p = c.q0.to(tl.float32), c.q_delta.to(tl.float32), c.q_minus_p.to(tl.float32)
        ref_scale = tl.load(saved + REF_SCALE).to(tl.float32)
        inverse_ref_S = tl.exp(-tl.load(saved + REF_LOG_S)).to(tl.float32)
        centre, centre_low = two_floats(tl.load(saved + CENTRE))
        shift = tl.load(saved + L).to(tl.float32)
        # a large L has rounded away what small log ratios differ by
        small_limit = tl.where(tl.abs(shift) < SMALL_LOG_RATIO, SMALL_LOG_RATIO, 0.0)
    for start in range(begin, end, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < end
        x = tl.load(policy + (column if policy_step is None else column.to(tl.int64) * policy_step),
                    mask=inside, other=-INF).to(tl.float32)  # fmt: skip
        u = limited(x - m, scale)
        p = exp_scaled(u, scale) * inverse_S
        gradient = p * tl.fma(p_logit, u, p0)
        if READS_REF:
            y = tl.load(ref + (column if ref_step is None else column.to(tl.int64) * ref_step),
                        mask=inside, other=-INF).to(tl.float32)  # fmt: skip
            ratio = centred_difference(x, y, centre, centre_low) * scale.inverse
            # a column that either model excludes has no finite log ratio, and no weight
            delta = tl.where(tl.abs(ratio) < INF, ratio, 0.0)
            # p - q = -p expm1(-d) = p (d - d^2 P(d)), without the cancellation of nearly equal columns
            d = ratio + shift
            small = tl.abs(d) < small_limit
            q_exact = exp_scaled(limited(y - ref_scale, scale), scale) * inverse_ref_S
            difference = tl.where(small, p * (d - d * d * expm1_remainder(d)), p - q_exact)
            q = tl.where(small, p - difference, q_exact)
            gradient = tl.fma(p_minus_q, difference, tl.fma(p * p_delta, delta, gradient))
            if to_ref is not None:
                ref_gradient = q * tl.fma(q_delta, delta, q0) - q_minus_p * difference
                ref_gradient = tl.where(column == action, at_ref, ref_gradient)
                tl.store(to_ref + column, narrow(ref_gradient, to_ref.dtype.element_ty), mask=inside)
        if to_policy is not None:
            gradient = tl.where(column == action, at_policy, gradient)
            tl.store(to_policy + column, narrow(gradient, to_policy.dtype.element_ty), mask=inside)


@triton.jit
def write_zeros(gradient, begin, end, TILE: tl.constexpr):
    if gradient is not None:
        for start in range(begin, end, TILE):
            column = start + tl.arange(0, TILE)
            zeros = tl.zeros([TILE], gradient.dtype.element_ty)
            tl.store(gradient + column, zeros, mask=column < end)


# ---------------------------------------------------------------------------------------------- kernels

_NUMBERS = ("rows_per_outer", "kind", "straight_through")
_STRIDES = (
    "policy_outer",
    "policy_inner",
    "policy_step",
    "ref_outer",
    "ref_inner",
    "ref_step",
    "temperature_stride",
)
_FORWARD = ("policy", "ref", "actions", "mask", "old_logprobs", "temperatures", "states", "arrivals")
_OUTPUTS = ("kl", "logprobs", "ref_logprobs", "entropy", "saved")


@triton.jit(do_not_specialize=(*_NUMBERS, *_STRIDES), do_not_specialize_on_alignment=(*_FORWARD, *_OUTPUTS))
def forward_kernel(
    policy, policy_outer: tl.int64, policy_inner: tl.int64, policy_step,
    ref, ref_outer: tl.int64, ref_inner: tl.int64, ref_step,
    actions, mask, old_logprobs, temperatures, temperature_stride: tl.int64, temperature: tl.float64,
    states, arrivals, kl, logprobs, ref_logprobs, entropy, saved, rows_per_outer: tl.int64, V,
    ratio_low: tl.float64, ratio_high: tl.float64, kl_low: tl.float64, kl_high: tl.float64, kind, straight_through,
    REVERSE: tl.constexpr, POLICY_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row, or with ``arrivals`` one per chunk, of which the last goes on. ``states``: of a row's
    chunks, where there are several."""
    row = tl.program_id(0)
    own_saved = saved + row.to(tl.int64) * SAVED
    counts = is_counted(actions, mask, row)
    if arrivals is not None:
        own = leaves_row(
            policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
            temperatures, temperature_stride, temperature, states, arrivals, row, counts, rows_per_outer, V,
            REVERSE, POLICY_ALIGNED, REF_ALIGNED, GROUP, LANES,
        )  # fmt: skip
        if own == 0:
            return
    if counts:
        token = forward_row(
            policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
            actions, old_logprobs, temperatures, temperature_stride, temperature, states, own_saved,
            row, rows_per_outer, V, ratio_low, ratio_high, kl_low, kl_high, kind, straight_through,
            REVERSE, arrivals is None, POLICY_ALIGNED, REF_ALIGNED, GROUP, LANES,
        )  # fmt: skip
    else:
        token = no_token(own_saved)
    tl.store(logprobs + row, token.logprob)
    tl.store(entropy + row, token.entropy)
    if ref is not None:
        tl.store(kl + row, token.kl)
        tl.store(ref_logprobs + row, token.ref_logprob)


@triton.jit
def leaves_row(
    policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
    temperatures, temperature_stride, temperature, states, arrivals, row, counts, rows_per_outer, V,
    REVERSE: tl.constexpr, POLICY_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk) leaves the state of its chunk in memory. Whether the row's outputs are this program's to
    write: the last one's, or the first one's where the row does not count."""
    chunk = tl.program_id(1)
    own = chunk == 0
    if counts:
        own_temperature = temperature_at(temperatures, row, temperature_stride, temperature)
        outer, inner = row // rows_per_outer, row % rows_per_outer
        x = row_pointer(policy, outer, inner, policy_outer, policy_inner, POLICY_ALIGNED)
        y = ref if ref is None else row_pointer(ref, outer, inner, ref_outer, ref_inner, REF_ALIGNED)
        begin = chunk * CHUNK
        end = tl.minimum(begin + CHUNK, V)
        state = read_part(x, policy_step, y, ref_step, begin, end, own_temperature, REVERSE, GROUP, LANES)
        store_state(states, row.to(tl.int64) * tl.num_programs(1) + chunk, state)
        own = is_last(arrivals, row)
    return own


@triton.jit
def forward_row(
    policy, policy_outer, policy_inner, policy_step, ref, ref_outer, ref_inner, ref_step,
    actions, old_logprobs, temperatures, temperature_stride, temperature, states, own_saved,
    row, rows_per_outer, V, ratio_low, ratio_high, kl_low, kl_high, kind, straight_through,
    REVERSE: tl.constexpr, READS: tl.constexpr,
    POLICY_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A counted row, from its logits. The states of several chunks go through memory: registers are short. Without
    READS they are there already."""
    own_temperature = temperature_at(temperatures, row, temperature_stride, temperature)
    outer, inner = row // rows_per_outer, row % rows_per_outer
    x = row_pointer(policy, outer, inner, policy_outer, policy_inner, POLICY_ALIGNED)
    y = ref if ref is None else row_pointer(ref, outer, inner, ref_outer, ref_inner, REF_ALIGNED)
    if states is None:
        state = read_part(x, policy_step, y, ref_step, 0, V, own_temperature, REVERSE, GROUP, LANES)
    else:
        if READS:
            first = row.to(tl.int64) * ((V + CHUNK - 1) // CHUNK)
            for begin in range(0, V, CHUNK):
                end = tl.minimum(begin + CHUNK, V)
                chunk = read_part(
                    x, policy_step, y, ref_step, begin, end, own_temperature, REVERSE, GROUP, LANES
                )
                store_state(states, first + begin // CHUNK, chunk)
            tl.debug_barrier()
        state = merged_row(states, row, V, own_temperature, ref is not None, REVERSE)
    old_logprob = state.S
    if old_logprobs is not None:
        old_logprob = tl.load(old_logprobs + row).to(tl.float64)
    return finish_row(
        state, x, policy_step, y, ref_step, tl.load(actions + row), old_logprob, own_temperature, V, own_saved,
        ratio_low, ratio_high, kl_low, kl_high, kind, straight_through,
        REVERSE, old_logprobs is not None, GROUP, LANES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=(*_NUMBERS, *_STRIDES, "kl_stride", "logprobs_stride", "ref_logprobs_stride", "entropy_stride"),
    do_not_specialize_on_alignment=(
        *_FORWARD, "grad_kl", "grad_logprobs", "grad_ref_logprobs", "grad_entropy", "saved",
    ),
)  # fmt: skip
def backward_kernel(
    grad_kl, kl_stride: tl.int64, grad_logprobs, logprobs_stride: tl.int64,
    grad_ref_logprobs, ref_logprobs_stride: tl.int64, grad_entropy, entropy_stride: tl.int64,
    policy, policy_outer: tl.int64, policy_inner: tl.int64, policy_step,
    ref, ref_outer: tl.int64, ref_inner: tl.int64, ref_step,
    actions, mask, old_logprobs, temperatures, temperature_stride: tl.int64, temperature: tl.float64,
    saved, to_policy, to_ref, rows_per_outer: tl.int64, V,
    ratio_low: tl.float64, ratio_high: tl.float64, kl_low: tl.float64, kl_high: tl.float64, kind, straight_through,
    READS_REF: tl.constexpr,
    POLICY_ALIGNED: tl.constexpr, REF_ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (row, chunk) writes its part of each gradient that is wanted."""
    row, begin = tl.program_id(0), tl.program_id(1) * CHUNK
    end = tl.minimum(begin + CHUNK, V)
    first = row.to(tl.int64) * V
    own_policy = to_policy if to_policy is None else to_policy + first
    own_ref = to_ref if to_ref is None else to_ref + first
    if is_counted(actions, mask, row):
        own_temperature = temperature_at(temperatures, row, temperature_stride, temperature)
        own_saved = saved + row.to(tl.int64) * SAVED
        c = coefficients(
            upstream(grad_kl, row, kl_stride), upstream(grad_logprobs, row, logprobs_stride),
            upstream(grad_ref_logprobs, row, ref_logprobs_stride), upstream(grad_entropy, row, entropy_stride),
            upstream(old_logprobs, row, 1), own_temperature, own_saved, ratio_low, ratio_high, kl_low, kl_high,
            kind, straight_through, old_logprobs is not None,
        )  # fmt: skip
        outer, inner = row // rows_per_outer, row % rows_per_outer
        x = row_pointer(policy, outer, inner, policy_outer, policy_inner, POLICY_ALIGNED)
        y = ref if ref is None else row_pointer(ref, outer, inner, ref_outer, ref_inner, REF_ALIGNED)
        write_gradients(
            x, policy_step, y, ref_step, own_policy, own_ref, begin, end, tl.load(actions + row), c, own_saved,
            own_temperature, READS_REF, TILE,
        )  # fmt: skip
    else:
        write_zeros(own_policy, begin, end, TILE)
        write_zeros(own_ref, begin, end, TILE)
