"""Advantages of a group's members over one another: the definition.

With m the mean of the n members of a group, d_i = u_i - m, and s the sample standard deviation of the group

    A_i = f d_i / D        f = n / (n - 1) with leave_one_out, else 1        D = s + eps if scaled, else 1

since u_i less the mean of the others is n / (n - 1) times u_i less the mean of all. Columns [B, K] are taken one by
one, summed with their weights, and with ``over_batch`` the sums are scaled once more, the whole batch being one group.
A member that is alone has advantage 0, and where D is 0 so is the advantage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsc_kernels.eager.lsc_transform import has_fp64


class GroupOptions(NamedTuple):
    """What makes a method; also, in this order, arguments of the native op."""

    scaled: bool
    leave_one_out: bool
    over_batch: bool
    eps: float


class Scores(NamedTuple):
    """A_i = factor d_i / divisor, and of what they are made."""

    advantages: Tensor
    centred: Tensor  # d
    factor: Tensor  # 0 for one that is alone
    divisor: Tensor
    deviation: Tensor  # s
    group: Tensor  # [B] in [0, B)
    others: Tensor  # n - 1, at least 1


def ids_and_size(group: Tensor | int) -> tuple[Tensor | None, int]:
    """The groups as a kernel takes them: ids, or none and the size of each."""
    return (group, 0) if isinstance(group, Tensor) else (None, group)


def _numbered(group: Tensor | int, utility: Tensor) -> Tensor:
    """Ids of any value, or a size, as numbers in [0, B)."""
    if not isinstance(group, Tensor):
        return torch.arange(utility.shape[0], device=utility.device) // group
    ordered, order = group.long().sort(stable=True)
    new = torch.zeros_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).to(new.dtype)
    return torch.zeros_like(ordered).scatter(0, order, new.cumsum(0))


def _sums(values: Tensor, group: Tensor) -> Tensor:
    """The sum of each member's group, in every member's place; deterministic on a GPU too."""
    return torch.zeros_like(values).index_put((group,), values, accumulate=True)[group]


def _scores(utility: Tensor, group: Tensor, scaled: bool, leave_one_out: bool, eps: float) -> Scores:
    """Of utility [B, K], in fp64."""
    members = _sums(torch.ones_like(utility), group)
    others = (members - 1).clamp_min(1)
    mean = _sums(utility, group) / members
    # what the sum was rounded by: equal values differ from their mean by nothing
    mean = mean + (_sums(utility - mean, group) / members).nan_to_num(0.0, 0.0, 0.0)
    centred = utility - mean
    deviation = (_sums(centred.square(), group) / others).sqrt()
    divisor = deviation + eps if scaled else torch.ones_like(deviation)
    factor = members / others if leave_one_out else torch.ones_like(members)
    factor = torch.where(members > 1, factor, 0.0)
    advantages = torch.where((divisor == 0) | (factor == 0), 0.0, factor * centred / divisor)
    return Scores(advantages, centred, factor, divisor, deviation, group, others)


def _scores_backward(grad: Tensor, scores: Scores, scaled: bool) -> Tensor:
    """f / D (g_j - mean g) - f / D^2 (sum g_i d_i) d_j / ((n - 1) s), the last term where D depends on s."""
    _, centred, factor, divisor, deviation, group, others = scores
    share = torch.where(divisor == 0, 0.0, factor / divisor)
    members = _sums(torch.ones_like(grad), group)
    result = share * (grad - _sums(grad, group) / members)
    if scaled:
        along = _sums(grad * centred, group) * centred / (others * deviation * divisor)
        result = result - torch.where(deviation == 0, 0.0, share * along)
    return torch.where(factor == 0, 0.0, result)


def _stages(
    utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions
) -> tuple[Scores, Tensor | None, Scores | None]:
    """Each column's scores, the columns' weights, and the scores of their sum over the batch."""
    columns = utility.double() if utility.dim() == 2 else utility.double().unsqueeze(-1)
    each = _scores(columns, _numbered(group, utility), options.scaled, options.leave_one_out, options.eps)
    weight = None if weights is None else weights.double()
    if not options.over_batch:
        return each, weight, None
    total = (each.advantages if weight is None else each.advantages * weight).sum(-1, keepdim=True)
    return each, weight, _scores(total, torch.zeros_like(each.group), True, False, options.eps)


def forward(utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions) -> Tensor:
    """``group`` holds an id for each of the B rows, or is the size of groups that lie one after another."""
    each, _, batch = _stages(utility, group, weights, options)
    result = (each if batch is None else batch).advantages.squeeze(-1)
    return result if has_fp64(utility) else result.float()


def backward(
    grad: Tensor, utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions
) -> Tensor:
    """To the utility, in its dtype."""
    each, weight, batch = _stages(utility, group, weights, options)
    upstream = grad.double().unsqueeze(-1)
    if batch is not None:
        upstream = _scores_backward(upstream, batch, True)
        upstream = upstream.expand_as(each.advantages) if weight is None else upstream * weight
    return _scores_backward(upstream, each, options.scaled).reshape(utility.shape).to(utility.dtype)
