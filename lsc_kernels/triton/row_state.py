"""The state of one row of two logit vectors in Triton: what csrc/math/row_state.h is in C++, with the same names.

Design constraint: near pi = pi_ref the KL is the small remainder of large cancelling sums. So the state holds sums of
delta = (x - y)/T - c, the log ratio about a centre c, each taken from an exact difference, and of
expm1(-delta) + delta, whose terms are never negative. Nothing here may be reassociated or contracted: kernels are
compiled with ``enable_fp_fusion=False``, and a fused multiply-add stands only where ``tl.fma`` asks for one.

Who computes what: one program reads a chunk of ``CHUNK`` columns in tiles of [ROWS, LANES]. A thread keeps sums of its
own lanes in fp32, over the 16 tiles of a chunk; they meet once per chunk, in fp64. Chunks are merged in order, by
one program or in a second kernel, so the bits do not depend on how many programs share a row.

About what a chunk is summed: the scale m is a logit within ``JUMP`` nats of the largest so far, the centre c the
difference x - y at the largest logit of the first tile. A logit that rises above m by more than that begins new sums,
which are merged with the old ones. A centre that proves unlike the chunk, so that A would be the remainder of a
cancellation, is replaced by the weighted mean and the chunk, still in the cache, is read once more.

One exponential instead of two: where |delta| < 0.7, e^(y-m') = e^(m-m'-c) w e^(-delta), so the other model's sum falls
out of S, A and D. Tiles that hold a larger |delta| compute the second exponential for those columns.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

CHUNK = tl.constexpr(32768)
"""Columns with a state of their own: ``kChunk`` of the CPU kernels."""

JUMP = tl.constexpr(2.0)
FARTHEST_MEAN = tl.constexpr(16.0)
LARGEST_CENTRE = tl.constexpr(1e30)
SMALL_LOG_RATIO = tl.constexpr(0.7)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))


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
    return scaled(H + scaled(S, shift), tl.exp(shift))


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
    log_S = tl.where(row.S > 0, tl.log(row.S), NAN)
    log_other_S = tl.where(row.other_S > 0, tl.log(row.other_S), NAN)
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
        L=tl.where(undefined, NAN, L),
        kl=tl.where(undefined, NAN, kl),
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
    return tl.where(u < scale.lowest, scale.lowest, u)


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
def tile_flags(x, y, delta, limit, other_limit):
    """2 if a logit is above its limit, else 1 if some |delta| is not small (NaN is not): one meeting of the threads."""
    outside = tl.where(tl.abs(delta) < SMALL_LOG_RATIO, 0, 1)
    return _top(tl.where((x > limit) | (y > other_limit), 2, outside))


@triton.jit
def _top(x):
    return tl.max(tl.max(x, 0), 0)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 0).to(tl.float64), 0)


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
def _lanes_state(
    S, D, A, H, W, WD, V, VH, main_scale, other_scale, centre, misses, temperature, REVERSE: tl.constexpr
):
    """From the sums about one origin: S, D, A, H by lane of small |delta| (H of all); W ... VH of the other columns."""
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
def _difference_at(here, difference, e, otherwise):
    """x - y at the columns where ``here``. ``otherwise`` where a model excludes them, or masks them with a number about
    which others' differences would be infinite."""
    high = _top(tl.where(here, difference, -INF))
    low = _top(tl.where(here & (difference == high), e, -INF))
    return tl.where(tl.abs(high) < LARGEST_CENTRE, high.to(tl.float64) + low.to(tl.float64), otherwise)


@triton.jit
def _off_centre(row):
    """Whether A is mostly the distance of the centre from the mean, so that the KL is a small remainder of it."""
    inverse = 1.0 / row.S
    b, mean, a = row.B * inverse, row.D * inverse, row.A * inverse
    rest = b_minus_log1p(b)
    return (16 * (a - rest) < a) & (tl.abs(mean) > 0.25 * tl.abs(b - rest)) & (tl.abs(mean) < INF)


