"""What the tests of the reward side share: the truth's gradients, and errors relative to the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lsc_kernels import native

SMALLEST = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def instruction_sets(backend: str) -> list[str]:
    """Every build of the native kernels that this machine runs; the other backends have one."""
    if backend != "native":
        return [""]
    names: list[str] = native._C.isas()
    return names


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    before = native._C.isa()
    native._C.set_isa(name)
    try:
        yield
    finally:
        native._C.set_isa(before)


def relative_error(got: Tensor, truth: Tensor) -> float:
    """The largest, where the truth is a normal fp32 number; elsewhere the result may only be as small."""
    finite = truth.isfinite() & (truth.abs() <= torch.finfo(torch.float32).max)
    assert torch.equal(got.isnan(), truth.isnan())
    normal = finite & (truth.abs() >= SMALLEST)
    assert (got[finite & ~normal].abs() <= SMALLEST).all()
    if not normal.any():
        return 0.0
    return float(((got.double() - truth).abs() / truth.abs())[normal].max())


def with_gradients(
    function: Callable[..., Tensor], upstream: Tensor, inputs: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The value at fresh copies of the inputs, and the gradient of each floating-point one."""
    leaves = [None if tensor is None else tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    value.backward(upstream.to(value.dtype))
    return value.detach(), [None if leaf is None else leaf.grad for leaf in leaves]


def check_against_fp64(
    function: Callable[..., Tensor],
    upstream: Tensor,
    inputs: Sequence[Tensor | None],
    rtol: float,
    full: Sequence[int] | None = None,
    atol: float = SMALLEST,
) -> None:
    """Values and gradients, against the same function in fp64 on the same inputs.

    ``atol`` is for values that are sums and may cancel. A gradient may be off by one rounding and by ``rtol`` of its
    largest element; where the inputs are broadcast to ``full``, and so their gradients are sums that may cancel, of
    the largest sum of magnitudes.
    """
    value, gradients = with_gradients(function, upstream, inputs)
    exact = [None if tensor is None else tensor.double() for tensor in inputs]
    truth, true_gradients = with_gradients(function, upstream, exact)
    fp64 = any(x is not None and x.dtype is torch.float64 for x in inputs)
    assert value.dtype is (torch.float64 if fp64 else torch.float32)
    close(value, truth, rtol, atol)
    terms = true_gradients
    if full is not None:
        spread = [None if x is None else x.expand(full) for x in exact]
        _, terms = with_gradients(function, upstream, spread)
    for tensor, gradient, true_gradient, term in zip(inputs, gradients, true_gradients, terms, strict=True):
        if tensor is None:
            continue
        assert gradient is not None and true_gradient is not None and term is not None
        assert gradient.dtype is tensor.dtype and gradient.shape == tensor.shape
        magnitudes = term.abs().nan_to_num(0.0, 0.0).sum_to_size(tensor.shape)
        largest = float(magnitudes.max()) if magnitudes.numel() else 0.0
        info = torch.finfo(tensor.dtype)
        close(gradient, true_gradient, rtol + info.eps / 2, rtol * largest + info.tiny)


def close(got: Tensor, truth: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=atol, equal_nan=True)
