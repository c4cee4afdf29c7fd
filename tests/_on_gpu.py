"""Runs the tests' cases on a GPU: the public functions move their tensors there and their results back.

The inputs, the truth and the comparison stay on the CPU, so a case is the same for every backend. Autograd goes through
the moves. A tensor without a gradient keeps its strides, also those of an expanded tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lsc_kernels as lk

OPS = (
    "aggregate_rewards",
    "bradley_terry_loss",
    "discounted_returns",
    "gae",
    "group_advantages",
    "kl_from_logprobs",
    "lsc_transform",
    "masked_whiten",
    "reward_head",
    "shaped_rewards",
    "token_kl",
    "token_logprobs",
    "token_rewards",
)


def to_gpu(tensor: Tensor) -> Tensor:
    if tensor.is_meta:  # on another device, on purpose
        return tensor
    if tensor.requires_grad or tensor.is_contiguous() or torch.compiler.is_compiling():
        return tensor.cuda()
    storage = tensor.untyped_storage()
    everything = torch.empty(0, dtype=tensor.dtype).set_(storage).cuda()
    return everything.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


def through_gpu(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def run(*arguments: Any, **options: Any) -> Any:
        arguments, options = tree_map_only(Tensor, to_gpu, (arguments, options))
        return tree_map_only(Tensor, Tensor.cpu, op(*arguments, **options))

    return run


def use_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPS:
        monkeypatch.setattr(lk, name, through_gpu(getattr(lk, name)))