@triton.jit
def read_chunk(
    main, main_step, other, other_step, begin, end, temperature,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of one row of two models; REVERSE: the policy is the other one, the entropy is its."""
    scale = make_scale(temperature)
    jump = (temperature * JUMP).to(tl.float32)
    column_in_tile = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    lanes = tl.zeros([LANES], tl.float32)
    none = tl.full((), 0.0, tl.float64)
    row, centre = empty_state(), none
    centred = tl.full((), False, tl.int1)  # the centre is the chunk's mean
    again = tl.full((), True, tl.int1)
    while again:
        row = empty_state()
        S, D, A, H = lanes, lanes, lanes, lanes
        W, WD, V, VH = none, none, none, none
        misses = tl.full((), False, tl.int1)
        m, other_m = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
        limit, other_limit = tl.full((), -INF, tl.float32), tl.full((), -INF, tl.float32)
        pending, rise = tl.full((), False, tl.int1), tl.full((), False, tl.int1)
        off_centre = tl.full((), False, tl.int1)
        start = begin
        column = start + column_in_tile
        raw_x, raw_y = (
            _load(main, column, main_step, column < end),
            _load(other, column, other_step, column < end),
        )
        while (start < end) | pending:
            if rise | (start >= end):  # apart from the work on a tile: this needs the registers
                part = _lanes_state(
                    S, D, A, H, W, WD, V, VH, m, other_m, centre, misses, temperature, REVERSE
                )
                off_centre |= _off_centre(part)
                row = merge(row, part, temperature, True, REVERSE)
                S, D, A, H = lanes, lanes, lanes, lanes
                W, WD, V, VH = none, none, none, none
                misses = tl.full((), False, tl.int1)
                limit = tl.full((), -INF, tl.float32)
                pending, rise = tl.full((), False, tl.int1), tl.full((), False, tl.int1)
            else:
                # on its way while this tile is added up
                column = start + ROWS * LANES + column_in_tile
                inside = column < end
                next_x, next_y = (
                    _load(main, column, main_step, inside),
                    _load(other, column, other_step, inside),
                )
                x, y = raw_x.to(tl.float32), raw_y.to(tl.float32)
                difference = x - y
                e = rounded_away(x, y, difference)
                c, c_low = two_floats(centre)
                delta = ((difference - c) + (e - c_low)) * scale.inverse
                flags = tile_flags(x, y, delta, limit, other_limit)
                if flags >= 2:  # this tile comes again, about another origin
                    top, other_top = _top(x), _top(y)
                    if other_top > other_limit:
                        shift = other_m.to(tl.float64) - other_top.to(tl.float64)
                        factor = tl.exp(shift * (1.0 / temperature))
                        VH = scaled(VH + scaled(V, shift), factor)
                        V = scaled(V, factor)
                        other_m = other_top
                        other_limit = other_top + jump
                    if top > limit:
                        rise = pending
                        if pending == 0:
                            m = top
                            limit = top + jump
                            if centred == 0:
                                # of a model that is -inf so far: a centre about which no column is small
                                between = top.to(tl.float64) - other_m.to(tl.float64)
                                between = tl.where(other_limit > -INF, between, -LARGEST_CENTRE)
                                centre = _difference_at(x == top, difference, e, between)
                else:
                    u = limited(x - m, scale)
                    w = exp_scaled(u, scale)
                    if REVERSE == 0:
                        H += tl.sum(w * u, 0)
                    if flags > 0:
                        small = tl.abs(delta) < SMALL_LOG_RATIO
                        from_other = limited(y - other_m, scale)
                        v = tl.where(small, 0.0, exp_scaled(from_other, scale))
                        w_large = tl.where(small, 0.0, w)
                        W += _total(w_large)
                        WD += _total(w_large * tl.where(tl.abs(delta) < INF, delta, 0.0))
                        V += _total(v)
                        if REVERSE:
                            VH += _total(v * from_other)
                        excluded = ((y == -INF) & (x > -INF)) | ((delta == INF) & (w > 0))
                        misses |= _top(tl.where(excluded, 1, 0)) > 0
                        w = tl.where(small, w, 0.0)
                        delta = tl.where(small, delta, 0.0)
                    wd = w * delta
                    excess = (wd * delta) * expm1_remainder(delta)
                    S += tl.sum(w, 0)
                    D += tl.sum(wd, 0)
                    A += tl.sum(excess, 0)
                    if REVERSE:  # about m - c instead of m', so that the lanes know of one origin only
                        from_m = u - delta * temperature.to(tl.float32)
                        H += tl.sum(((w - wd) + excess) * from_m, 0)
                    pending = tl.full((), True, tl.int1)
                    start += ROWS * LANES
                    raw_x, raw_y = next_x, next_y
        again = off_centre & (centred == 0)
        centre = row.centre
        centred = again
    return row


@triton.jit
def read_chunk_alone(logits, step, begin, end, temperature, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Columns [begin, end) of one model alone: a state with S and H."""
    scale = make_scale(temperature)
    jump = (temperature * JUMP).to(tl.float32)
    column_in_tile = tl.arange(0, ROWS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    S = tl.zeros([LANES], tl.float32)
    H = tl.zeros([LANES], tl.float32)
    m = tl.full((), 0.0, tl.float32)
    seen = tl.full((), False, tl.int1)
    column = begin + column_in_tile
    raw = _load(logits, column, step, column < end)
    for start in range(begin, end, ROWS * LANES):
        x = raw.to(tl.float32)
        # on its way while this tile is added up
        column = start + ROWS * LANES + column_in_tile
        raw = _load(logits, column, step, column < end)
        top = _top(x)
        if (seen == 0) | (top > m + jump):
            if top > -INF:
                shift = limited(m - top, scale)
                factor = tl.where(seen, exp_scaled(shift, scale), 0.0)
                H = (H + S * shift) * factor
                S = S * factor
                m = top
                seen = top > -INF
        u = limited(x - m, scale)
        w = exp_scaled(u, scale)
        S += tl.sum(w, 0)
        H += tl.sum(w * u, 0)
    s, h, _, _ = lane_totals(S, H, H, H)
    row = empty_state()
    return RowState(
        main_scale=m.to(tl.float64), S=s, D=row.D, A=row.A, B=row.B, other_scale=row.other_scale, other_S=row.other_S,
        H=h / temperature, centre=row.centre, other_misses=row.other_misses,
    )  # fmt: skip
