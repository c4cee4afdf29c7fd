"""token_kl: every output, forward, and with the gradient to the policy's logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import _logits
import pytest
import torch
from torch import Generator

import lsc_kernels as lk


@pytest.mark.parametrize("reference", _logits.REFERENCES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", _logits.DTYPES, ids=str)
@pytest.mark.parametrize("kl", _logits.TEXTBOOK)
def test_token_kl(
    compare: Any, size: Any, generator: Generator, kl: str, dtype: torch.dtype, backward: bool, reference: str
) -> None:
    policy, ref, actions = _logits.logits(generator, size.rows, size.vocabulary, dtype, reference)
    compare(
        "token_kl",
        case=f"{kl}, {reference} reference",
        ours=partial(_logits.token_kl, kl=kl),
        textbook=_logits.TEXTBOOK[kl],
        truth=partial(_logits.true_token_kl, kl=kl),
        inputs=(policy, ref, actions),
        reads=(policy, ref),
        shape={"N": size.rows, "V": size.vocabulary},
        dtype=dtype,
        leaf=0 if backward else None,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_call_overhead(overhead: Any, generator: Generator, backward: bool) -> None:
    policy, ref, actions = _logits.logits(generator, 1, 8, torch.float32)
    policy.requires_grad_()
    upstream = torch.ones(1)

    def ours() -> object:
        kl = lk.token_kl(policy, ref, actions).kl
        return torch.autograd.grad(kl, policy, upstream) if backward else kl

    def textbook() -> object:
        kl = _logits.textbook_k3(policy, ref, actions)["kl"]
        return torch.autograd.grad(kl, policy, upstream) if backward else kl

    overhead("token_kl", "forward + backward" if backward else "forward with autograd", ours, textbook)
