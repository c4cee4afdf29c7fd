"""Generalised advantage estimation: the definition.

With n the next counted position after t, c = gamma lam and k = gamma (1 - lam), at each counted t

    delta_t = r_t + gamma V_n - V_t        A_t = delta_t + c A_n        R_t = A_t + V_t

of which the return is the simpler recursion, and what is computed here:

    R_t = r_t + k V_n + c R_n              A_t = R_t - V_t

After the last counted position both V_n and R_n are the bootstrap. Backward, with p the counted position before t and
g_t the gradient to A_t plus the one to R_t, the recursion runs the other way: G_t = g_t + c G_p is the gradient to
r_t, and the one to V_t is k G_p less the gradient to A_t.

Where the mask leaves out a position between counted ones (a hole), ``skip`` is the above; with ``zero`` the hole is
itself a step, with reward and value 0; with ``cut`` nothing crosses it. A term whose coefficient is 0 plays no part,
even if it is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import has_fp64
from lsc_kernels.eager.reward_head import check_segments

HOLES = ("skip", "zero", "cut")
NEVER = 2**62
"""The place of a next position that there is not. Not the length, which a compiled graph must not fix."""


class GaeOptions(NamedTuple):
    """What the caller asked of the recursion; also, in this order, arguments of the native op."""

    gamma: float
    lam: float
    holes: str

    @property
    def of_return(self) -> float:
        """What the next return counts for: c."""
        return self.gamma * self.lam

    @property
    def of_value(self) -> float:
        """What the next value counts for: k."""
        return self.gamma * (1.0 - self.lam)


class Steps(NamedTuple):
    """The positions as rows: [B, T], or one row [1, N] that holds all packed sequences."""

    counted: Tensor
    sequence: Tensor  # the number of the sequence, where something is counted
    next: Tensor  # the next counted position; any, where there is none in the sequence
    has_next: Tensor
    has_previous: Tensor


def _steps(shape: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> Steps:
    rows, length = (1, shape[0]) if cu_seqlens is not None else shape
    counted = torch.ones(rows, length, dtype=torch.bool, device=device)
    if mask is not None:
        counted = mask.reshape(rows, length) != 0
    if cu_seqlens is None:
        sequence = torch.arange(rows, device=device).unsqueeze(-1).expand(rows, length)
    else:
        check_segments(cu_seqlens, length, "the tokens of rewards")
        starts = cu_seqlens.long().contiguous()
        places = torch.arange(length, device=device)
        sequence = torch.searchsorted(starts, places, right=True).unsqueeze(0) - 1
        inside = (sequence >= 0) & (sequence < starts.shape[0] - 1)
        counted, sequence = counted & inside, torch.where(inside, sequence, 0)
    following, has_next = _neighbour(counted, sequence)
    _, has_previous = _neighbour(counted.flip(-1), sequence.flip(-1))
    return Steps(counted, sequence, following, has_next, has_previous.flip(-1))


def _neighbour(counted: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """The next counted position after each, and whether it is of the same sequence."""
    places = torch.arange(counted.shape[-1], device=counted.device)
    onward = torch.where(counted, places, NEVER).flip(-1).cummin(-1).values.flip(-1)
    following = torch.nn.functional.pad(onward[:, 1:], (0, 1), value=NEVER)
    exists = following < NEVER
    following = torch.where(exists, following, 0)
    return following, exists & (sequence.gather(-1, following) == sequence)


def scan(terms: Tensor, factors: Tensor) -> Tensor:
    """s with s_t = terms_t + factors_t s_{t+1}, along the last dimension; a factor of 0 takes nothing."""
    if (
        torch.compiler.is_compiling()
    ):  # the number of rounds depends on the length: opaque, or each would compile again
        result: Tensor = torch.ops.lsc_kernels.eager_scan(terms, factors)
        return result
    return _scan(terms, factors)


def _scan(terms: Tensor, factors: Tensor) -> Tensor:
    """By doubling: after a round, s_t holds the terms before t + 2 reach, and factors_t takes what comes then."""
    sums, factors, linked = terms.clone(), factors.clone(), factors != 0
    reach, length = 1, terms.shape[-1]
    while reach < length:
        near, far = slice(None, length - reach), slice(reach, None)
        reaches = linked[:, near].clone()
        # an infinite sum stays one, also where the product of the factors is rounded to 0
        beyond = torch.where(sums[:, far].isinf(), sums[:, far], factors[:, near] * sums[:, far])
        sums[:, near] += torch.where(reaches, beyond, 0.0)
        factors[:, near] = factors[:, near] * factors[:, far]
        linked[:, near] = reaches & linked[:, far]
        reach *= 2
    return sums


_library = torch.library.Library("lsc_kernels", "FRAGMENT")
_library.define("eager_scan(Tensor terms, Tensor factors) -> Tensor")
_library.impl("eager_scan", _scan, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lsc_kernels::eager_scan", lambda terms, factors: torch.empty_like(terms), lib=_library
)


def returns(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor]:
    """R in fp64, in the shape of ``rewards``, and what is counted. Without ``values`` they are 0."""
    if rewards.numel() == 0:
        return torch.zeros_like(rewards, dtype=torch.float64), torch.zeros_like(rewards, dtype=torch.bool)
    steps = _steps(rewards.shape, mask, cu_seqlens, rewards.device)
    counted, inner = steps.counted, steps.has_next
    rows = counted.shape
    terms = torch.where(counted, rewards.reshape(rows).double(), 0.0)
    if values is not None and options.of_value:
        terms = terms + options.of_value * _next_values(values.reshape(rows).double(), steps, options.holes)
    if bootstrap is not None and options.gamma:
        ends = counted & ~inner
        beyond = options.gamma * bootstrap.double()[steps.sequence]
        terms = terms + torch.where(ends, beyond, 0.0)
    adjacent = torch.nn.functional.pad(counted[:, 1:], (0, 1))
    factors = _factors(counted, inner, adjacent, options)
    result = torch.where(counted, scan(terms, factors), 0.0)
    return result.reshape(rewards.shape), counted.reshape(rewards.shape)


def _next_values(values: Tensor, steps: Steps, holes: str) -> Tensor:
    """The value of the step after each; 0 where there is none, or where no step is taken from."""
    if holes == "skip":
        return torch.where(steps.counted & steps.has_next, values.gather(-1, steps.next), 0.0)
    adjacent = torch.nn.functional.pad(torch.where(steps.counted, values, 0.0)[:, 1:], (0, 1))
    leaves = steps.has_next if holes == "zero" else steps.has_next & steps.counted
    return torch.where(leaves, adjacent, 0.0)


def _factors(counted: Tensor, linked: Tensor, adjacent: Tensor, options: GaeOptions) -> Tensor:
    """What each position takes of its neighbour's sum, if its sequence goes on there (``linked``)."""
    hole = {"skip": 1.0, "zero": options.of_return, "cut": 0.0}[options.holes]
    if options.holes == "cut":
        linked = linked & adjacent
    factors = torch.full(counted.shape, options.of_return, dtype=torch.float64, device=counted.device)
    return torch.where(linked, torch.where(counted, factors, hole), 0.0)


