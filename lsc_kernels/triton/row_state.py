"""The state of one row of two logit vectors in Triton: what csrc/math/row_state.h is in C++, with the same names.

Design constraint: near pi = pi_ref the KL is the small remainder of large cancelling sums. So the state holds sums of
delta = (x - y)/T - c, the log ratio about a centre c, each as exact as its own size, and of expm1(-delta) + delta,
whose terms are never negative. Nothing here may be reassociated or contracted: kernels are compiled with
``enable_fp_fusion=False``, and a fused multiply-add stands only where ``tl.fma`` asks for one.

Who computes what: one program reads a chunk of ``CHUNK`` columns in groups of tiles of LANES. A lane keeps fp32 sums of
its own over a group; a thread adds them up, four lanes at a time, over the chunk; they meet once per chunk, in fp64.
Chunks are merged in order, by one program or in a second kernel, so the bits do not depend on how many programs share a
row.

About what a chunk is summed: the scale m is the largest logit of the first group, the centre c the difference x - y
there. A logit far above m takes its place and brings the sums along; one more than ``FARTHEST_RISE`` nats above begins
new sums, about a centre of its own, which are merged with the old ones. A centre that proves unlike the chunk, so that
A would be the remainder of a cancellation, is replaced by the weighted mean and the chunk, still in the cache, is read
once more.

One exponential instead of two: where |delta| < 0.7, e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls
out of S, A and D. A group is first taken as if that held throughout, with no look at single columns. The largest
delta^2 and the lanes' sums of weights then say, once for all threads, whether it did; a group in which it did not has
not been added. Its tiles, and those after it until a group's worth of them has no large |delta|, are taken one by one,
with the second exponential for the columns that need it, and with what -inf and NaN need.

Two ways to take delta: where c is no larger than the log ratios about it, what x - y rounds away is no larger than what
delta itself does, and ``fma(x - y, 1/T, -c/T)`` is enough. Elsewhere it is taken exactly. Which, is decided with c.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

CHUNK = tl.constexpr(32768)
"""Columns with a state of their own: ``kChunk`` of the CPU kernels."""

# Nats above m from which a logit takes its place, where tiles are taken one by one.
JUMP = tl.constexpr(1.0)
# The same for a group: the bits of 16, of a lane's sum of weights. Up to there x - m rounds no more than a weight does.
LEVEL_BITS = tl.constexpr(0x41800000)
FARTHEST_RISE = tl.constexpr(5.0)
FARTHEST_MEAN = tl.constexpr(16.0)
LARGEST_CENTRE = tl.constexpr(1e30)
SMALL_LOG_RATIO = tl.constexpr(0.7)
# Among bits of numbers that are not negative, NaN's are the largest.
SMALL_BITS = tl.constexpr(0x3F333333)
SMALL_SQUARE_BITS = tl.constexpr(0x3EFAE147)
INF_BITS = tl.constexpr(0x7F800000)
ABOVE = tl.constexpr(0x40000000)  # than half of any of them
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


class RowState(NamedTuple):
    """fp64 scalars. The scales are finite also where S or S' is 0: every logit so far was -inf."""

    main_scale: tl.tensor
    S: tl.tensor
    D: tl.tensor
    A: tl.tensor
    B: tl.tensor
    other_scale: tl.tensor
    other_S: tl.tensor
    H: tl.tensor
    centre: tl.tensor
    other_misses: tl.tensor


class RowSummary(NamedTuple):
    """What a row gives. log p(v) = (x_v - m)/T - log_S for each model, log main(v) - log other(v) = delta_v + L."""

    log_S: tl.tensor
    log_other_S: tl.tensor
    L: tl.tensor
    kl: tl.tensor
    near: tl.tensor


class Scale(NamedTuple):
    """1/T, and log2(e)/T in two floats: e^(u/T) = 2^(u hi + u low); u below ``lowest`` has weight 0."""

    inverse: tl.tensor
    hi: tl.tensor
    low: tl.tensor
    lowest: tl.tensor


# ---------------------------------------------------------------------------------------------- merging


