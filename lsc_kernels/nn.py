"""The reward side as modules, for models that are built, saved and moved as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lsc_kernels.formula import Formula
from lsc_kernels.ops.aggregate_rewards import aggregate_rewards
from lsc_kernels.ops.reward_head import reward_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RewardHead(nn.Module):
    r"""K scores of an output from its last hidden states: :func:`lsc_kernels.reward_head` with its parameters.

    Args:
        hidden_size: H.
        num_properties: K.
        bias: whether each property has one.
        device, dtype: of the parameters.

    Shape:
        hidden [B, S, H], or packed [N, H] with ``cu_seqlens``, to scores [B, K]; with ``pool="none"`` [..., K]. Of K
        reward models with bodies of their own: a list of K such tensors, one column each.

    Attributes:
        weight [K, H], initialised with standard deviation :math:`1/\sqrt{H + 1}` (N. Stiennon et al.,
        arXiv:2009.01325); bias [K] at 0, or None. Where reward models differ in H, a list of K weights [1, H_k].

    Example:
        >>> import torch, lsc_kernels as lk
        >>> head = lk.nn.RewardHead(16, 3)
        >>> head(torch.randn(2, 5, 16), attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])).shape
        torch.Size([2, 3])
    """

    weight: nn.Parameter | nn.ParameterList

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

    @classmethod
    def from_sequence_classifiers(cls, models: PreTrainedModel | Sequence[PreTrainedModel]) -> RewardHead:
        """The head of Hugging Face reward models (``AutoModelForSequenceClassification``): a copy of their weights.

        Such a model scores every position and then takes the last one whose id is not the padding token's. Where that
        token also ends a text, it takes the one before. This head reads the last position that ``attention_mask``
        counts, on whichever side the padding is, and computes no other score.

        Args:
            models: one model, with a label for each of the K properties; or K models with one label each, whose hidden
                states then come as a list.

        Returns:
            A head in the models' dtype, on the device of the first one's.

        Raises:
            ValueError: no model; one whose head is not the linear layer ``score`` on a last token's hidden state, as
                decoders have it (encoders read the first token, through layers of their own); one of several that has
                more than one label, or no bias where others have one.

        Example:
            >>> import torch, lsc_kernels as lk
            >>> from transformers import LlamaConfig, LlamaForSequenceClassification
            >>> size = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
            >>> model = LlamaForSequenceClassification(LlamaConfig(**size, num_attention_heads=2, num_labels=3))
            >>> head = lk.nn.RewardHead.from_sequence_classifiers(model)
            >>> ids, mask = torch.randint(50, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
            >>> hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
            >>> head(hidden, attention_mask=mask).shape
            torch.Size([2, 3])
        """
        several = list(models) if isinstance(models, Sequence) else [models]
        if not several:
            raise ValueError("models must have at least one reward model; got none")
        layers = [_linear_head(model, f"models[{k}]", len(several) > 1) for k, model in enumerate(several)]
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        if biases and len(biases) != len(layers):
            raise ValueError(
                f"all models must have a bias, or none; got {len(biases)} of {len(layers)} with one"
            )
        one_size = len({weight.shape[1] for weight in weights}) == 1
        head = cls(weights[0].shape[1], sum(len(weight) for weight in weights), device="meta")
        to = weights[0].device
        together = [weight.to(to, copy=True) for weight in weights]
        if one_size:
            head.weight = nn.Parameter(torch.cat(together))
        else:
            del head.weight  # a list of parameters is no parameter
            head.weight = nn.ParameterList([nn.Parameter(weight) for weight in together])
        head.bias = nn.Parameter(torch.cat([bias.to(to, copy=True) for bias in biases])) if biases else None
        return head

    def reset_parameters(self) -> None:
        for weight in _each(self.weight):
            nn.init.normal_(weight, std=(weight.shape[1] + 1) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden: Tensor | Sequence[Tensor],
        *,
        attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        index: Tensor | Sequence[Tensor | None] | None = None,
        cu_seqlens: Tensor | Sequence[Tensor | None] | None = None,
        pool: str = "last",
    ) -> Tensor:
        weight: Tensor | list[Tensor]
        if isinstance(self.weight, nn.ParameterList):
            weight = list(self.weight)
        else:
            weight = self.weight if isinstance(hidden, Tensor) else list(self.weight.unbind(0))
        return reward_head(
            *(hidden, weight, self.bias),
            attention_mask=attention_mask,
            index=index,
            cu_seqlens=cu_seqlens,
            pool=pool,
        )

    def extra_repr(self) -> str:
        weights = _each(self.weight)
        sizes = [weight.shape[1] for weight in weights]
        properties = sum(len(weight) for weight in weights)
        hidden_size = sizes[0] if len(sizes) == 1 else sizes
        return f"hidden_size={hidden_size}, num_properties={properties}, bias={self.bias is not None}"


def _each(weight: nn.Parameter | nn.ParameterList) -> list[Tensor]:
    return list(weight) if isinstance(weight, nn.ParameterList) else [weight]


def _linear_head(model: PreTrainedModel, name: str, several: bool) -> nn.Linear:
    """The layer ``score`` of a reward model."""
    layer = getattr(model, "score", None)
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        found = "none" if layer is None else type(layer).__name__
        raise ValueError(
            f"{name} must have its head in a linear layer `score`, as decoders for sequence classification do; "
            f"{type(model).__name__} has {found}. Take the scores of its own forward pass"
        )
    if several and layer.weight.shape[0] != 1:
        raise ValueError(
            f"{name} must have one label, being one of several models; {type(model).__name__} has "
            f"{layer.weight.shape[0]}"
        )
    return layer


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
