"""gae of packed sequences, with what the kernels of a GPU share it out by in the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

import lsc_kernels as lk


def packed_gae(
    generator: Generator, lengths: Sequence[int], holes: str
) -> tuple[Callable[[], list[Tensor]], Callable[[list[Tensor]], None]]:
    """A call that gives both results and all gradients; and one that holds them against the last sequence's alone.

    The second half of the first sequence is masked: its last counted position is in another part of it than its end.
    """
    rewards, values, upstream = torch.randn(3, sum(lengths), generator=generator)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    mask[lengths[0] // 2 : lengths[0]] = False

    def call(part: slice, bounds: Tensor) -> list[Tensor]:
        leaves = [rewards[part].clone(), values[part].clone(), torch.ones(len(bounds) - 1)]
        for leaf in leaves:
            leaf.requires_grad_()
        results = lk.gae(*leaves[:2], mask[part], bootstrap=leaves[2], holes=holes, cu_seqlens=bounds)
        gradients = torch.autograd.grad(results, leaves, [upstream[part]] * 2)
        return [*(each.detach() for each in results), *gradients]

    def check_last(together: list[Tensor]) -> None:
        alone = call(slice(-lengths[-1], None), torch.tensor([0, lengths[-1]]))
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[-len(b) :], b)

    return lambda: call(slice(None), torch.tensor([0, *lengths]).cumsum(0)), check_last