@triton.jit
def scaled(value, factor):
    """0 stays 0, whatever the factor."""
    return tl.where(value == 0, value, value * factor)


@triton.jit
def empty_state():
    zero = tl.full((), 0.0, tl.float64)
    return RowState(
        main_scale=zero, S=zero, D=zero, A=zero, B=zero, other_scale=zero, other_S=zero, H=zero, centre=zero,
        other_misses=zero,
    )  # fmt: skip


@triton.jit
def _common_scale(a, S_a, b, S_b):
    return tl.where(S_a == 0, b, tl.where(S_b == 0, a, tl.maximum(a, b)))


@triton.jit
def _entropy_sum(H, S, shift):
    """sum e^(l - from) (l - from) brought to another scale."""
    # where no weight is left, nor is what H kept of it: another scale may be far below
    return tl.where(S == 0, 0.0, scaled(H + scaled(S, shift), tl.exp(shift)))


@triton.jit
def scale_distance(main_scale, other_scale, centre):
    """m - m' - c, exact also where a model is masked with a number so large that m - m' rounds the other logit away."""
    return centred_difference(main_scale, other_scale, centre, 0.0)


@triton.jit
def _moved(row, main_scale, other_scale, centre, temperature, PAIR: tl.constexpr, REVERSE: tl.constexpr):
    """The same part of a row about other scales and another centre."""
    inverse = 1.0 / temperature
    shift = (row.main_scale - main_scale) * inverse
    factor = tl.exp(shift)
    S = scaled(row.S, factor)
    D, A, B, other_S, H = row.D, row.A, row.B, row.other_S, row.H
    if PAIR:
        other_shift = (row.other_scale - other_scale) * inverse
        other_S = scaled(row.other_S, tl.exp(other_shift))
        g = (centre - row.centre) * inverse
        # e^g A and not A + expm1(g) A, which loses what is left of an A that was e^-g times larger
        power = tl.exp(g)
        e = tl.where(g == 0, g, power - 1)
        D = scaled(row.D, factor)
        A = scaled(scaled(row.A, factor), power) - scaled(D, e) + scaled(S, e - g)
        B = scaled(scaled(row.B, factor), power) + scaled(S, e)
        D -= scaled(S, g)
        # a part without weight beside the other, or with -inf alone: what the other model has there is all of A and B
        distance = scale_distance(main_scale, other_scale, centre)
        of_other = scaled(other_S, tl.exp(-distance * inverse))
        A, B = tl.where(S == 0, of_other, A), tl.where(S == 0, of_other, B)
    if REVERSE:
        H = _entropy_sum(row.H, row.other_S, other_shift)
    else:
        H = _entropy_sum(row.H, row.S, shift)
    return RowState(
        main_scale=main_scale, S=S, D=D, A=A, B=B, other_scale=other_scale, other_S=other_S, H=H, centre=centre,
        other_misses=row.other_misses,
    )  # fmt: skip


@triton.jit
def _common_centre(a, b, main_scale, temperature):
    """The weighted mean of x - y, where A loses least; the heavier part's centre if an outlier drags the mean away."""
    inverse = 1.0 / temperature
    f_a = tl.exp((a.main_scale - main_scale) * inverse)
    f_b = tl.exp((b.main_scale - main_scale) * inverse)
    S_a, S_b = scaled(a.S, f_a), scaled(b.S, f_b)
    heavier = tl.where(S_a >= S_b, a.centre, b.centre)
    drift = temperature * (scaled(a.D, f_a) + scaled(b.D, f_b))
    mean = (S_a * a.centre + S_b * b.centre + drift) / (S_a + S_b)
    return tl.where(tl.abs(mean - heavier) <= temperature * FARTHEST_MEAN, mean, heavier)


