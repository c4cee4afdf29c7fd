"""masked_whiten: values, accuracy, gradients, two processes, modes, bad input."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _upstream
import pytest
import torch
from _modes import compile_once, needs_native, on_one_thread
from _reward_side import DTYPES, check_against_fp64, instruction_set, instruction_sets, with_gradients
from torch import Generator, Tensor

import lsc_kernels as lk


def by_hand(
    x: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, correction: int = 1
) -> Tensor:
    counted = x[mask != 0].double()
    result = torch.zeros(x.shape, dtype=torch.float64)
    if not counted.numel():
        return result
    variance = counted.var(correction=correction) if counted.numel() > 1 else torch.tensor(0.0).double()
    scaled = torch.where(variance + eps > 0, (counted - counted.mean()) / (variance + eps).sqrt(), 0.0)
    result[mask != 0] = scaled if shift_mean else scaled + counted.mean()
    return result


@pytest.mark.parametrize("shape", [(7,), (5, 1000), (3, 4, 5), (40, 1024), (1, 16385), ()])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("correction", [0, 1])
def test_values(
    backend: str, generator: Generator, shape: tuple[int, ...], shift_mean: bool, correction: int
) -> None:
    x, mask = torch.randn(shape, generator=generator) * 3 + 1, torch.rand(shape, generator=generator) < 0.7
    truth = by_hand(x, mask, shift_mean, correction=correction)
    x = torch.where(mask, x, torch.nan)
    for name in instruction_sets(backend):
        with instruction_set(name):
            got = lk.masked_whiten(x, mask, shift_mean=shift_mean, correction=correction)
        assert got.dtype is torch.float32 and got.shape == shape and (got[~mask] == 0).all()
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level, spread", [(1e4, 1.0), (1e6, 1e3), (-3e4, 1e-1), (0.0, 1e-3), (0.0, 1e15)])
def test_a_large_mean_costs_no_accuracy(
    backend: str, generator: Generator, level: float, spread: float
) -> None:
    """E[x^2] - E[x]^2 in fp32 has no correct digit at (1e4, 1)."""
    x = level + spread * torch.randn(64, 1000, generator=generator)
    mask = torch.rand(64, 1000, generator=generator) < 0.7
    got = lk.masked_whiten(x, mask, eps=0.0)
    torch.testing.assert_close(got.double(), by_hand(x, mask, eps=0.0), rtol=1e-6, atol=1e-6)


def test_trl_and_verl(backend: str, generator: Generator) -> None:
    """Both: the unbiased variance of what the mask counts, 1e-8 under the root."""
    x, mask = torch.randn(6, 50, generator=generator), (torch.rand(6, 50, generator=generator) < 0.7).float()
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean) ** 2 * mask).sum() / mask.sum() * mask.sum() / (mask.sum() - 1)
    theirs = (x - mean) * torch.rsqrt(variance + 1e-8)
    torch.testing.assert_close(lk.masked_whiten(x, mask), theirs * mask, rtol=1e-5, atol=1e-6)
    kept = lk.masked_whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, (theirs + mean) * mask, rtol=1e-5, atol=1e-6)


def test_few_elements(backend: str) -> None:
    for eps in (0.0, 1e-8):
        x = torch.tensor([5.0, torch.nan, 5.0])
        for mask, kept in (([0, 0, 0], 0), ([1, 0, 0], 1), ([1, 0, 1], 2)):
            counted = torch.tensor(mask)
            for shift_mean in (True, False):
                got, (gradient,) = with_gradients(
                    lambda x, m=counted, s=shift_mean, e=eps: lk.masked_whiten(x, m, shift_mean=s, eps=e),
                    torch.tensor([1.0, torch.nan, 1.0]),
                    [x],
                )
                assert got.tolist() == [0.0 if shift_mean or not m else 5.0 for m in mask]
                assert (
                    gradient is not None and gradient.isfinite().all() and (gradient[counted == 0] == 0).all()
                )
                if not shift_mean and kept:  # only the mean is left to move
                    assert gradient.sum().item() == pytest.approx(kept)
    x = torch.full((3,), 2.0, requires_grad=True)
    lk.masked_whiten(x, None, eps=1e-300, correction=0).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all(), "the third power of the scale is not"
    # whose sum over three is none of them
    assert lk.masked_whiten(torch.full((3,), 0.1, dtype=torch.float64), None, eps=0.0).tolist() == [0.0] * 3
    for shape in ((0,), (0, 4), (3, 0)):
        _, (gradient,) = with_gradients(
            lambda x: lk.masked_whiten(x, None), torch.zeros(shape), [torch.zeros(shape)]
        )
        assert gradient is not None and gradient.shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("correction", [0, 1])
def test_gradients(
    backend: str, generator: Generator, dtype: torch.dtype, shift_mean: bool, correction: int
) -> None:
    x = (torch.randn(9, 2001, generator=generator) * 2 + 1).to(dtype)
    mask = torch.rand(9, 2001, generator=generator) < 0.7
    upstream = torch.randn(9, 2001, generator=generator)
    for name in instruction_sets(backend):
        with instruction_set(name):
            check_against_fp64(
                lambda x: lk.masked_whiten(x, mask, shift_mean=shift_mean, correction=correction),
                upstream,
                [x],
                1e-6,
            )


def test_gradcheck(generator: Generator) -> None:
    x = torch.randn(3, 4, generator=generator).double().requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    for shift_mean in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, s=shift_mean: lk.masked_whiten(x, mask, shift_mean=s, eps=0.1), x
        )


def test_any_strides_and_the_same_bits(backend: str, generator: Generator) -> None:
    base, mask = torch.randn(60, 40, generator=generator), torch.rand(20, 20, generator=generator) < 0.7
    for x in (base[::3, ::2], base[:20, :20].mT, base[:1, :20].expand(20, 20), base[40:, 20:].flip(1)):
        expected = lk.masked_whiten(x.contiguous(), mask)
        for given_mask in (mask, mask.mT.contiguous().mT, mask.double(), mask.to(torch.int16)):
            assert torch.equal(lk.masked_whiten(x, given_mask), expected)
        row = mask[:1].expand(20, 20)
        assert torch.equal(lk.masked_whiten(x, row), lk.masked_whiten(x, row.contiguous()))
    x = torch.randn(300, 1000, generator=generator)
    first = lk.masked_whiten(x, None)
    with on_one_thread():
        assert torch.equal(lk.masked_whiten(x, None), first)


PROCESS = """
import sys
import torch
import torch.distributed as dist
import lsc_kernels as lk

