"""token_logprobs: log-probabilities and entropy, forward, and with the gradient to the logits."""

from __future__ import annotations

from typing import Any

import _logits
import _truth
import pytest
import torch
from _measure import Outputs
from torch import Generator, Tensor

import lsc_kernels as lk


def ours(logits: Tensor, actions: Tensor) -> Outputs:
    return lk.token_logprobs(logits, actions)._asdict()


def truth(logits: Tensor, actions: Tensor) -> Outputs:
    parts = [
        _truth.token_logprobs(x.double(), a) for x, a in zip(logits.split(16), actions.split(16), strict=True)
    ]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in ("logprobs", "entropy")}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", _logits.DTYPES, ids=str)
def test_token_logprobs(
    compare: Any, size: Any, generator: Generator, dtype: torch.dtype, backward: bool
) -> None:
    logits, _, actions = _logits.logits(generator, size.rows, size.vocabulary, dtype)
    compare(
        "token_logprobs",
        ours=ours,
        textbook=_logits.textbook_logprobs,
        truth=truth,
        inputs=(logits, actions),
        reads=(logits,),
        shape={"N": size.rows, "V": size.vocabulary},
        dtype=dtype,
        leaf=0 if backward else None,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_call_overhead(overhead: Any, generator: Generator, backward: bool) -> None:
    logits, _, actions = _logits.logits(generator, 1, 8, torch.float32)
    logits.requires_grad_()
    upstream = torch.ones(1)

    def call(function: Any) -> Any:
        def run() -> object:
            logprobs = function(logits, actions)["logprobs"]
            return torch.autograd.grad(logprobs, logits, upstream) if backward else logprobs

        return run

    step = "forward + backward" if backward else "forward with autograd"
    overhead("token_logprobs", step, call(ours), call(_logits.textbook_logprobs))
