"""The log-sigmoid-centred transform: the definition.

With z = (reward - reference_reward) / scale and floor f:

    u     = log(f + (1 - f) sigmoid(z))
    du/dz = sigmoid(-z) (1 - f) sigmoid(z) / (f + (1 - f) sigmoid(z))
"""

from __future__ import annotations

import torch
from torch import Tensor


def centred(reward: Tensor, reference_reward: float | Tensor, scale: float | Tensor) -> Tensor:
    """z in fp64."""
    return (reward.double() - double(reference_reward)) / double(scale)


def double(value: float | Tensor) -> float | Tensor:
    return value.double() if isinstance(value, Tensor) else value


def log_sigmoid(z: Tensor) -> Tensor:
    """log sigmoid(z), accurate to its own size at both ends."""
    return z.clamp_max(0.0) - torch.log1p(torch.exp(-z.abs()))


def utility(z: Tensor, floor: float | Tensor) -> tuple[Tensor, Tensor]:
    """u and du/dz."""
    if not isinstance(floor, Tensor) and floor == 0.0:
        return log_sigmoid(z), torch.sigmoid(-z)
    floor = torch.as_tensor(floor, dtype=torch.float64, device=z.device)
    shortfall = (1.0 - floor) * torch.sigmoid(-z)  # 1 - probability
    judged_good = torch.log1p(-floor) + log_sigmoid(z)
    u = torch.where(shortfall < 0.5, torch.log1p(-shortfall), torch.logaddexp(floor.log(), judged_good))
    share = torch.where(floor == 0.0, 1.0, torch.exp(judged_good - u))
    return u, torch.sigmoid(-z) * share


def chain(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor, 0 where nobody asked for a gradient even if the factor is NaN or inf."""
    return torch.where(grad == 0, 0.0, grad * factor)


def forward(
    reward: Tensor, reference_reward: float | Tensor, scale: float | Tensor, floor: float | Tensor
) -> Tensor:
    """``reward`` has the result's shape, the others too, or [its last dimension], or none."""
    u, _ = utility(centred(reward, reference_reward, scale), floor)
    return u if has_fp64(reward, reference_reward, scale, floor) else u.float()


def backward(
    grad: Tensor,
    reward: Tensor,
    reference_reward: float | Tensor,
    scale: float | Tensor,
    floor: float | Tensor,
    want_reference: bool,
    want_scale: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """To reward, reference_reward and scale: (1, -1, -z) du/dz / scale."""
    z = centred(reward, reference_reward, scale)
    _, slope = utility(z, floor)
    to_z = chain(grad.double(), slope)
    to_reward = to_z / double(scale)
    to_reference = reduced(-to_reward, reference_reward) if want_reference else None
    to_scale = reduced(-chain(to_reward, z), scale) if want_scale else None
    return to_reward.to(reward.dtype), to_reference, to_scale


def reduced(grad: Tensor, operand: float | Tensor) -> Tensor:
    """A gradient summed over the dimensions along which ``operand`` was broadcast, in its dtype."""
    assert isinstance(operand, Tensor)
    return grad.sum_to_size(operand.shape).to(operand.dtype)


def has_fp64(*operands: float | Tensor | None) -> bool:
    return any(isinstance(operand, Tensor) and operand.dtype is torch.float64 for operand in operands)
