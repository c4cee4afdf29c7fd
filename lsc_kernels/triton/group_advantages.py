"""group_advantages in Triton: PyTorch sorts the ids on the device, and the first member of each group works for it.

Any id may stand anywhere, and how many groups there are is known on the device alone. Sorted (stably: members keep
their order), each group lies together, and a position knows by its neighbour whether a group begins there. So a program
takes POSITIONS of them, those that begin a group go over its members, MEMBERS at a time, and nothing waits for the
host. Comparing all ids with all, which would need no sort, is B^2 work; a sort of B numbers is a few launches.

In fp64: it is a number per sequence. A group is gone over three times (its mean, its spread, its results), and its bits
do not depend on other groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lsc_kernels.eager.group_advantages import GroupOptions, ids_and_size
from lsc_kernels.triton._launch import block, dense, launch, operator
from lsc_kernels.triton.token_rows import narrow

GROUPS = {"POSITIONS": block(64), "MEMBERS": 8}
"""Positions and members at a time, where groups are many and small; 4 of their products for each of 128 threads."""

BATCH = {"POSITIONS": 1, "MEMBERS": 1024}
"""The same where the whole batch is one group."""

_DATA = ("utility", "grad", "weights", "ids", "order", "out")


@triton.jit
def _members(ids, order, own_id, position, begins, reach, count, MEMBERS: tl.constexpr):
    """Which of the next positions are members of the group that begins at each position, and their rows."""
    place = position[:, None] + reach + tl.arange(0, MEMBERS)[None, :]
    own = begins[:, None] & (place < count)
    row = place
    if ids is not None:
        own = own & (tl.load(ids + place, mask=own, other=0) == own_id[:, None])
        row = tl.load(order + place, mask=own, other=0)
    return own, row


@triton.jit
def _upstream(grad, weights, row, column, own):
    value = tl.load(grad + row, mask=own, other=0.0).to(tl.float64)
    if weights is not None:
        value *= tl.load(weights + column).to(tl.float64)
    return value


@triton.jit(do_not_specialize=("columns", "count"), do_not_specialize_on_alignment=_DATA)
def _kernel(
    utility, grad, weights, ids, order, out, columns: tl.int64, count: tl.int64, eps: tl.float64,
    SCALED: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr, POSITIONS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """A column's advantages where there is no ``grad``, else the gradient to the column. Without ``ids`` all are one
    group."""
    column = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    own_id = position
    begins = position == 0
    if ids is not None:
        inside = position < count
        own_id = tl.load(ids + position, mask=inside, other=0)
        before = tl.load(ids + position - 1, mask=inside & (position > 0), other=0)
        begins = inside & (begins | (own_id != before))

    size = tl.zeros([POSITIONS], tl.int64)
    total = tl.zeros([POSITIONS], tl.float64)
    total_grad = tl.zeros([POSITIONS], tl.float64)
    reach = tl.full((), 0, tl.int64)
    while tl.max(size, 0) == reach:
        own, row = _members(ids, order, own_id, position, begins, reach, count, MEMBERS)
        size += tl.sum(own.to(tl.int64), 1)
        total += tl.sum(tl.load(utility + row * columns + column, mask=own, other=0.0).to(tl.float64), 1)
        if grad is not None:
            total_grad += tl.sum(_upstream(grad, weights, row, column, own), 1)
        reach += MEMBERS
    members = tl.maximum(size, 1).to(tl.float64)
    others = tl.maximum(size - 1, 1).to(tl.float64)
    mean, mean_grad = total / members, total_grad / members

    squares = tl.zeros([POSITIONS], tl.float64)
    along = tl.zeros([POSITIONS], tl.float64)
    longest = tl.max(size, 0)
    if SCALED:
        reach = tl.full((), 0, tl.int64)
        while reach < longest:
            own, row = _members(ids, order, own_id, position, begins, reach, count, MEMBERS)
            value = tl.load(utility + row * columns + column, mask=own, other=0.0).to(tl.float64)
            centred = tl.where(own, value - mean[:, None], 0.0)
            squares += tl.sum(centred * centred, 1)
            if grad is not None:
                along += tl.sum(_upstream(grad, weights, row, column, own) * centred, 1)
            reach += MEMBERS
    deviation = tl.sqrt(squares / others)
    divisor = tl.full([POSITIONS], 1.0, tl.float64)
    if SCALED:
        divisor = deviation + eps
    factor = divisor * 0 + 1.0
    if LEAVE_ONE_OUT:
        factor = members / others
    none = (size < 2) | (divisor == 0)
    slope = tl.where(deviation == 0, 0.0, along / (others * deviation * divisor))

    reach = tl.full((), 0, tl.int64)
    while reach < longest:
        own, row = _members(ids, order, own_id, position, begins, reach, count, MEMBERS)
        value = tl.load(utility + row * columns + column, mask=own, other=0.0).to(tl.float64)
        centred = value - mean[:, None]
        if grad is None:
            result = factor[:, None] * centred / divisor[:, None]
        else:
            upstream = _upstream(grad, weights, row, column, own) - mean_grad[:, None]
            if SCALED:
                upstream -= slope[:, None] * centred
            result = (factor / divisor)[:, None] * upstream
        result = tl.where(none[:, None], 0.0, result)
        if out.dtype.element_ty != tl.float64:
            result = narrow(result.to(tl.float32), out.dtype.element_ty)
        tl.store(out + row * columns + column, result, mask=own)
        reach += MEMBERS


class _Chain:
    """The stages: columns scored by group, then with ``over_batch`` their weighted sum over the whole batch."""

    def __init__(
        self, utility: Tensor, group: Tensor | None, size: int, weights: Tensor | None, scaled: bool,
        leave_one_out: bool, over_batch: bool, eps: float,
    ) -> None:  # fmt: skip
        self.utility, self.weights, self.over_batch, self.eps = (
            utility.contiguous(),
            dense(weights),
            over_batch,
            eps,
        )
        if group is None:
            self.order = torch.arange(len(utility), device=utility.device)
            self.ids = self.order // size
        else:
            self.ids, self.order = group.sort(stable=True)
        self.rules = {"SCALED": scaled, "LEAVE_ONE_OUT": leave_one_out}

    def each(self, grad: Tensor | None, out: Tensor) -> Tensor:
        """By group: scores, or the gradient to the utility from that to the (weighted) sum of its columns."""
        count, columns = self.utility.shape[0], self.utility.shape[1] if self.utility.dim() == 2 else 1
        launch(
            _kernel, (triton.cdiv(count, GROUPS["POSITIONS"]), columns), out.device, self.utility, grad,
            None if grad is None else self.weights, self.ids, self.order, out, columns, count, self.eps,
            **self.rules, **GROUPS,
        )  # fmt: skip
        return out

    def batch(self, total: Tensor, grad: Tensor | None, out: Tensor) -> Tensor:
        """Of the sums, the whole batch being one group."""
        launch(
            _kernel, (min(len(total), 1), 1), out.device, total, grad, None, None, None, out, 1, len(total), self.eps,
            SCALED=True, LEAVE_ONE_OUT=False, **BATCH,
        )  # fmt: skip
        return out

    def sums(self) -> Tensor:
        table = self.each(None, self.utility.new_empty(self.utility.shape, dtype=torch.float64))
        return (table if self.weights is None else table * self.weights).sum(-1)


_OPTIONS = "bool scaled, bool leave_one_out, bool over_batch, float eps"
_ARGUMENTS = f"Tensor utility, Tensor? group, int size, Tensor? weights, {_OPTIONS}"


@operator(
    f"group_advantages_forward({_ARGUMENTS}) -> Tensor",
    lambda utility, *_: utility.new_empty(utility.shape[:1], dtype=torch.float32),
)
def _forward(utility: Tensor, *arguments: Any) -> Tensor:
    chain, out = _Chain(utility, *arguments), utility.new_empty(utility.shape[:1], dtype=torch.float32)
    return chain.batch(chain.sums(), None, out) if chain.over_batch else chain.each(None, out)


@operator(
    f"group_advantages_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    lambda grad, utility, *_: utility.new_empty(utility.shape),
)
def _backward(grad: Tensor, utility: Tensor, *arguments: Any) -> Tensor:
    chain, upstream = _Chain(utility, *arguments), grad.contiguous()
    if chain.over_batch:
        upstream = chain.batch(chain.sums(), upstream, grad.new_empty(grad.shape, dtype=torch.float64))
    return chain.each(upstream, utility.new_empty(utility.shape))


_ops = torch.ops.lsc_kernels_triton


def forward(utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions) -> Tensor:
    result: Tensor = _ops.group_advantages_forward(utility, *ids_and_size(group), weights, *options)
    return result


def backward(
    grad: Tensor, utility: Tensor, group: Tensor | int, weights: Tensor | None, options: GroupOptions
) -> Tensor:
    result: Tensor = _ops.group_advantages_backward(grad, utility, *ids_and_size(group), weights, *options)
    return result
