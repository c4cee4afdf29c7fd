"""kl_from_logprobs through the compiled kernels, which take float32: other dtypes are converted on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import KLOptions

KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")
"""In the order of ``Kind`` in csrc/math/kl.h."""

_ops = torch.ops.lsc_kernels


def arguments(options: KLOptions) -> tuple[int, bool, float, float, float, float]:
    """KL options as the native ops take them."""
    return KINDS.index(options.kind), *options[1:]


def float_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
) -> Tensor:
    result: Tensor = _ops.kl_from_logprobs_forward(
        logprobs.float(), ref_logprobs.float(), mask, float_or_none(old_logprobs), *arguments(options)
    )
    return result


def backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
) -> tuple[Tensor, Tensor]:
    to_logprobs, to_ref = _ops.kl_from_logprobs_backward(
        grad, logprobs.float(), ref_logprobs.float(), mask, float_or_none(old_logprobs), *arguments(options)
    )
    return to_logprobs.to(logprobs.dtype), to_ref.to(ref_logprobs.dtype)


@torch.library.register_fake("lsc_kernels::kl_from_logprobs_forward")
def _(logprobs: Tensor, *_: object) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


@torch.library.register_fake("lsc_kernels::kl_from_logprobs_backward")
def _(grad: Tensor, logprobs: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape)