def gradients(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """To rewards, values and bootstrap, in fp64, from the gradients of either result."""
    given = [grad for grad in (to_advantages, to_returns) if grad is not None]
    shape, device = given[0].shape, given[0].device
    if given[0].numel() == 0:
        none = given[0].double()
        return none, none, None if bootstrap is None else torch.zeros_like(bootstrap, dtype=torch.float64)
    steps = _steps(shape, mask, cu_seqlens, device)
    counted = steps.counted
    rows = counted.shape
    upstream = sum((grad.reshape(rows).double() for grad in given), torch.zeros(rows, device=device).double())
    before = torch.nn.functional.pad(counted[:, :-1], (1, 0))
    factors = _factors(counted, steps.has_previous, before, options)
    total = scan(torch.where(counted, upstream, 0.0).flip(-1), factors.flip(-1)).flip(-1)

    carried = torch.nn.functional.pad(total[:, :-1], (1, 0))
    to_values = torch.where(steps.has_previous, options.of_value * carried, 0.0) if options.of_value else 0.0
    if to_advantages is not None:
        to_values = to_values - to_advantages.reshape(rows).double()
    to_values = torch.where(counted, to_values, 0.0)
    to_bootstrap = None
    if bootstrap is not None:
        ends = torch.where(counted & ~steps.has_next, options.gamma * total, 0.0)
        nothing = torch.zeros_like(bootstrap, dtype=torch.float64)
        to_bootstrap = nothing.index_add(0, steps.sequence.flatten(), ends.flatten())
    return torch.where(counted, total, 0.0).reshape(shape), to_values.reshape(shape), to_bootstrap


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor]:
    """The advantages and the returns."""
    total, counted = returns(rewards, values, mask, bootstrap, cu_seqlens, options)
    advantages = torch.where(counted, total - values.double(), 0.0)
    if has_fp64(rewards, values, bootstrap):
        return advantages, total
    return advantages.float(), total.float()


def backward(
    to_advantages: Tensor | None,
    to_returns: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    options: GaeOptions,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """To rewards, values and bootstrap (of which only the shape is read), in the dtype of the results' gradients."""
    dtype = next(grad.dtype for grad in (to_advantages, to_returns) if grad is not None)
    to_rewards, to_values, to_bootstrap = gradients(
        to_advantages, to_returns, mask, cu_seqlens, bootstrap, options
    )
    return to_rewards.to(dtype), to_values.to(dtype), None if to_bootstrap is None else to_bootstrap.to(dtype)