@triton.jit
def merge(a, b, temperature, PAIR: tl.constexpr, REVERSE: tl.constexpr):
    """Two parts of a row together. For a fixed cut of a row the result is the same bits every time."""
    main_scale = _common_scale(a.main_scale, a.S, b.main_scale, b.S)
    other_scale, centre = a.other_scale, a.centre
    if PAIR:
        other_scale = _common_scale(a.other_scale, a.other_S, b.other_scale, b.other_S)
        centre = _common_centre(a, b, main_scale, temperature)
    left = _moved(a, main_scale, other_scale, centre, temperature, PAIR, REVERSE)
    right = _moved(b, main_scale, other_scale, centre, temperature, PAIR, REVERSE)
    return RowState(
        main_scale=main_scale,
        S=left.S + right.S,
        D=left.D + right.D,
        A=left.A + right.A,
        B=left.B + right.B,
        other_scale=other_scale,
        other_S=left.other_S + right.other_S,
        H=left.H + right.H,
        centre=centre,
        other_misses=tl.maximum(left.other_misses, right.other_misses),
    )


@triton.jit
def b_minus_log1p(b):
    """b - log1p(b), b > -1, without the cancellation of small b: log1p(b) = 2 atanh(s), s = b / (2 + b)."""
    s = b / (2 + b)
    s2 = s * s
    tail = s2 * (1 / 3 + s2 * (1 / 5 + s2 * (1 / 7 + s2 * (1 / 9 + s2 * (1 / 11 + s2 / 13)))))
    return tl.where(tl.abs(b) < 0.3, s * (b - 2 * tail), b - tl.log(1 + b))


@triton.jit
def summarise(row, temperature):
    """The state of a whole row as its logarithms and its KL."""
    # a row that is all -inf is no distribution
    log_S = tl.where(row.S > 0, tl.log(row.S), float("nan"))
    log_other_S = tl.where(row.other_S > 0, tl.log(row.other_S), float("nan"))
    direct = log_other_S - log_S - scale_distance(row.main_scale, row.other_scale, row.centre) / temperature
    b = row.B / row.S
    rest = b_minus_log1p(b)
    near = (tl.abs(b) < 0.5) & (row.A < 0.5 * row.S) & (tl.abs(b - rest - direct) < 1e-4)
    L = tl.where(near, b - rest, direct)
    kl = tl.where(near, row.A / row.S - rest, row.D / row.S + L)
    # not tl.maximum: what it makes of NaN differs from place to place
    kl = tl.where(row.other_misses > 0, INF, tl.where(kl < 0, 0.0, kl))
    undefined = direct != direct
    return RowSummary(
        log_S=log_S,
        log_other_S=log_other_S,
        L=tl.where(undefined, float("nan"), L),
        kl=tl.where(undefined, float("nan"), kl),
        near=near,
    )


# ---------------------------------------------------------------------------------------------- columns


@triton.jit
def make_scale(temperature):
    exact = 1.4426950408889634 / temperature
    hi = exact.to(tl.float32)
    return Scale(
        inverse=(1.0 / temperature).to(tl.float32),
        hi=hi,
        low=(exact - hi.to(tl.float64)).to(tl.float32),
        lowest=(-140.0 * temperature).to(tl.float32),
    )


