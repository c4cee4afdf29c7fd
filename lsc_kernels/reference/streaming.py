"""Quantiles of a stream of scores in a few kilobytes, merged across processes: Apache DataSketches' KLL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lsc_kernels.extras import load
from lsc_kernels.reference.quantile import check_quantile

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STATE_VERSION = 1


class StreamingQuantile:
    r"""The quantiles of all scores seen so far, without keeping them.

    One KLL sketch per property (pip install 'lsc-kernels[reference]'). The answer is exact, NumPy's linear
    quantile, while the sketch still holds everything (about the first k values); after that it is a value whose
    rank among the N seen is within ``rank_error`` of q N, with 99% confidence:

    ======  ============  =================================
    k       rank_error    kilobytes, after a million values
    ======  ============  =================================
    200     1.33%         5
    800     0.35%         19
    3200    0.09%         74
    ======  ============  =================================

    At k = 800 and q = 0.85, that is a value between the 84.65% and the 85.35% quantile. Merging keeps the bound.
    KLL draws random bits: two runs over the same stream may differ within it.

    Args:
        num_properties: K; values are then [..., K] and quantiles [K]. None: one quantile of all values.
        k: the size of the sketch, 8 to 65535.

    Attributes:
        rank_error: the bound on the error of the rank, as a share of the values seen, at 99% confidence.
        count: how many values each property has seen, without the missing; int64 [K] (or scalar).

    Raises:
        ModuleNotFoundError: datasketches is not installed.
        TypeError, ValueError: ``num_properties`` or ``k`` out of range.

    Source:
        Z. Karnin, K. Lang, E. Liberty, "Optimal Quantile Approximation in Streams" (2016), arXiv:1603.05346.

    Example:
        >>> import torch
        >>> from lsc_kernels.reference import StreamingQuantile
        >>> stream = StreamingQuantile(2)
        >>> stream.update(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, float("nan")]]))
        >>> stream.quantile(0.5)
        tensor([ 2., 15.])
    """

    def __init__(self, num_properties: int | None = None, *, k: int = 800) -> None:
        for name, value in (("num_properties", num_properties), ("k", k)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name} must be an int; got {value!r}")
        if num_properties is not None and num_properties < 1:
            raise ValueError(f"num_properties must be at least 1; got {num_properties}")
        if not 8 <= k <= 65535:
            raise ValueError(f"k must be in [8, 65535]; got {k}")
        self._kll = load("datasketches", "reference").kll_doubles_sketch
        self.num_properties = num_properties
        self.k = k
        self._sketches = [self._kll(k) for _ in range(num_properties or 1)]

    @property
    def rank_error(self) -> float:
        """The bound on the error of the rank, as a share of the values seen, at 99% confidence."""
        return float(self._kll.get_normalized_rank_error(self.k, False))

    @property
    def count(self) -> Tensor:
        """How many values each property has seen, without the missing; int64 [K], or a scalar."""
        return self._shaped([sketch.n for sketch in self._sketches], torch.int64)

    def update(self, values: Tensor | Sequence[float]) -> None:
        """Take in scores: [..., K], or any shape where there is one quantile of all. NaN is missing: left out.

        A tensor of any dtype and device (a GPU's is waited for), or what ``torch.as_tensor`` makes one of.

        Raises:
            TypeError: these are no numbers.
            ValueError: the last dimension is not K.
        """
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise TypeError(f"values must be a tensor; got {type(values).__name__}: {problem}") from None
        if values.is_complex():
            raise TypeError(f"values must be real numbers; got {values.dtype}")
        if self.num_properties is not None and values.shape[-1:] != (self.num_properties,):
            raise ValueError(f"values must be [..., {self.num_properties}]; got {list(values.shape)}")
        rows = values.detach().to("cpu", torch.float64).reshape(-1, len(self._sketches))
        for sketch, column in zip(self._sketches, rows.T, strict=True):
            sketch.update(column[~column.isnan()].numpy())

    def quantile(self, q: float = 0.85) -> Tensor:
        """The q-quantile of what was seen; fp32 [K], or a scalar. NaN for a property that has seen nothing.

        Raises:
            TypeError, ValueError: ``q`` is no float in [0, 1].
        """
        q = check_quantile(q, "linear")
        return self._shaped([_quantile(sketch, q) for sketch in self._sketches], torch.float32)

    def merge(self, other: StreamingQuantile) -> StreamingQuantile:
        """Take in everything that another one has seen, as if this one had; returns itself.

        Raises:
            TypeError: ``other`` is no StreamingQuantile.
            ValueError: it has another number of properties, or another k.
        """
        if not isinstance(other, StreamingQuantile):
            raise TypeError(f"other must be a StreamingQuantile; got {type(other).__name__}")
        mine, theirs = (self.num_properties, self.k), (other.num_properties, other.k)
        if mine != theirs:
            raise ValueError(f"other must have (num_properties, k) = {mine}; got {theirs}")
        # a sketch merged into itself would be read while it is written
        other_sketches = [self._kll.deserialize(sketch.serialize()) for sketch in other._sketches]
        for sketch, other_sketch in zip(self._sketches, other_sketches, strict=True):
            sketch.merge(other_sketch)
        return self

    def all_merge(self, process_group: ProcessGroup | None = None) -> StreamingQuantile:
        """What all ranks of a process group have seen together, the same bits on each; this one stays as it is.

        A collective: every rank calls it. The first rank merges, in rank order, and sends the result to the
        others, because merging draws random bits.

        Raises:
            ValueError: the ranks differ in num_properties or k.
        """
        from torch import distributed

        group: Any = distributed.group.WORLD if process_group is None else process_group
        states: list[Any] = [None] * distributed.get_world_size(group)
        distributed.all_gather_object(states, self.state_dict(), group=group)
        described = [(state["num_properties"], state["k"]) for state in states]
        if len(set(described)) > 1:  # known to every rank, so every rank raises and none waits
            raise ValueError(f"the ranks must agree in (num_properties, k); got {described}")
        merged = StreamingQuantile(self.num_properties, k=self.k)
        if distributed.get_rank(group) == 0:
            for state in states:
                part = StreamingQuantile(self.num_properties, k=self.k)
                part.load_state_dict(state)
                merged.merge(part)
        whole = [merged.state_dict()]
        distributed.broadcast_object_list(whole, src=distributed.get_global_rank(group, 0), group=group)
        merged.load_state_dict(whole[0])
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values and uint8 tensors: for torch.save, also with ``weights_only=True``."""
        kept = [
            torch.frombuffer(bytearray(sketch.serialize()), dtype=torch.uint8) for sketch in self._sketches
        ]
        return {
            "version": STATE_VERSION,
            "num_properties": self.num_properties,
            "k": self.k,
            "sketches": kept,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace what was seen by what a :meth:`state_dict` holds.

        Raises:
            TypeError: it is no dictionary.
            ValueError: it is of another version, number of properties or k, or damaged.
        """
        if not isinstance(state, dict):
            raise TypeError(f"the state must be what state_dict() gives; got {type(state).__name__}")
        wanted = {"version": STATE_VERSION, "num_properties": self.num_properties, "k": self.k}
        found = {name: state.get(name) for name in wanted}
        if found != wanted:
            raise ValueError(f"the state must have {wanted}; got {found}")
        try:
            sketches = [self._kll.deserialize(kept.numpy().tobytes()) for kept in state["sketches"]]
        except (KeyError, AttributeError, RuntimeError, IndexError, ValueError) as problem:
            raise ValueError(f"the state's sketches are damaged: {problem}") from problem
        if len(sketches) != len(self._sketches) or any(sketch.k != self.k for sketch in sketches):
            raise ValueError(f"the state's sketches are not {len(self._sketches)} of size k = {self.k}")
        self._sketches = sketches

    def __repr__(self) -> str:
        seen = [sketch.n for sketch in self._sketches]
        return f"StreamingQuantile(num_properties={self.num_properties}, k={self.k}, seen={seen})"

    def _shaped(self, values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values[0] if self.num_properties is None else values, dtype=dtype)


def _quantile(sketch: Any, q: float) -> float:
    """NumPy's linear quantile of what the sketch holds, every value as often as it stands for others."""
    if sketch.is_empty():
        return math.nan
    at = (sketch.n - 1) * q
    # asked in the middle of a rank, so that no rounding reaches its neighbour
    low, high = sketch.get_quantiles(
        [(place + 0.5) / sketch.n for place in (math.floor(at), math.ceil(at))], True
    )
    weight = at - math.floor(at)
    return float(low if low == high or not weight else low * (1 - weight) + high * weight)
