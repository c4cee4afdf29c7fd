"""Pairs of policy and reference logits that a fused kernel can get wrong, and actions for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

import lsc_kernels as lk
from lsc_kernels import triton

KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")
SAMPLED_KINDS = KINDS[:4]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOCABULARIES = (1, 2, 7, 1000, 32001, 151936)

Pair = tuple[Tensor, Tensor]
T = TypeVar("T")


def _near(size: float, std: float = 3.0) -> Callable[[Tensor, Tensor], Pair]:
    return lambda a, b: (std * a, std * a + size * b)


def _shift(policy: float, ref: float, size: float) -> Callable[[Tensor, Tensor], Pair]:
    return lambda a, b: (3 * a + policy, 3 * a + ref + size * b)


def _at_largest(x: Tensor, change: float) -> Tensor:
    change_ = torch.zeros_like(x)
    return change_.scatter_(-1, x.argmax(-1, keepdim=True), change) if x.numel() else change_


def _outlier_at_largest(change: float) -> Callable[[Tensor, Tensor], Pair]:
    """The token that carries the policy has a log ratio unlike all the others'."""
    return lambda a, b: (3 * a, 3 * a + 1e-3 * b + _at_largest(a, change))


def _outlier_elsewhere(a: Tensor, b: Tensor) -> Pair:
    """The reference is sure of a token the policy hardly knows."""
    return 3 * a, 3 * a + 1e-2 * b + _at_largest(b, 60.0)


def _ramp(rise: float) -> Callable[[Tensor, Tensor], Pair]:
    """The largest logit so far changes all along the row."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        slope = torch.linspace(0.0, rise, a.shape[-1])
        return 3 * a + slope, 3 * a + slope + 0.1 * b

    return pair


def _steps(a: Tensor, b: Tensor) -> Pair:
    """Each stretch of 1024 columns has its own height, and in the reference another one."""
    stretch = torch.arange(a.shape[-1]) // 1024
    return 3 * a + 40 * torch.sin(7.0 * stretch), 3 * a + 40 * torch.sin(
        7.0 * stretch + 0.02 * stretch
    ) + 1e-2 * b


def _spreading(shift: float) -> Callable[[Tensor, Tensor], Pair]:
    """Alike at the row's ends, farther and farther apart towards its middle, and a shift between the two models."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        size = 2 * torch.linspace(-1.3, 1.3, a.shape[-1]).cos() ** 4 + 0.02
        return 3 * a, 3 * a + size * b + shift

    return pair


def _shifted_but_for_one(a: Tensor, b: Tensor) -> Pair:
    """One shift between the two models, exact in every column, and one column of little weight that has another."""
    x = (3 * a * 1024).round() / 1024
    seventh = min(7, a.shape[-1])
    one = torch.zeros_like(x)
    one.scatter_(-1, x.topk(seventh).indices[..., -1:] if x.numel() else x.long(), 0.7)
    return x, x - 102 / 1024 - one


def _begins_elsewhere(below: float) -> Callable[[Tensor, Tensor], Pair]:
    """The first stretch has log ratios of its own, and less weight than all others."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        first = torch.arange(a.shape[-1]) < (a.shape[-1] + 1) // 3
        return 3 * a - below * first, 3 * a - below * first + 1e-4 * b + 0.3 * ~first

    return pair


def _first(logits: Tensor, share: float) -> Tensor:
    return torch.arange(logits.shape[-1]) < share * logits.shape[-1]


def _begins_apart(shift: float) -> Callable[[Tensor, Tensor], Pair]:
    """The first quarter, of no weight, has nothing in common; the rest is alike but for a shift."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        first = _first(a, 0.25)
        x = 3 * a - 40 * first
        return x, torch.where(first, x + 3 * b, x + 0.5 * b + shift)

    return pair


