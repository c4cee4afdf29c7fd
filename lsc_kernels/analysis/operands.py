"""What analyses take beside scores, checked like the arguments of the ops, in fp64 and in the scores' shape."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lsc_kernels.ops import _checks
from lsc_kernels.ops.aggregate_rewards import check_properties
from lsc_kernels.ops.lsc_transform import operand

CPU = torch.device("cpu")


def names_of(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """K names; those that are not given are numbers."""
    return check_properties(count, names, "propagate", CPU) or tuple(f"property {k}" for k in range(count))


def spread(name: str, value: float | Tensor | None, scores: Tensor) -> Tensor:
    """An operand of ``lk.aggregate_rewards`` on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    if name != "weights":
        value = operand(name, value, CPU)
    elif value is not None:
        value = exponents = _checks.floating(name, value)
        if not bool(((exponents >= 0) & (exponents < math.inf)).all()):
            raise ValueError(
                f"weights must be finite and >= 0: exponents of probabilities; got {exponents.tolist()}"
            )
    wide = torch.as_tensor(1.0 if value is None else value, dtype=torch.float64)
    try:
        return wide.broadcast_to(scores.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast against scores, {list(scores.shape)}; got {list(wide.shape)}"
        ) from None
