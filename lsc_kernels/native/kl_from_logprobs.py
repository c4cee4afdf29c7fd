"""kl_from_logprobs through the compiled kernels, which take float32: other dtypes are converted on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from lsc_kernels.eager.kl_from_logprobs import Interval, KLOptions

KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")
"""In the order of ``Kind`` in csrc/math/kl.h."""

_ops = torch.ops.lsc_kernels


def arguments(options: KLOptions) -> tuple[int, bool, Interval | None, Interval | None]:
    """KL options as the native ops take them."""
    kind, straight_through, log_ratio_clamp, kl_clamp = options
    return KINDS.index(kind), straight_through, log_ratio_clamp, kl_clamp


def float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float32 else tensor.float()


def float_or_none(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else float32(tensor)


def forward(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
) -> Tensor:
    result: Tensor = _ops.kl_from_logprobs_forward.default(
        float32(logprobs), float32(ref_logprobs), mask, float_or_none(old_logprobs), *arguments(options)
    )
    return result


def backward(
    grad: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    old_logprobs: Tensor | None,
    options: KLOptions,
    want_logprobs: bool,
    want_ref: bool,
) -> tuple[Tensor | None, Tensor | None]:
    to_logprobs, to_ref = _ops.kl_from_logprobs_backward.default(
        *(grad, float32(logprobs), float32(ref_logprobs), mask, float_or_none(old_logprobs)),
        *(*arguments(options), want_logprobs, want_ref),
    )
    return (
        to_logprobs.to(logprobs.dtype) if want_logprobs else None,
        to_ref.to(ref_logprobs.dtype) if want_ref else None,
    )


@torch.library.register_fake("lsc_kernels::kl_from_logprobs_forward")
def _(logprobs: Tensor, *_: object) -> Tensor:
    return logprobs.new_empty(logprobs.shape)


@torch.library.register_fake("lsc_kernels::kl_from_logprobs_backward")
def _(grad: Tensor, logprobs: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    to_logprobs, to_ref = (logprobs.new_empty(logprobs.shape if want else (0,)) for want in rest[-2:])
    return to_logprobs, to_ref
