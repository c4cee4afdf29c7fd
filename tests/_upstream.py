"""Gradients from above as autograd hands them over: seldom dense, often one value for all or one for each row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

ROWS, COLUMNS = SHAPE = (7, 300)
"""Of the output that the gradient is of: some tiles of the CPU kernels, and no whole number of them."""


def views(generator: Generator) -> dict[str, Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "one value": normal(1, 1).expand(SHAPE),
        "one for each row": normal(ROWS, 1).expand(SHAPE),
        "one for each column": normal(1, COLUMNS).expand(SHAPE),
        "rows of a wider tensor": normal(ROWS, COLUMNS + 5)[:, 5:],
        "columns first": normal(COLUMNS, ROWS).mT,
        "every other column": normal(ROWS, 2 * COLUMNS)[:, ::2],
    }


def check(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], generator: Generator) -> None:
    """The gradients of ``leaves`` have the same bits, however the gradient of the output lies in memory."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    output = function(*leaves)
    assert output.shape == SHAPE
    for name, upstream in views(generator).items():
        given, dense = (
            torch.autograd.grad(output, leaves, each, retain_graph=True)
            for each in (upstream, upstream.contiguous())
        )
        for got, want in zip(given, dense, strict=True):
            assert torch.equal(got, want), name
            assert got.any(), name