def _begins_loosely(a: Tensor, b: Tensor) -> Pair:
    """The first quarter, of little weight, differs much more than the rest."""
    first = _first(a, 0.25)
    x = 3 * a - 5 * first
    return x, x + torch.where(first, 0.77, 0.01) * b


def _climbing(shift: float) -> Callable[[Tensor, Tensor], Pair]:
    """The weight moves on column by column, and soon to where the models differ by another shift."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        x = a + torch.linspace(0, 30, a.shape[-1])
        return x, x + torch.where(_first(a, 0.1), 0.2, 1e-3) * b + shift * ~_first(a, 0.2)

    return pair


def _some_differ(share: float, by: float) -> Callable[[Tensor, Tensor], Pair]:
    """Alike but for every so many columns, which differ by so much either way."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        differs = torch.arange(a.shape[-1]) % int(1 / share) == 2
        return 3 * a, 3 * a + 1e-3 * b + by * b.sign() * differs

    return pair


def _leap(height: float) -> Callable[[Tensor, Tensor], Pair]:
    """One logit far behind the first is above all before it, by what a float's exponent holds or not."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        there = torch.arange(a.shape[-1]) == a.shape[-1] * 3 // 5
        return 3 * a + height * there, 3 * a + 0.05 * b + height * there

    return pair


def _disjoint(a: Tensor, b: Tensor) -> Pair:
    """Policy and reference put their mass where the other has none, by more than 100 nats."""
    first_half = torch.arange(a.shape[-1]) < (a.shape[-1] + 1) // 2
    return 3 * a + 60 * first_half, 3 * b - 60 * first_half


def _masked(policy: bool, ref: bool, mask: float) -> Callable[[Tensor, Tensor], Pair]:
    """A third of the columns masked the way attention is masked, with a large finite number."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        out = torch.arange(a.shape[-1]) % 3 == 2
        x, y = 3 * a, 3 * a + 0.1 * b
        return torch.where(out & policy, mask, x), torch.where(out & ref, mask, y)

    return pair


def _begins_masked(policy: bool, below: float) -> Callable[[Tensor, Tensor], Pair]:
    """One model masks the first half with a large finite number, where the other has e^-below of its mass."""

    def pair(a: Tensor, b: Tensor) -> Pair:
        out = torch.arange(a.shape[-1]) < a.shape[-1] // 2
        x, y = 3 * a, 3 * a + 1e-3 * b
        masked, other = (x, y) if policy else (y, x)
        masked, other = torch.where(out, -1e4, masked), other - below * out
        return (masked, other) if policy else (other, masked)

    return pair


def _sure_of_one(policy: float, ref: float) -> Callable[[Tensor, Tensor], Pair]:
    """Both are sure of the same token, and nearly level on all others."""
    return lambda a, b: (0.02 * a + _at_largest(a, policy), 0.02 * b + _at_largest(a, ref))


def _spike(ref_spike: float) -> Callable[[Tensor, Tensor], Pair]:
    """One token is 1e4 above all others in the policy."""
    return lambda a, b: (3 * a + _at_largest(a, 1e4), 3 * a + 0.1 * b + _at_largest(a, ref_spike))


