"""Scores by the names of their properties, as trainers and their configuration files have them, to one utility."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lsc_kernels.formula import Formula
from lsc_kernels.nn import RewardAggregator
from lsc_kernels.reference import ReferenceTable

ByName = Mapping[str, Any]
OPTIONS = ("properties", "reference_reward", "formula", "weights", "scale", "floor", "missing")


class GroupScalingWarning(UserWarning):
    """A trainer divides by the spread within each group, which undoes the LSC transform."""


class PropertyRewards:
    r"""The log-probability that an output is good, from the scores of its properties by name.

    Args:
        properties: the K names.
        reference_reward: what is good enough: a number, K numbers or a number for each name; the path of a
            :class:`lsc_kernels.reference.ReferenceTable` or the table itself, looked up by prompt; None, every call
            brings its own.
        formula, weights, scale, floor, missing: as in :func:`lsc_kernels.aggregate_rewards`; weights, scale and floor
            are numbers, K numbers or a number for each name.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: no properties, a name that is none of them, a table of other properties.

    Example:
        >>> rewards = PropertyRewards(["helpful", "harmless"], reference_reward={"helpful": 1.0, "harmless": 0.0})
        >>> rewards([{"helpful": 3.0, "harmless": 0.0}, {"helpful": -1.0, "harmless": 2.0}])
        tensor([-0.8201, -2.2539])
    """

    def __init__(
        self,
        properties: Sequence[str],
        *,
        reference_reward: Any = None,
        formula: Formula | str | None = None,
        weights: Any = None,
        scale: Any = 1.0,
        floor: Any = 0.0,
        missing: str = "propagate",
    ) -> None:
        if isinstance(properties, str) or not isinstance(properties, Sequence) or not properties:
            raise ValueError(f"properties must be a list of names, of at least one; got {properties!r}")
        self.properties = tuple(str(name) for name in properties)
        self.table: ReferenceTable | None = None
        if isinstance(reference_reward, str):
            reference_reward = ReferenceTable.load(reference_reward)
        if isinstance(reference_reward, ReferenceTable):
            self.table = reference_reward
            absent = [name for name in self.properties if name not in reference_reward.properties]
            if absent:
                there = ", ".join(reference_reward.properties)
                raise ValueError(f"the table of references has no property {absent[0]!r}; it has {there}")
            self._columns = [reference_reward.properties.index(name) for name in self.properties]
            reference_reward = None
        self.reference_reward = (
            None if reference_reward is None else self._numbers("reference_reward", reference_reward)
        )
        self._aggregate = RewardAggregator(
            formula,
            self.properties,
            weights=None if weights is None else self._numbers("weights", weights),
            scale=self._numbers("scale", scale),
            floor=self._numbers("floor", floor),
            missing=missing,
        )
        self._aggregate(
            torch.zeros(1, len(self.properties))
        )  # a formula that does not fit is told here, not in a step

    @classmethod
    def from_options(cls, options: object, where: str) -> PropertyRewards:
        """As a configuration has it: a mapping with these names, which stands at ``where``."""
        if not isinstance(options, Mapping) or "properties" not in options:
            raise ValueError(
                f"{where} must be a mapping with properties (and, as wanted, {', '.join(OPTIONS[1:])}); got {options!r}"
            )
        unknown = [name for name in options if name not in OPTIONS]
        if unknown:
            raise ValueError(f"{where} has no option {unknown[0]!r}; it has {', '.join(OPTIONS)}")
        return cls(**options)

    def __call__(
        self,
        scores: Sequence[ByName],
        *,
        prompts: Sequence[str] | None = None,
        reference_reward: Sequence[Any] | None = None,
    ) -> Tensor:
        """Utilities [B] of B outputs.

        Args:
            scores: B mappings with a number for each property; None or NaN is a missing score, other keys are
                ignored.
            prompts: B texts, for a table of references.
            reference_reward: for each output its own, in any of the forms above but a table; None takes the general
                one.
        """
        if not scores:
            return torch.zeros(0)
        rows = torch.stack([self._row("scores", each) for each in scores])
        return self._aggregate(rows, self.references(len(scores), prompts, reference_reward))

    def references(
        self, batch: int, prompts: Sequence[str] | None = None, own: Sequence[Any] | None = None
    ) -> Tensor:
        """The reference rewards [B, K] of B outputs."""
        if own is not None and any(each is not None for each in own):
            general = (
                [None] * batch if all(each is not None for each in own) else self.references(batch, prompts)
            )
            return torch.stack(
                [
                    theirs if each is None else self._numbers("reference_reward", each)
                    for each, theirs in zip(own, general, strict=True)
                ]
            )
        if self.table is not None:
            if prompts is None:
                raise ValueError("the references are a table, which is looked up by prompt; got no prompts")
            return self.table.lookup(prompts)[:, self._columns]
        if self.reference_reward is None:
            raise ValueError(
                "reference_reward must be a number, a number for each property, or the path of a table, unless each "
                "row brings its own; got None, and a row without"
            )
        return self.reference_reward.expand(batch, -1)

    def _numbers(self, name: str, value: Any) -> Tensor:
        """[K], from a number, K numbers or a mapping."""
        if isinstance(value, Mapping):
            unknown = [each for each in value if each not in self.properties]
            if unknown:
                raise ValueError(
                    f"{name} names {unknown[0]!r}, which is none of the properties {', '.join(self.properties)}"
                )
            return self._row(name, value)
        numbers = torch.as_tensor(value, dtype=torch.float32)
        if numbers.dim() > 1 or numbers.dim() == 1 and len(numbers) != len(self.properties):
            raise ValueError(
                f"{name} must be a number or one for each of {', '.join(self.properties)}; got {value!r}"
            )
        return numbers.expand(len(self.properties))

    def _row(self, name: str, given: ByName) -> Tensor:
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{name} must be a mapping with {', '.join(self.properties)}; got {type(given).__name__} {given!r}"
            )
        absent = [each for each in self.properties if each not in given]
        if absent:
            raise ValueError(
                f"{name} must have {', '.join(self.properties)}; {absent[0]!r} is not among "
                f"{', '.join(map(str, given)) or 'none'}. A score that could not be had is None"
            )
        values = [given[each] for each in self.properties]
        return torch.tensor([math.nan if value is None else float(value) for value in values])