rank, store, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
lk.set_backend(backend)
generator = torch.Generator().manual_seed(int(sys.argv[4]))
x, upstream = 1000 + torch.randn(2, 6, 501, generator=generator)
mask = torch.rand(6, 501, generator=generator) < 0.7
x[~mask] = torch.nan
rows = slice(0, 2) if rank == 0 else slice(2, 6)  # parts of different size

for shift_mean in (True, False):
    whole = x.clone().requires_grad_()
    expected = lk.masked_whiten(whole, mask, shift_mean=shift_mean)
    expected.backward(upstream)
    part = x[rows].clone().requires_grad_()
    got = lk.masked_whiten(part, mask[rows], shift_mean=shift_mean, process_group=dist.group.WORLD)
    got.backward(upstream[rows])
    torch.testing.assert_close(got, expected[rows], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(part.grad, whole.grad[rows], rtol=1e-5, atol=1e-6)

# the same element whitened on both processes has the same bits; a process may have nothing to count
same = torch.cat([x[rows][:, :250], torch.full((1, 250), 999.5)])
counted = torch.cat([mask[rows][:, :250], torch.ones(1, 250, dtype=torch.bool)])
ends = [torch.zeros(250) for _ in range(2)]
dist.all_gather(ends, lk.masked_whiten(same, counted, process_group=dist.group.WORLD)[-1])
assert torch.equal(*ends)
counted = mask[rows] & (rank == 0)
got = lk.masked_whiten(x[rows], counted, process_group=dist.group.WORLD)
torch.testing.assert_close(got, lk.masked_whiten(x[rows], counted) if rank == 0 else torch.zeros(4, 501))
dist.destroy_process_group()
"""


def test_two_processes(backend: str, generator: Generator, tmp_path: Path) -> None:
    if "cuda" in backend:
        pytest.skip("the processes have CPU tensors")
    seed = str(int(torch.randint(2**31, (), generator=generator)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "store"), backend, seed],
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def test_modes(backend: str, generator: Generator) -> None:
    x = torch.randn(2, 5, generator=generator).requires_grad_()
    expected = lk.masked_whiten(x, None)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode:
            assert torch.equal(lk.masked_whiten(x, None), expected)
    leaf = torch.ones(2, 5, requires_grad=True)
    (first,) = torch.autograd.grad(expected, x, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_whiten has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    calls = [
        (
            torch.randn(shape, generator=generator).requires_grad_(),
            torch.rand(shape, generator=generator) < 0.8,
        )
        for shape in ((3, 4), (5, 7), (4, 90))
    ]
    for shift_mean in (True, False):
        compile_once(lambda x, m, s=shift_mean: [lk.masked_whiten(x, m, shift_mean=s)], calls)


def test_any_gradient_from_above(backend: str, generator: Generator) -> None:
    mask = torch.rand(_upstream.SHAPE, generator=generator) < 0.8
    _upstream.check(
        lambda x: lk.masked_whiten(x, mask, shift_mean=False),
        (torch.randn(_upstream.SHAPE, generator=generator),),
        generator,
    )


@needs_native
def test_opcheck(generator: Generator) -> None:
    ops, x = torch.ops.lsc_kernels, torch.randn(3, 5, generator=generator)
    moments, sums = torch.tensor([9.0, 0.1, 8.0]).double(), torch.tensor([1.0, 2.0]).double()
    for mask in (None, x > 0):
        torch.library.opcheck(ops.masked_whiten_moments, (x.half(), mask))
        torch.library.opcheck(ops.masked_whiten_forward, (x.half(), mask, moments, True, 1e-8, 1))
        torch.library.opcheck(ops.masked_whiten_sums, (x, x.bfloat16(), mask, moments))
        torch.library.opcheck(
            ops.masked_whiten_backward, (x, x.bfloat16(), mask, moments, sums, False, 1e-8, 0)
        )


X = torch.zeros(2, 3)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: lk.masked_whiten([0.0], None), TypeError, "x must be a tensor; got list"),
    (lambda: lk.masked_whiten(X.long(), None), TypeError, "x must be float32.*got torch.int64"),
    (lambda: lk.masked_whiten(X, X[0]), ValueError, r"mask must have the shape of x, \[2, 3\]; got \[3\]"),
    (lambda: lk.masked_whiten(X, [[1]]), TypeError, "mask must be a tensor"),
    (lambda: lk.masked_whiten(X, X.to("meta")), ValueError, "mask must be on .*; got meta"),
    (lambda: lk.masked_whiten(X, None, eps=-1e-8), ValueError, "eps must be >= 0; got -1e-08"),
    (lambda: lk.masked_whiten(X, None, eps=math.inf), ValueError, "eps must be finite; got inf"),
    (lambda: lk.masked_whiten(X, None, eps="0"), TypeError, "eps must be a float; got str"),
    (
        lambda: lk.masked_whiten(X, None, shift_mean=None),
        TypeError,
        "shift_mean must be a bool; got NoneType",
    ),
    (lambda: lk.masked_whiten(X, None, correction=2), ValueError, "correction must be 0 or 1; got 2"),
    (
        lambda: lk.masked_whiten(X, None, process_group="world"),
        TypeError,
        "process_group must be a torch.dist.*str",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
