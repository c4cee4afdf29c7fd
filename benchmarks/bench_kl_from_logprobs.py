"""kl_from_logprobs, k3: from log-probabilities that are already there."""

from __future__ import annotations

from typing import Any

import _truth
import pytest
import torch
from _measure import Outputs
from torch import Generator, Tensor

import lsc_kernels as lk


def ours(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Outputs:
    return {"kl": lk.kl_from_logprobs(logprobs, ref_logprobs, mask=mask)}


def textbook(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Outputs:
    d = logprobs - ref_logprobs
    return {"kl": torch.where(mask, torch.exp(-d) - 1 + d, 0.0)}


def truth(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Outputs:
    return {"kl": _truth.kl_from_logprobs(logprobs.double(), ref_logprobs.double(), mask=mask).kl}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_kl_from_logprobs(compare: Any, size: Any, generator: Generator, backward: bool) -> None:
    shape = (size.sequences, size.length)
    logprobs = -5 * torch.rand(shape, generator=generator)
    ref_logprobs = logprobs + 0.1 * torch.randn(shape, generator=generator)
    mask = torch.arange(size.length) < torch.randint(
        1, size.length + 1, (size.sequences, 1), generator=generator
    )
    compare(
        "kl_from_logprobs",
        case="k3",
        ours=ours,
        textbook=textbook,
        truth=truth,
        inputs=(logprobs, ref_logprobs, mask),
        reads=(logprobs, ref_logprobs),
        shape={"B": size.sequences, "T": size.length},
        dtype=torch.float32,
        leaf=0 if backward else None,
    )
