"""reward_head: which row is read, scores and gradients, separate reward models, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _modes import compile_once, needs_native
from _reward_side import DTYPES, check_against_fp64, instruction_set, instruction_sets, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

import lsc_kernels as lk

# fp32 sums of H products, each rounded once, here of size 1 per term
RTOL = 3e-6

MASKS = {
    "right padding": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left padding": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 1, 0]],
}


def by_hand(hidden: Tensor, weight: Tensor, positions: list[int | None]) -> Tensor:
    rows = [
        torch.full((weight.shape[0],), torch.nan, dtype=torch.float64)
        if place is None
        else weight.double() @ hidden[b, place].double()
        for b, place in enumerate(positions)
    ]
    return torch.stack(rows)


def last_nonzero(mask: list[list[int]]) -> list[int | None]:
    return [max((s for s, counted in enumerate(row) if counted), default=None) for row in mask]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    "mask_dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ],
)
def test_position_from_mask(
    backend: str, generator: Generator, mask: list[list[int]], mask_dtype: torch.dtype
) -> None:
    hidden, weight = torch.randn(3, 5, 33, generator=generator), torch.randn(2, 33, generator=generator)
    positions = last_nonzero(mask)
    poisoned = torch.full_like(hidden, torch.nan)  # what is not read may be anything
    for b, place in enumerate(positions):
        assert place is not None
        poisoned[b, place] = hidden[b, place]
    tensor = torch.tensor(mask, dtype=mask_dtype)
    if mask_dtype.is_floating_point:
        tensor = torch.where(tensor != 0, tensor * 0.25, -0.0)
    truth = by_hand(hidden, weight, positions)
    for given_mask in (tensor, tensor.mT.contiguous().mT):
        scores = lk.reward_head(poisoned, weight, attention_mask=given_mask)
        torch.testing.assert_close(scores.double(), truth, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_position_from_index(backend: str, generator: Generator, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(4, 5, 16, generator=generator), torch.randn(2, 16, generator=generator)
    index = torch.tensor([0, 9, 4, 9, 2, 9, 1, 9], dtype=dtype)[::2]
    truth = by_hand(hidden, weight, [0, 4, 2, 1])
    scores = lk.reward_head(hidden, weight, index=index)
    torch.testing.assert_close(scores.double(), truth, rtol=RTOL, atol=RTOL)
    masked = lk.reward_head(hidden, weight, index=index, attention_mask=torch.zeros(4, 5))
    assert torch.equal(masked, scores)  # an index decides


def test_last_position_by_default(backend: str, generator: Generator) -> None:
    hidden, weight = torch.randn(2, 5, 16, generator=generator), torch.randn(1, 16, generator=generator)
    truth = by_hand(hidden, weight, [4, 4])
    torch.testing.assert_close(lk.reward_head(hidden, weight).double(), truth, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed(backend: str, generator: Generator, dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(9, 16, generator=generator), torch.randn(2, 16, generator=generator)
    bias = torch.randn(2, generator=generator)
    cu_seqlens = torch.tensor([0, 4, 4, 5, 9], dtype=dtype)
    truth = by_hand(hidden.unsqueeze(0).expand(4, 9, 16), weight, [3, None, 4, 8]) + bias
    scores = lk.reward_head(hidden, weight, bias, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(scores.double(), truth, rtol=RTOL, atol=RTOL, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 5, 33), (7, 33), (33,), (2, 1, 3, 4, 33), (0, 5, 33), (3, 99, 33)])
def test_every_position(backend: str, generator: Generator, shape: tuple[int, ...]) -> None:
    hidden, weight = torch.randn(shape, generator=generator), torch.randn(2, 33, generator=generator)
    bias = torch.randn(2, generator=generator)
    upstream = torch.randn((*shape[:-1], 2), generator=generator)
    size = hidden.double().abs() @ weight.double().abs().T + bias.abs()  # a score may cancel
    check_against_fp64(
        lambda h, w, b: lk.reward_head(h, w, b, pool="none"),
        upstream,
        [hidden, weight, bias],
        RTOL,
        atol=1e-6 * float(size.max()) if size.numel() else 0.0,
    )
    counted = torch.rand(shape[:-1], generator=generator) < 0.5
    hidden = torch.where(counted.unsqueeze(-1), hidden, torch.nan)
    scores, gradients = with_gradients(
        lambda h, w, b: lk.reward_head(h, w, b, attention_mask=counted, pool="none"),
        upstream,
        [hidden, weight, bias],
    )
    expected = hidden.nan_to_num().double() @ weight.double().T + bias
    assert ((scores - expected)[counted].abs() <= 1e-6 * size[counted]).all() and (
        scores[~counted] == 0
    ).all()
    to_hidden, to_weight, to_bias = gradients
    assert to_hidden is not None and to_weight is not None and to_bias is not None
    assert (to_hidden[~counted] == 0).all() and to_weight.isfinite().all() and to_bias.isfinite().all()


@pytest.mark.parametrize("width", [1, 7, 64, 100, 2048, 5000])
def test_width_and_properties(backend: str, generator: Generator, width: int) -> None:
    mask = torch.tensor(MASKS["holes"])
    for properties in (1, 3, 17):
        hidden = torch.randn(3, 5, width, generator=generator)
        weight = torch.randn(properties, width, generator=generator)
        bias, upstream = (
            torch.randn(shape, generator=generator) for shape in ((properties,), (3, properties))
        )
        for name in instruction_sets(backend):
            with instruction_set(name):
                value, _ = with_gradients(
                    lambda h, w: lk.reward_head(h, w, attention_mask=mask), upstream, [hidden, weight]
                )
                truth = by_hand(hidden, weight, [2, 4, 3])
                size = hidden.abs().amax(1).double() @ weight.abs().double().T  # bounds sum |h w|
                assert ((value.double() - truth).abs() <= 1e-6 * size).all()
                check_gradients(hidden, weight, bias, mask, upstream)


def check_gradients(hidden: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, upstream: Tensor) -> None:
    def head(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return lk.reward_head(h, w, b, attention_mask=mask)

    _, (to_hidden, to_weight, to_bias) = with_gradients(head, upstream, [hidden, weight, bias])
    exact = [tensor.double() for tensor in (hidden, weight, bias)]
    _, truths = with_gradients(head, upstream.double(), exact)
    for got, truth in zip((to_hidden, to_weight, to_bias), truths, strict=True):
        assert got is not None and truth is not None
        torch.testing.assert_close(got.double(), truth, rtol=RTOL, atol=RTOL * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_dtypes(backend: str, generator: Generator, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    hidden = (torch.randn(3, 5, 40, generator=generator) + 2).to(dtype)
    weight = (torch.rand(2, 40, generator=generator) + 0.5).to(weight_dtype)
    bias, upstream = torch.randn(2, generator=generator).half(), torch.randn(3, 2, generator=generator)
    mask = torch.tensor(MASKS["holes"])
    check_against_fp64(
        lambda h, w, b: lk.reward_head(h, w, b, attention_mask=mask), upstream, [hidden, weight, bias], RTOL
    )


def test_gradcheck(generator: Generator) -> None:
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4, 5), (2, 5), (2,))]
    for tensor in inputs:
        tensor.requires_grad_()
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
    assert torch.autograd.gradcheck(lambda h, w, b: lk.reward_head(h, w, b, attention_mask=mask), inputs)
    assert torch.autograd.gradcheck(
        lambda h, w, b: lk.reward_head(h, w, b, attention_mask=mask, pool="none"), inputs
    )


def test_gradient_is_zero_but_where_it_was_read(backend: str, generator: Generator) -> None:
    hidden, weight = torch.randn(3, 5, 8, generator=generator), torch.randn(2, 8, generator=generator)
    index = torch.tensor([0, 4, 2])
    _, (to_hidden, _) = with_gradients(
        lambda h, w: lk.reward_head(h, w, index=index), torch.ones(3, 2), [hidden, weight]
    )
    assert to_hidden is not None
    read = torch.zeros(3, 5, dtype=torch.bool)
    read[torch.arange(3), index] = True
    assert (to_hidden[~read] == 0).all() and (to_hidden[read] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_counted(backend: str, generator: Generator, dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(s, generator=generator).to(dtype) for s in ((2, 3, 8), (2, 8)))
    hidden[0] = torch.nan
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    scores, (to_hidden, to_weight, to_bias) = with_gradients(
        lambda h, w, b: lk.reward_head(h, w, b, attention_mask=mask),
        torch.ones(2, 2),
        [hidden, weight, torch.zeros(2)],
    )
    assert scores[0].isnan().all() and scores[1].isfinite().all()
    assert to_hidden is not None and to_weight is not None and to_bias is not None
    assert (to_hidden[0] == 0).all()
    torch.testing.assert_close(to_weight, hidden[1, 1].expand(2, 8))
    assert to_bias.tolist() == [1.0, 1.0]


def test_a_row_without_upstream_gradient_counts_for_nothing(backend: str) -> None:
    hidden = torch.tensor([[[torch.nan, 1.0]], [[2.0, 3.0]]])
    upstream = torch.tensor([[0.0], [1.0]])
    _, (_, to_weight) = with_gradients(lk.reward_head, upstream, [hidden, torch.ones(1, 2)])
    assert to_weight is not None and to_weight.tolist() == [[2.0, 3.0]]


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (0, 0, 8)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    hidden, weight = torch.zeros(shape), torch.ones(2, 8)
    upstream = torch.ones(shape[0], 2)
    for mask in (None, torch.ones(shape[:2])):
        scores, (to_hidden, to_weight) = with_gradients(
            lambda h, w, m=mask: lk.reward_head(h, w, attention_mask=m), upstream, [hidden, weight]
        )
        assert scores.shape == (shape[0], 2) and scores.isnan().all()
        assert to_hidden is not None and to_hidden.shape == shape
        assert to_weight is not None and (to_weight == 0).all()
    packed = lk.reward_head(torch.zeros(0, 8), weight, cu_seqlens=torch.tensor([0, 0, 0]))
    assert packed.shape == (2, 2) and packed.isnan().all()
    assert lk.reward_head(torch.zeros(0, 8), weight, cu_seqlens=torch.tensor([0])).shape == (0, 2)
    scores, (to_hidden, _) = with_gradients(
        lambda h, w: lk.reward_head(h, w, pool="none"),
        torch.ones(3, 2),
        [torch.zeros(3, 0), torch.zeros(2, 0)],
    )
    assert scores.tolist() == [[0.0, 0.0]] * 3 and to_hidden is not None and to_hidden.shape == (3, 0)


def test_any_strides(backend: str, generator: Generator) -> None:
    base, weight = torch.randn(4, 6, 24, generator=generator), torch.randn(2, 24, generator=generator)
    upstream = torch.randn(2, 4, generator=generator).mT
    for hidden in (
        base.transpose(0, 1)[:4, :4],
        base[:1].expand(4, 6, 24),
        base.mT.contiguous().mT,
        base[:, ::2],
        base.flip(1),
    ):
        mask = torch.ones(hidden.shape[:2])
        mask[:, -1] = 0
        for options in ({"attention_mask": mask}, {"pool": "none"}):
            grad = upstream if "pool" not in options else torch.ones(*hidden.shape[:2], 2)
            expected, gradients = with_gradients(
                lambda h, w, o=options: lk.reward_head(h, w, **o), grad, [hidden.contiguous(), weight]
            )
            leaf, strided_weight = (
                hidden.detach().requires_grad_(),
                weight.mT.contiguous().mT.requires_grad_(),
            )
            scores = lk.reward_head(leaf, strided_weight, **options)
            scores.backward(grad)
            assert torch.equal(scores, expected)
            assert leaf.grad is not None and gradients[0] is not None and torch.equal(leaf.grad, gradients[0])
            assert strided_weight.grad is not None and torch.equal(strided_weight.grad, gradients[1])


def test_a_row_depends_on_nothing_beside_it(backend: str, generator: Generator) -> None:
    hidden, weight = torch.randn(40, 3, 100, generator=generator), torch.randn(2, 100, generator=generator)
    whole = lk.reward_head(hidden, weight)
    assert torch.equal(whole, lk.reward_head(hidden, weight))
    alone = torch.cat([lk.reward_head(hidden[b : b + 1], weight) for b in range(40)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=0 if backend == "native" else 1e-15)


def test_only_what_is_read_is_touched(backend: str) -> None:
    """2^36 hidden states that do not exist: one row, expanded."""
    hidden = torch.arange(16.0).expand(4, 2**30, 16)
    index = torch.tensor([0, 1, 2**30 - 1, 2**29])
    assert lk.reward_head(hidden, torch.ones(1, 16), index=index).tolist() == [[120.0]] * 4


class TestSeparateModels:
    def inputs(self, generator: Generator) -> tuple[list[Tensor], list[Tensor], Tensor]:
        hidden = [torch.randn(3, s, h, generator=generator) for s, h in ((5, 16), (5, 40), (7, 9))]
        weight = [
            torch.randn(1, 16, generator=generator),
            torch.randn(40, generator=generator),
            torch.randn(1, 9, generator=generator),
        ]
        return hidden, weight, torch.randn(3, generator=generator)

    def test_each_is_as_if_alone(self, backend: str, generator: Generator) -> None:
        hidden, weight, bias = self.inputs(generator)
        index = torch.tensor([0, 2, 4])
        mask = [torch.tensor(MASKS["holes"]), None, torch.ones(3, 7).tril(2)]
        for options in ({"index": index}, {"attention_mask": mask}, {}):
            scores = lk.reward_head(hidden, weight, bias, **options)
            assert scores.shape == (3, 3)
            for k in range(3):
                own = {
                    name: value[k] if isinstance(value, list) else value for name, value in options.items()
                }
                alone = lk.reward_head(hidden[k], weight[k].reshape(1, -1), bias[k : k + 1], **own)
                assert torch.equal(scores[:, k : k + 1], alone)
        listed = lk.reward_head(hidden, weight, [bias[0], bias[1:2], None])
        torch.testing.assert_close(listed[:, :2], lk.reward_head(hidden, weight, bias)[:, :2], rtol=0, atol=0)

    def test_gradients(self, backend: str, generator: Generator) -> None:
        hidden, weight, bias = self.inputs(generator)
        upstream = torch.randn(3, 3, generator=generator)
        sizes = [h.double().abs() @ w.double().abs().flatten() for h, w in zip(hidden, weight, strict=True)]
        check_against_fp64(
            lambda *t: lk.reward_head(list(t[:3]), list(t[3:6]), t[6]),
            upstream,
            [*hidden, *weight, bias],
            RTOL,
            atol=1e-6 * float(max(size.max() for size in sizes) + bias.abs().max()),
        )

    def test_packed_and_every_position(self, backend: str, generator: Generator) -> None:
        hidden = [torch.randn(9, h, generator=generator) for h in (4, 6)]
        weight = [torch.randn(h, generator=generator) for h in (4, 6)]
        ends = [torch.tensor([0, 4, 9]), torch.tensor([0, 9, 9])]
        scores = lk.reward_head(hidden, weight, cu_seqlens=ends)
        assert scores.shape == (2, 2) and scores[1, 1].isnan() and scores.isnan().sum() == 1
        assert lk.reward_head(hidden, weight, cu_seqlens=ends[0]).isfinite().all()
        assert lk.reward_head(hidden, weight, pool="none").shape == (9, 2)


@given(data=st.data(), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_ragged(data: st.DataObject, seed: int) -> None:
    """Padded left, padded right and packed are the same sequences, so the same scores."""
    generator = torch.Generator().manual_seed(seed)
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    rows = [torch.randn(length, 12, generator=generator) for length in lengths]
    weight = torch.randn(2, 12, generator=generator)
    most = max(lengths) + data.draw(st.integers(0, 2))
    right, left = (torch.full((len(rows), most, 12), torch.nan) for _ in range(2))
    right_mask, left_mask = (torch.zeros(len(rows), most, dtype=torch.int64) for _ in range(2))
    for b, row in enumerate(rows):
        n = row.shape[0]
        right[b, :n], right_mask[b, :n] = row, 1
        left[b, most - n :], left_mask[b, most - n :] = row, 1
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = lk.reward_head(torch.cat(rows), weight, cu_seqlens=ends)
    assert packed.isnan().any(-1).tolist() == [length == 0 for length in lengths]
    for hidden, mask in ((right, right_mask), (left, left_mask)):
        scores = lk.reward_head(hidden, weight, attention_mask=mask)
        torch.testing.assert_close(scores, packed, rtol=0, atol=0, equal_nan=True)


def test_modes(backend: str, generator: Generator) -> None:
    hidden = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    weight = torch.randn(2, 8, generator=generator)
    expected = lk.reward_head(hidden, weight)
    with torch.inference_mode():
        assert torch.equal(lk.reward_head(hidden, weight), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lk.reward_head(hidden, weight), expected)
    (first,) = torch.autograd.grad(expected.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="reward_head has a first derivative only"):
        first.sum().backward()


def test_compile(backend: str, generator: Generator) -> None:
    weight = torch.randn(2, 8, generator=generator)

    def call(batch: int, length: int) -> tuple[Tensor, ...]:
        hidden = torch.randn(batch, length, 8, generator=generator).requires_grad_()
        return (
            hidden,
            weight.clone().requires_grad_(),
            (torch.rand(batch, length, generator=generator) < 0.9).long(),
        )

    calls = [call(3, 4), call(5, 6), call(4, 9)]
    compile_once(lambda h, w, m: [lk.reward_head(h, w, attention_mask=m).nan_to_num()], calls)
    compile_once(lambda h, w, m: [lk.reward_head(h, w, attention_mask=m, pool="none")], calls[:2])


@needs_native
def test_opcheck(generator: Generator) -> None:
    hidden, weight = torch.randn(3, 5, 8, generator=generator), torch.randn(2, 8, generator=generator)
    mask, index = torch.tensor(MASKS["holes"]), torch.tensor([0, 4, 2])
    packed, ends = hidden.flatten(0, 1), torch.tensor([0, 4, 15])
    ops = torch.ops.lsc_kernels
    for rows, where, every, shape in (
        (hidden, (mask, None, None), False, (3, 2)),
        (hidden, (None, index, None), False, (3, 2)),
        (packed, (None, None, ends), False, (2, 2)),
        (hidden, (mask, None, None), True, (3, 5, 2)),
    ):
        torch.library.opcheck(ops.reward_head_forward, (rows, weight, weight[:, 0].clone(), *where, every))
        for wanted in ((True, True, True), (False, True, False)):
            torch.library.opcheck(
                ops.reward_head_backward, (torch.ones(shape), rows, weight, *where, every, *wanted)
            )


H, W, N = torch.zeros(2, 3, 4), torch.zeros(1, 4), torch.zeros(6, 4)
MODELS = ([H, H], [W, W])
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: lk.reward_head(H.numpy(), W),
        TypeError,
        "hidden and weight must be two tensors.*got ndarray and Tensor",
    ),
    (
        lambda: lk.reward_head([H], W),
        TypeError,
        "hidden and weight must be .* two lists of tensors; got list and Tensor",
    ),
    (lambda: lk.reward_head(H.long(), W), TypeError, "hidden must be float32"),
    (lambda: lk.reward_head(H, W.int()), TypeError, "weight must be float32"),
    (lambda: lk.reward_head(H, W, W[0, :1].int()), TypeError, "bias must be float32"),
    (lambda: lk.reward_head(H, W, 1.0), TypeError, r"bias must be a tensor \[K\] or None; got float"),
    (lambda: lk.reward_head(H, W[0]), ValueError, r"weight must be \[K, H\] with K > 0; got \[4\]"),
    (lambda: lk.reward_head(H, W[:0]), ValueError, r"weight must be \[K, H\] with K > 0; got \[0, 4\]"),
    (
        lambda: lk.reward_head(H, W[:, :3]),
        ValueError,
        r"weight must be \[K, H\] with H = 4; got \[1, 3\]",
    ),
    (lambda: lk.reward_head(H, W, torch.zeros(2)), ValueError, r"bias must be \[K\], \[1\]; got \[2\]"),
    (
        lambda: lk.reward_head(N, W),
        ValueError,
        r"hidden must be \[B, S, H\], or \[N, H\] with cu_seqlens; got \[6, 4\]",
    ),
    (
        lambda: lk.reward_head(torch.tensor(1.0), W, pool="none"),
        ValueError,
        r"hidden must be \[..., H\]; got a scalar",
    ),
    (lambda: lk.reward_head(H, W, pool="mean"), ValueError, "pool must be 'last' or 'none'; got 'mean'"),
    (
        lambda: lk.reward_head(H, W.to("meta")),
        ValueError,
        "weight must be on the device of hidden, .*; got meta",
    ),
    (lambda: lk.reward_head(H, W, W[0, :1].to("meta")), ValueError, "bias must be on the device of hidden"),
    (
        lambda: lk.reward_head([H, H.to("meta")], [W[0], W[0].to("meta")]),
        ValueError,
        r"hidden\[1\] must be on the device of hidden\[0\]",
    ),
    (
        lambda: lk.reward_head(H, W, attention_mask=[[1, 1, 1]]),
        TypeError,
        "attention_mask must be a tensor.*got list",
    ),
    (
        lambda: lk.reward_head(H, W, attention_mask=torch.ones(2, 4)),
        ValueError,
        r"attention_mask must have .*\[2, 3\]; got \[2, 4\]",
    ),
    (
        lambda: lk.reward_head(H, W, attention_mask=torch.ones(2, 3, device="meta")),
        ValueError,
        "attention_mask must be on .*; got meta",
    ),
    (lambda: lk.reward_head(H, W, index=[0, 1]), TypeError, "index must be a tensor; got list"),
    (
        lambda: lk.reward_head(H, W, index=torch.zeros(2)),
        TypeError,
        "index must be int64 or int32; got torch.float32",
    ),
    (
        lambda: lk.reward_head(H, W, index=torch.zeros(3).long()),
        ValueError,
        r"index must have .*\[2\]; got \[3\]",
    ),
    (
        lambda: lk.reward_head(H, W, index=torch.tensor([0, 3])),
        IndexError,
        r"index must be in \[0, S\) with S = 3; got 3",
    ),
    (
        lambda: lk.reward_head(H, W, index=torch.tensor([-1, 0])),
        IndexError,
        r"index must be in \[0, S\) with S = 3; got -1",
    ),
    (
        lambda: lk.reward_head(H, W, index=torch.zeros(2).long(), pool="none"),
        ValueError,
        "index cannot be combined with pool='none'",
    ),
    (
        lambda: lk.reward_head(N, W, index=torch.zeros(1).long(), cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        "index cannot be combined with cu_seqlens",
    ),
    (
        lambda: lk.reward_head(N, W, attention_mask=torch.ones(6), cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        "attention_mask cannot be combined with cu_seqlens",
    ),
    (
        lambda: lk.reward_head(H, W, cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"hidden must be packed, \[N, H\]",
    ),
    (
        lambda: lk.reward_head(N, W, cu_seqlens=torch.tensor([0.0, 6.0])),
        TypeError,
        "cu_seqlens must be int64 or int32",
    ),
    (
        lambda: lk.reward_head(N, W, cu_seqlens=torch.tensor([[0, 6]])),
        ValueError,
        r"cu_seqlens must be \[B\+1\]",
    ),
    (
        lambda: lk.reward_head(N, W, cu_seqlens=torch.zeros(0).long()),
        ValueError,
        r"cu_seqlens must be \[B\+1\]",
    ),
    *(
        (
            lambda c=c: lk.reward_head(N, W, cu_seqlens=torch.tensor(c)),
            ValueError,
            "cu_seqlens must rise from 0 to N = 6",
        )
        for c in ([1, 6], [0, 5], [0, 7], [0, 4, 3, 6], [0, -1, 6])
    ),
    (lambda: lk.reward_head([], []), ValueError, "hidden must have at least one reward model"),
    (
        lambda: lk.reward_head([H, H], [W]),
        ValueError,
        "weight must have one entry per reward model, 2; got 1",
    ),
    (lambda: lk.reward_head([H, None], [W, W]), TypeError, r"hidden\[1\] must be a tensor; got NoneType"),
    (
        lambda: lk.reward_head([H, H], [W, torch.zeros(2, 4)]),
        ValueError,
        r"weight\[1\] must be \[1, H\] or \[H\]; got \[2, 4\]",
    ),
    (lambda: lk.reward_head([H, H], [W, W[:, :3]]), ValueError, r"weight\[1\] must be \[K, H\] with H = 4"),
    (
        lambda: lk.reward_head([H, H[:1]], [W, W]),
        ValueError,
        r"hidden\[1\] must give as many scores as hidden\[0\], \[2\]; got \[1\]",
    ),
    (lambda: lk.reward_head(*MODELS, torch.zeros(3)), ValueError, r"bias must have .*\[2\]; got \[3\]"),
    (
        lambda: lk.reward_head(*MODELS, [None]),
        ValueError,
        "bias must have one entry per reward model, 2; got 1",
    ),
    (
        lambda: lk.reward_head(*MODELS, attention_mask="1"),
        TypeError,
        "attention_mask must be a tensor, a list of 2 or None; got str",
    ),
    (
        lambda: lk.reward_head(*MODELS, attention_mask=[None, torch.ones(2, 2)]),
        ValueError,
        r"attention_mask\[1\] must have",
    ),
    (
        lambda: lk.reward_head(*MODELS, index=[None, torch.zeros(1).long()]),
        ValueError,
        r"index\[1\] must have",
    ),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(backend: str, call: Callable[[], Any], error: type[Exception], message: str) -> None:
    if "cuda" in backend and (error is IndexError or "must rise" in message):
        # no host waits for a GPU: the sequence scores NaN, unless what is wrong lies elsewhere
        call()
        return
    with pytest.raises(error, match=message):
        call()


def test_index_out_of_range_when_compiled(generator: Generator) -> None:
    """The compiled graph never reads outside either: an error, or NaN where the graph cannot raise it."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda i: lk.reward_head(H, W, index=i), fullgraph=True, backend="aot_eager")
    try:
        assert compiled(torch.tensor([0, 3]))[1].isnan()
    except IndexError as error:
        assert "index must be in" in str(error)
    torch._dynamo.reset()
