"""The reward side as modules, for models that are built, saved and moved as such."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsc_kernels.formula import Formula
from lsc_kernels.ops.aggregate_rewards import aggregate_rewards
from lsc_kernels.ops.reward_head import reward_head


class RewardHead(nn.Module):
    r"""K scores of an output from its last hidden states: :func:`lsc_kernels.reward_head` with its parameters.

    Args:
        hidden_size: H.
        num_properties: K.
        bias: whether each property has one.
        device, dtype: of the parameters.

    Shape:
        hidden [B, S, H], or packed [N, H] with ``cu_seqlens``, to scores [B, K]; with ``pool="none"`` [..., K].

    Attributes:
        weight [K, H], initialised with standard deviation :math:`1/\sqrt{H + 1}` (N. Stiennon et al.,
        arXiv:2009.01325); bias [K] at 0, or None.

    Example:
        >>> import torch, lsc_kernels as lk
        >>> head = lk.nn.RewardHead(16, 3)
        >>> head(torch.randn(2, 5, 16), attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        hidden_size: int,
        num_properties: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_properties", num_properties)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.weight = nn.Parameter(torch.empty(num_properties, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_properties, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(self.weight.shape[1] + 1) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None = None,
        index: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        pool: str = "last",
    ) -> Tensor:
        return reward_head(
            *(hidden, self.weight, self.bias),
            attention_mask=attention_mask,
            index=index,
            cu_seqlens=cu_seqlens,
            pool=pool,
        )

    def extra_repr(self) -> str:
        properties, hidden_size = self.weight.shape
        return f"hidden_size={hidden_size}, num_properties={properties}, bias={self.bias is not None}"


class RewardAggregator(nn.Module):
    """One utility from K scores: :func:`lsc_kernels.aggregate_rewards` with its options, and its numbers as buffers.

    References, scales, weights and floors move with the module and are saved with it; they are not trained.

    Args:
        formula: which outputs are good, a :class:`Formula` or a string; None is all properties.
        names: of the K properties, in the order of the scores' columns.
        reference_reward: [K] or a number: what a call takes that gives none of its own.
        weights, scale, floor: [K] or numbers; None is 1, 1 and 0.
        missing: what a NaN score means, as in :func:`aggregate_rewards`.

    Shape:
        scores [..., K] to utility [...].

    Example:
        >>> import torch, lsc_kernels as lk
        >>> utility = lk.nn.RewardAggregator("helpful & ~verbose", ["helpful", "verbose"], scale=[1.0, 2.0])
        >>> utility
        RewardAggregator(helpful & ~verbose, names=['helpful', 'verbose'], missing='propagate')
        >>> utility(torch.tensor([[2.0, -1.0]]), torch.tensor([0.5, 0.0])).shape
        torch.Size([1])
    """

    reference_reward: Tensor
    scale: Tensor
    floor: Tensor
    weights: Tensor | None

    def __init__(
        self,
        formula: Formula | str | None = None,
        names: Sequence[str] | None = None,
        *,
        reference_reward: float | Sequence[float] | Tensor = 0.0,
        weights: float | Sequence[float] | Tensor | None = None,
        scale: float | Sequence[float] | Tensor = 1.0,
        floor: float | Sequence[float] | Tensor = 0.0,
        missing: str = "propagate",
    ) -> None:
        super().__init__()
        self.formula = Formula.parse(formula) if isinstance(formula, str) else formula
        self.names = None if names is None else list(names)
        self.missing = missing
        for name, value in (("reference_reward", reference_reward), ("scale", scale), ("floor", floor)):
            self.register_buffer(name, _numbers(value))
        self.register_buffer("weights", None if weights is None else _numbers(weights))

    def forward(self, scores: Tensor, reference_reward: float | Tensor | None = None) -> Tensor:
        return aggregate_rewards(
            scores,
            self.reference_reward if reference_reward is None else reference_reward,
            formula=self.formula,
            names=self.names,
            weights=self.weights,
            scale=self.scale,
            floor=self.floor,
            missing=self.missing,
        )

    def extra_repr(self) -> str:
        good = "all properties" if self.formula is None else str(self.formula)
        return f"{good}, names={self.names}, missing={self.missing!r}"


def _numbers(value: float | Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().clone()