@triton.jit
def limited(u, scale):
    """u, kept above where its weight is 0 in any case. NaN stays."""
    return tl.maximum(u, scale.lowest, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def exp_scaled(u, scale):
    """e^(u/T) for a ``limited`` u: the product's rounding goes in behind the exponential."""
    t = u * scale.hi
    rounded = tl.fma(u, scale.low, tl.fma(u, scale.hi, -t))
    power = tl.exp2(t)
    return tl.fma(power, rounded * LN2, power)


@triton.jit
def expm1_remainder(delta):
    """(expm1(-delta) + delta) / delta^2 for |delta| < 0.7: minimax, relative error 2e-7."""
    p = tl.fma(delta, -1.9908432e-04, 1.4071573e-03)
    p = tl.fma(p, delta, -8.333792e-03)
    p = tl.fma(p, delta, 4.1663326e-02)
    p = tl.fma(p, delta, -1.6666658e-01)
    return tl.fma(p, delta, 5.0000012e-01)


@triton.jit
def rounded_away(x, y, difference):
    """What the subtraction x - y rounded away."""
    t = difference - x
    return (x - (difference - t)) - (y + t)


@triton.jit
def two_floats(value):
    hi = value.to(tl.float32)
    return hi, (value - hi.to(tl.float64)).to(tl.float32)


@triton.jit
def centred_difference(x, y, centre, centre_low):
    """(x - y) - c, c in two floats, with one rounding at the end. Neither (x - c) - y nor x - (y + c) is safe."""
    difference = x - y
    return (difference - centre) + (rounded_away(x, y, difference) - centre_low)


# ---------------------------------------------------------------------------------------------- reductions


@triton.jit
def _sum4(a, b, c, d, a2, b2, c2, d2):
    return a + a2, b + b2, c + c2, d + d2


@triton.jit
def _top(x):
    return tl.max(x, 0) if len(x.shape) == 1 else tl.max(tl.max(x, 0), 0)


@triton.jit
def _in_fours(x, LANES: tl.constexpr):
    return tl.reshape(x, [LANES // 4, 4])


@triton.jit
def _by_four(x, LANES: tl.constexpr):
    """Sums of neighbouring lanes, which are one thread's."""
    return tl.sum(_in_fours(x, LANES), 1)


@triton.jit
def lane_totals(a, b, c, d):
    """Four sums over all lanes, in fp64, in one meeting of the threads."""
    if INTERPRETED:
        return (
            tl.sum(a.to(tl.float64), 0),
            tl.sum(b.to(tl.float64), 0),
            tl.sum(c.to(tl.float64), 0),
            tl.sum(d.to(tl.float64), 0),
        )
    else:
        return tl.reduce((a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)), 0, _sum4)


# ---------------------------------------------------------------------------------------------- chunks


@triton.jit
def _load(pointer, column, step, inside):
    offset = column if step is None else column.to(tl.int64) * step
    return tl.load(pointer + offset, mask=inside, other=-INF)


@triton.jit
def _load_tile(pointer, column, step, there):
    """A whole tile, if ``there`` is one."""
    return tl.load(pointer + (column if step is None else column.to(tl.int64) * step), mask=there)


@triton.jit
def _lanes_state(
    S, D, A, H, W, WD, V, VH, main_scale, other_scale, centre, misses, temperature, REVERSE: tl.constexpr
):
    """From the sums about one origin: S, D, A, H of small |delta|, W ... VH of the other columns."""
    s, d, a, h = lane_totals(S, D, A, H)
    main_scale, other_scale = main_scale.to(tl.float64), other_scale.to(tl.float64)
    # brings the lanes' sums, which are about m and c, to the other model's scale
    inverse = 1.0 / temperature
    distance = scale_distance(main_scale, other_scale, centre)
    to_other = tl.exp(distance * inverse)
    large = scaled(V, tl.exp(-distance * inverse)) - W
    other_small = s + a - d
    if REVERSE:
        h = scaled(h + scaled(other_small, distance), to_other) + VH
    else:
        h += VH
    return RowState(
        main_scale=main_scale,
        S=s + W,
        D=d + WD,
        A=a + (large + WD),
        B=(a - d) + large,
        other_scale=other_scale,
        other_S=scaled(other_small, to_other) + V,
        H=h * inverse,
        centre=centre,
        other_misses=misses.to(tl.float64),
    )


@triton.jit
def _about_mean(row, temperature):
    """The same row about the mean of x - y, unless an outlier drags that away."""
    mean = row.D / row.S
    centre = row.centre + temperature * tl.where(tl.abs(mean) <= FARTHEST_MEAN, mean, 0.0)
    g = (centre - row.centre) / temperature  # of what the sum was rounded to
    power = tl.exp(g)
    e = tl.where(g == 0, g, power - 1)
    return RowState(
        main_scale=row.main_scale,
        S=row.S,
        D=row.D - scaled(row.S, g),
        A=scaled(row.A, power) - scaled(row.D, e) + scaled(row.S, e - g),
        B=scaled(row.B, power) + scaled(row.S, e),
        other_scale=row.other_scale,
        other_S=row.other_S,
        H=row.H,
        centre=centre,
        other_misses=row.other_misses,
    )


@triton.jit
def _off_centre(row):
    """Whether A is mostly the distance of the centre from the mean, so that the KL is a small remainder of it."""
    inverse = 1.0 / row.S
    b, mean, a = row.B * inverse, row.D * inverse, row.A * inverse
    rest = b_minus_log1p(b)
    return (16 * (a - rest) < a) & (tl.abs(mean) > 0.25 * tl.abs(b - rest)) & (tl.abs(mean) < INF)


@triton.jit
def _add_small(u, w, delta, S, D, A, H, temperature, REVERSE: tl.constexpr):
    """Columns of small |delta|, lane by lane; to H too if REVERSE."""
    square = w * (delta * delta)
    P = expm1_remainder(delta)
    if REVERSE:  # about m - c instead of m', so that the lanes know of one origin only
        of_other = tl.fma(square, P, tl.fma(-w, delta, w))
        H = tl.fma(of_other, tl.fma(delta, -temperature, u), H)
    return S + w, tl.fma(w, delta, D), tl.fma(square, P, A), H


@triton.jit
def _add_groups(
    main, main_step, other, other_step, start, end, m, c, c_low, scale, temperature, S, D, A, H,
    REVERSE: tl.constexpr, EXACT: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Whole groups of tiles from ``start`` on. Ends before one that is not whole, or not usual: 1 if some logit is far
    above m, 2 if some |delta| is not small (NaN is not)."""
    SPAN: tl.constexpr = GROUP * LANES
    lane = tl.arange(0, LANES)
    xs: tl.tuple = ()
    ys: tl.tuple = ()
    for tile in tl.static_range(GROUP):
        column = start + tile * LANES + lane
        xs += (_load_tile(main, column, main_step, True),)
        ys += (_load_tile(other, column, other_step, True),)
    unusual = tl.full((), 0, tl.int32)
    while (start + SPAN <= end) & (unusual == 0):
        more = start + 2 * SPAN <= end
        next_xs: tl.tuple = ()
        next_ys: tl.tuple = ()
        zeros = tl.zeros([LANES], tl.float32)
        s, d, a, h = zeros, zeros, zeros, zeros
        farthest = zeros.to(tl.uint32, bitcast=True)
        for tile in tl.static_range(GROUP):
            x, y = xs[tile].to(tl.float32), ys[tile].to(tl.float32)
            column = start + SPAN + tile * LANES + lane
            next_xs += (_load_tile(main, column, main_step, more),)
            next_ys += (_load_tile(other, column, other_step, more),)
            u = x - m
            w = tl.exp2(u * scale.hi)
            if EXACT:
                delta = centred_difference(x, y, c, c_low) * scale.inverse
            else:
                delta = tl.fma(x - y, scale.inverse, -c)
            farthest = tl.maximum(farthest, (delta * delta).to(tl.uint32, bitcast=True))
            if REVERSE == 0:
                h = tl.fma(w, u, h)
            s, d, a, h = _add_small(u, w, delta, s, d, a, h, temperature, REVERSE)
        level = tl.max(_in_fours(s.to(tl.uint32, bitcast=True), LANES), 1)
        far = tl.max(_in_fours(farthest, LANES), 1)
        # the only meeting of the threads
        unusual = _top(tl.where(far >= SMALL_SQUARE_BITS, 2, tl.where(level > LEVEL_BITS, 1, 0)))
        # no branch: the sums would be left for it, and their terms kept
        usual = unusual == 0
        S += tl.where(usual, _by_four(s, LANES), 0.0)
        D += tl.where(usual, _by_four(d, LANES), 0.0)
        A += tl.where(usual, _by_four(a, LANES), 0.0)
        H += tl.where(usual, _by_four(h, LANES), 0.0)
        start = tl.where(usual, start + SPAN, start)
        xs, ys = next_xs, next_ys
    return start, unusual, S, D, A, H


@triton.jit
def read_chunk(
    main, main_step, other, other_step, begin, end, temperature,
    REVERSE: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of one row of two models; REVERSE: the policy is the other one, the entropy is its."""
    SPAN: tl.constexpr = GROUP * LANES
    scale = make_scale(temperature)
    float_temperature = temperature.to(tl.float32)
    jump = (temperature * JUMP).to(tl.float32)
    lane = tl.arange(0, LANES)
    group = tl.arange(0, GROUP)[:, None] * LANES + lane[None, :]
    zeros = tl.zeros([LANES // 4], tl.float32)
    none = tl.full((), 0.0, tl.float64)
    true, false = tl.full((), True, tl.int1), tl.full((), False, tl.int1)
    row, centre = empty_state(), none
    centred = false  # the centre is the chunk's mean
    again = true
    while again:
        row, parked = empty_state(), false
        S, D, A, H = zeros, zeros, zeros, zeros
        W, WD, V, VH = none, none, none, none
        misses = false
        m, other_m = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        limit, other_limit = tl.full((), -INF, tl.float32), tl.full((), -INF, tl.float32)
        pending, leaves, off_centre = false, false, false
        rises, careful, exact = true, false, true
        start = begin
        while (start < end) | pending:
            if leaves | (start >= end):  # apart from the work on columns: this needs the registers
                part = _lanes_state(
                    S, D, A, H, W, WD, V, VH, m, other_m, centre, misses, temperature, REVERSE
                )
                off_centre |= _off_centre(part)
                if parked:
                    row = merge(row, part, temperature, True, REVERSE)
                else:
                    row = _about_mean(part, temperature)
                parked = true
                S, D, A, H = zeros, zeros, zeros, zeros
                W, WD, V, VH = none, none, none, none
                misses = false
                limit = tl.full((), -INF, tl.float32)
                pending, leaves, rises = false, false, true
            elif rises:  # an origin, or a higher one, from the group that begins here
                rises = false
                column = start + group
                inside = column < end
                x = _load(main, column, main_step, inside).to(tl.float32)
                top = _top(x)
                other_top = _top(_load(other, column, other_step, inside).to(tl.float32))
                if other_top > other_limit:
                    shift = other_m.to(tl.float64) - other_top.to(tl.float64)
                    factor = tl.exp(shift * (1.0 / temperature))
                    if REVERSE:
                        VH = scaled(VH + scaled(V, shift), factor)
                    V = scaled(V, factor)
                    other_m = other_top
                    other_limit = other_top + jump
                seen = limit > -INF
                if (top > m) | ((top > -INF) & (seen == 0)):
                    if pending & seen & (top - m <= float_temperature * FARTHEST_RISE):
                        shift = m - top
                        factor = exp_scaled(shift, scale)
                        wide_factor = factor.to(tl.float64)
                        if REVERSE:
                            H = (H + (S + A - D) * shift) * factor
                        else:
                            H = (H + S * shift) * factor
                            VH = (VH + W * shift.to(tl.float64)) * wide_factor
                        S, D, A = S * factor, D * factor, A * factor
                        W, WD = W * wide_factor, WD * wide_factor
                        m = top
                        limit = top + jump
                    elif pending:
                        leaves = true
                    else:
                        m = top
                        limit = top + jump
                        if centred == 0:
                            at_top = tl.min(tl.min(tl.where(x == top, column, end), 0), 0)
                            x_top, y_top = at(main, at_top, main_step), at(other, at_top, other_step)
                            difference = x_top.to(tl.float64) - y_top.to(tl.float64)
                            # of a model that is -inf so far: a centre about which no column is small
                            between = top.to(tl.float64) - other_m.to(tl.float64)
                            between = tl.where(other_limit > -INF, between, -LARGEST_CENTRE)
                            centre = tl.where(tl.abs(difference) < LARGEST_CENTRE, difference, between)
                        c = (centre / temperature).to(tl.float32)
                        exact, careful = _look_about(
                            c, main, main_step, other, other_step, start, end, scale, LANES
                        )
                        # what the columns are taken about, to the last digit
                        hi, low = two_floats(centre)
                        if exact:
                            centre = hi.to(tl.float64) + low.to(tl.float64)
                        else:
                            centre = c.to(tl.float64) / scale.inverse.to(tl.float64)
            elif (start + SPAN <= end) & (careful == 0):
                first = start
                if exact:
                    c, c_low = two_floats(centre)
                    start, unusual, S, D, A, H = _add_groups(
                        main, main_step, other, other_step, start, end, m, c, c_low, scale, float_temperature,
                        S, D, A, H, REVERSE, True, GROUP, LANES,
                    )  # fmt: skip
                else:
                    c = (centre * scale.inverse.to(tl.float64)).to(tl.float32)
                    start, unusual, S, D, A, H = _add_groups(
                        main, main_step, other, other_step, start, end, m, c, c, scale, float_temperature,
                        S, D, A, H, REVERSE, False, GROUP, LANES,
                    )  # fmt: skip
                pending |= start > first
                rises = unusual == 1
                careful = unusual == 2
            else:
                # tile by tile: some |delta| are large, or what is left is no group
                c, c_low = two_floats(centre)
                plain_c = (centre * scale.inverse.to(tl.float64)).to(tl.float32)
                nothing = tl.zeros([LANES], tl.float32)
                s, d, a, h = nothing, nothing, nothing, nothing
                large, large_d, of_other, other_h = nothing, nothing, nothing, nothing
                column = start + lane
                inside = column < end
                raw_x, raw_y = (
                    _load(main, column, main_step, inside),
                    _load(other, column, other_step, inside),
                )
                calm = tl.full((), 0, tl.int32)  # tiles since the last large |delta|
                while (start < end) & (rises == 0) & ((calm < GROUP) | (start + SPAN > end)):
                    # on its way while this tile is added up
                    column = start + LANES + lane
                    inside = column < end
                    next_x, next_y = (
                        _load(main, column, main_step, inside),
                        _load(other, column, other_step, inside),
                    )
                    x, y = raw_x.to(tl.float32), raw_y.to(tl.float32)
                    if exact:
                        delta = centred_difference(x, y, c, c_low) * scale.inverse
                    else:
                        delta = tl.fma(x - y, scale.inverse, -plain_c)
                    half_bits = (delta.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 1
                    farthest = _top(tl.where((x > limit) | (y > other_limit), ABOVE, half_bits))
                    rises = farthest == ABOVE
                    if rises == 0:  # else this tile comes again
                        calm = tl.where(farthest > (SMALL_BITS >> 1), 0, calm + 1)
                        u = limited(x - m, scale)
                        w = tl.exp2(u * scale.hi)
                        small = tl.abs(delta) < SMALL_LOG_RATIO
                        from_other = limited(y - other_m, scale)
                        v = tl.where(small, 0.0, tl.exp2(from_other * scale.hi))
                        w_large = tl.where(small, 0.0, w)
                        if farthest >= (INF_BITS >> 1):
                            excluded = ((y == -INF) & (x > -INF)) | ((delta == INF) & (w > 0))
                            misses |= _top(tl.where(excluded, 1, 0)) > 0
                            large_d = tl.fma(w_large, tl.where(tl.abs(delta) < INF, delta, 0.0), large_d)
                        else:
                            large_d = tl.fma(w_large, delta, large_d)
                        large += w_large
                        of_other += v
                        if REVERSE:
                            other_h = tl.fma(v, from_other, other_h)
                        else:
                            h = tl.fma(w, u, h)
                        w_small, delta_small = tl.where(small, w, 0.0), tl.where(small, delta, 0.0)
                        s, d, a, h = _add_small(
                            u, w_small, delta_small, s, d, a, h, float_temperature, REVERSE
                        )
                        start += LANES
                        raw_x, raw_y = next_x, next_y
                        pending = true
                S += _by_four(s, LANES)
                D += _by_four(d, LANES)
                A += _by_four(a, LANES)
                H += _by_four(h, LANES)
                more_W, more_WD, more_V, more_VH = lane_totals(
                    _by_four(large, LANES),
                    _by_four(large_d, LANES),
                    _by_four(of_other, LANES),
                    _by_four(other_h, LANES),
                )
                W += more_W
                WD += more_WD
                V += more_V
                VH += more_VH
                careful = calm < GROUP
        again = off_centre & (centred == 0)
        centre = row.centre
        centred = again
    return row


@triton.jit
def at(row, column, step):
    """One logit, in fp32, which holds it exactly."""
    return tl.load(row + (column if step is None else column.to(tl.int64) * step)).to(tl.float32)


@triton.jit
def _look_about(c, main, main_step, other, other_step, start, end, scale, LANES: tl.constexpr):
    """Of a tile: whether the centre c/T is larger than the small log ratios about it; whether there are others."""
    column = start + tl.arange(0, LANES)
    inside = column < end
    x = _load(main, column, main_step, inside).to(tl.float32)
    y = _load(other, column, other_step, inside).to(tl.float32)
    size = tl.abs(tl.fma(x - y, scale.inverse, -c))
    small = size < SMALL_LOG_RATIO
    total, count = tl.sum(tl.where(small, size, 0.0), 0), tl.sum(tl.where(small, 1, 0), 0)
    # bf16 and fp16 hardly ever have differences that fp32 rounds
    narrow: tl.constexpr = (
        main.dtype.element_ty.primitive_bitwidth + other.dtype.element_ty.primitive_bitwidth == 32
    )
    within = tl.abs(c) * tl.maximum(count, 1).to(tl.float32) <= total * (64.0 if narrow else 1.0)
    return within == 0, count < tl.minimum(LANES, end - start)


@triton.jit
def read_chunk_alone(logits, step, begin, end, temperature, GROUP: tl.constexpr, LANES: tl.constexpr):
    """Columns [begin, end) of one model alone: a state with S and H."""
    SPAN: tl.constexpr = GROUP * LANES
    scale = make_scale(temperature)
    lane = tl.arange(0, LANES)
    group = tl.arange(0, GROUP)[:, None] * LANES + lane[None, :]
    S = tl.zeros([LANES // 4], tl.float32)
    H = S
    m = tl.full((), 0.0, tl.float32)
    seen, usual = tl.full((), False, tl.int1), tl.full((), False, tl.int1)
    start = begin
    while start < end:
        if usual & (start + SPAN <= end):
            xs: tl.tuple = ()
            for tile in tl.static_range(GROUP):
                xs += (_load_tile(logits, start + tile * LANES + lane, step, True),)
            while (start + SPAN <= end) & usual:
                more = start + 2 * SPAN <= end
                next_xs: tl.tuple = ()
                s, h = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
                for tile in tl.static_range(GROUP):
                    u = limited(xs[tile].to(tl.float32) - m, scale)
                    next_xs += (_load_tile(logits, start + SPAN + tile * LANES + lane, step, more),)
                    w = tl.exp2(u * scale.hi)
                    s += w
                    h = tl.fma(w, u, h)
                level = tl.max(_in_fours(s.to(tl.uint32, bitcast=True), LANES), 1)
                usual = _top(level) <= LEVEL_BITS
                S += tl.where(usual, _by_four(s, LANES), 0.0)
                H += tl.where(usual, _by_four(h, LANES), 0.0)
                start = tl.where(usual, start + SPAN, start)
                xs = next_xs
        else:  # the first, one with a logit far above m, or what is left
            column = start + group
            x = _load(logits, column, step, column < end).to(tl.float32)
            top = _top(x)
            if (top > m) | ((top > -INF) & (seen == 0)):
                shift = limited(m - top, scale)
                factor = tl.where(seen, exp_scaled(shift, scale), 0.0)
                H = (H + S * shift) * factor
                S = S * factor
                m = top
                seen = top > -INF
            u = limited(x - m, scale)
            w = tl.exp2(u * scale.hi)
            S += _by_four(tl.sum(w, 0), LANES)
            H += _by_four(tl.sum(w * u, 0), LANES)
            usual = seen
            start += SPAN
    s, h, _, _ = lane_totals(S, H, H, H)
    row = empty_state()
    return RowState(
        main_scale=m.to(tl.float64), S=s, D=row.D, A=row.A, B=row.B, other_scale=row.other_scale, other_S=row.other_S,
        H=h / temperature, centre=row.centre, other_misses=row.other_misses,
    )  # fmt: skip