REGIMES: dict[str, Callable[[Tensor, Tensor], Pair]] = {
    "independent": lambda a, b: (3 * a, 3 * b),
    "near_1": _near(1.0),
    "near_4e-1": _near(0.4),
    "near_1e-1": _near(1e-1),
    "near_1e-2": _near(1e-2),
    "near_1e-3": _near(1e-3),
    "near_1e-4": _near(1e-4),
    "near_1e-5": _near(1e-5),
    "equal": _near(0.0),
    "confident": _near(0.1, std=12.0),
    "confident_near": _near(1e-4, std=12.0),
    "confident_independent": lambda a, b: (12 * a, 12 * b),
    "shift_777": _shift(777.0, 777.0, 1e-2),
    "shift_1e4": _shift(1e4, 1e4, 1e-1),
    "shift_ref_777": _shift(0.0, 777.0, 1e-3),
    "shift_ref_-1e4": _shift(0.0, -1e4, 1e-1),
    "shift_apart_1e4": _shift(-1e4, 1e4, 1e-1),
    "shift_ref_0.4": _shift(0.0, 0.4, 0.1),
    "shifted_but_for_one": _shifted_but_for_one,
    "begins_apart_50": _begins_apart(-50.0),
    "begins_apart_300": _begins_apart(-300.0),
    "begins_loosely": _begins_loosely,
    "climbing_0.4": _climbing(0.4),
    "climbing_-1": _climbing(-1.0),
    "spreading": _spreading(0.0),
    "spreading_shift": _spreading(2.0),
    "outlier_at_largest": _outlier_at_largest(-4.0),
    "outlier_at_largest_small": _outlier_at_largest(0.05),
    "outlier_at_largest_40": _outlier_at_largest(-40.0),
    "outlier_elsewhere": _outlier_elsewhere,
    "begins_elsewhere": _begins_elsewhere(0.0),
    "begins_elsewhere_lower": _begins_elsewhere(7.0),
    "some_differ": _some_differ(0.03, 1.0),
    "few_differ_much": _some_differ(0.004, 2.0),
    "leap_20": _leap(20.0),
    "leap_85": _leap(85.0),
    "ramp_up": _ramp(300.0),
    "ramp_down": _ramp(-300.0),
    "steps": _steps,
    "disjoint": _disjoint,
    "masked_in_both": _masked(True, True, -1e4),
    "masked_in_policy": _masked(True, False, -1e4),
    "masked_in_ref": _masked(False, True, -1e4),
    "begins_masked_in_policy": _begins_masked(True, 12.0),
    "begins_masked_in_ref": _begins_masked(False, 12.0),
    "sure_of_one": _sure_of_one(16.5, 16.5),
    "sure_of_one_100": _sure_of_one(113.0, 16.0),
    "sure_of_one_ref_100": _sure_of_one(16.0, 113.0),
    "spike": _spike(1e4),
    "spike_less_3": _spike(1e4 - 3),
}


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def logit_pair(
    generator: Generator, regime: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Pair:
    """Policy and reference logits [*shape]; fp64 ones hold what fp32 cannot."""
    draw = torch.float64 if dtype is torch.float64 else torch.float32
    policy, ref = REGIMES[regime](
        torch.randn(shape, generator=generator, dtype=draw),
        torch.randn(shape, generator=generator, dtype=draw),
    )
    return policy.to(dtype), ref.to(dtype)


def sampled_actions(generator: Generator, policy: Tensor) -> Tensor:
    """Actions the policy would take; every third is any token instead, and the vocabulary's ends occur."""
    *rows, vocabulary = policy.shape
    p = torch.softmax(policy.double(), -1).reshape(-1, vocabulary)
    likely = torch.multinomial(p, 1, generator=generator).squeeze(-1)
    anything = torch.randint(0, vocabulary, likely.shape, generator=generator)
    actions = torch.where(torch.arange(len(likely)) % 3 == 0, anything, likely)
    for position, action in enumerate((0, vocabulary - 1)):
        if position < len(actions) - 4:
            actions[position] = action
    return actions.reshape(rows)


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which takes some 20 ms for a row."""
    return lk.get_backend() == "triton" and triton.interpreted()


def few(rows: int) -> int:
    """So many rows, but 2 at most for the interpreter."""
    return min(rows, 2) if interpreted() else rows


def some(generator: Generator, cases: Sequence[T]) -> Sequence[T]:
    """All cases, but for the interpreter one of them, another in each test and run."""
    return [cases[int(torch.randint(len(cases), (), generator=generator))]] if interpreted() else cases


def rows_for(vocabulary: int) -> int:
    """As many rows as keep a case quick."""
    return max(2, few(min(48, 100_000 // vocabulary)))
