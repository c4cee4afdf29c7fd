"""The options of a scoring run, checked before anything is read or loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UserError
from ..options import check_seed, check_threads
from ..wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    ModelSource: TypeAlias = str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase]
    DataSource: TypeAlias = str | Path | Sequence[Mapping[str, Any]]

KL_KINDS = ("k1", "abs", "k2", "k3", "full", "full_reverse")
PLACEMENTS = ("last", "eos_plus_one", "before_last")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
CHAT_MODES = ("auto", "always", "never")
EOS_MODES = ("policy", "all", "none")
# Rewards are computed in fp32, which holds a product of three numbers of this size, and the inverse of its inverse.
LARGEST = 1e12
SMALLEST = 1 / LARGEST


@dataclass(frozen=True)
class ReferenceRule:
    """Where the reference reward of one property comes from.

    ``kind`` is ``number``, ``quantile`` (of the scores of this file), ``prompt-quantile`` (of the responses
    that share a prompt), ``column`` (of the data) or ``canned`` (the score of a fixed response to the
    prompt).
    """

    kind: str
    value: float = math.nan
    text: str = ""

    @classmethod
    def parse(cls, given: str | float) -> ReferenceRule:
        """Read ``0.5``, ``quantile:0.85``, ``prompt-quantile:0.85``, ``column:NAME`` or ``canned:TEXT``."""
        kind, colon, rest = str(given).partition(":")
        kind, text = kind.strip(), rest.strip()
        if not is_text(text):
            raise UserError(f"--reference {given!r}: is not UTF-8 text")
        if colon and kind in ("column", "canned"):
            if not text:
                raise UserError(f"--reference {given!r}: nothing stands after '{kind}:'")
            return cls(kind, text=text)
        if colon and kind in ("quantile", "prompt-quantile"):
            q = _number(text)
            if not 0 <= q <= 1:
                raise UserError(f"--reference {given!r}: wants a quantile between 0 and 1 after '{kind}:'")
            return cls(kind, value=q)
        number = _number(str(given))
        if not math.isfinite(number):
            raise UserError(
                f"--reference {given!r}: wants a number, quantile:Q, prompt-quantile:Q, column:NAME "
                "or canned:TEXT"
            )
        if abs(number) > LARGEST:
            raise UserError(f"--reference {given!r}: wants a number of at most {LARGEST:g} in size")
        return cls("number", value=number)

    def __str__(self) -> str:
        return f"{self.kind}:{self.text or self.value}" if self.kind != "number" else str(self.value)


@dataclass(frozen=True)
class ScoreConfig:
    """Everything a scoring run is told; the fields mirror the options of ``lsc-kernels score``.

    ``policy``, ``ref`` and each of ``reward_models`` is a folder, a name on the Hugging Face hub, or a pair
    ``(model, tokenizer)`` that is already loaded; such a model keeps its dtype. ``data`` is a file, a
    dataset, or a list of records. ``reference``, ``scale``, ``floor`` and ``weights`` take one value for
    every property or one per property.

    Raises:
        UserError: an option has a value it cannot have.
    """

    data: DataSource
    policy: ModelSource
    ref: ModelSource
    reward_models: Sequence[ModelSource]
    out: str | Path
    names: Sequence[str] | None = None
    reference: str | float | Sequence[str | float] = "quantile:0.85"
    scale: float | Sequence[float] = 1.0
    floor: float | Sequence[float] = 0.0
    weights: float | Sequence[float] = 1.0
    kl: str = "k3"
    beta: float = 0.05
    placement: str = "last"
    temperature: float = 1.0
    chat: str = "auto"
    eos: str = "policy"
    max_length: int | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    limit: int | None = None
    seed: int | None = None
    resume: bool = False
    overwrite: bool = False
    checkpoint_seconds: float = 20.0
    plot: str | Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for option in ("data", "policy", "ref", "out", "plot"):
            if getattr(self, option) == "":
                raise UserError(f"--{option} '': wants a name")
        if "" in [source for source in self.reward_models if isinstance(source, str)]:
            raise UserError("--reward-model '': wants a name")
        for option, allowed in (
            ("kl", KL_KINDS),
            ("placement", PLACEMENTS),
            ("dtype", DTYPES),
            ("chat", CHAT_MODES),
            ("eos", EOS_MODES),
        ):
            if getattr(self, option) not in allowed:
                raise UserError(f"--{option} {getattr(self, option)!r}: wants one of {', '.join(allowed)}")
        check_threads(self.threads)
        check_seed(self.seed)
        for option in ("max_length", "batch_size", "max_tokens", "limit"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"--{option.replace('_', '-')} {value}: wants at least 1")
        if self.max_length == 1:
            raise UserError("--max-length 1: wants at least 2, one token of context and one of response")
        if not abs(self.beta) <= LARGEST:
            raise UserError(f"--beta {self.beta}: wants a finite number, at most {LARGEST:g} in size")
        if not SMALLEST <= self.temperature <= LARGEST:
            raise UserError(
                f"--temperature {self.temperature}: wants a number above 0, from {SMALLEST:g} to {LARGEST:g}"
            )
        if not self.checkpoint_seconds >= 0:
            raise UserError(f"--checkpoint-seconds {self.checkpoint_seconds}: wants 0 or more")
        if self.resume and self.overwrite:
            raise UserError("--resume and --overwrite contradict each other: give one of them")
        if self.seed is not None and self.limit is None:
            raise UserError("--seed chooses which records --limit takes: give --limit too")
        if not self.reward_models:
            raise UserError("no --reward-model: give at least one")
        if self.names is not None:
            check_names(self.names)
        self.references()
        self.numbers("scale"), self.numbers("floor"), self.numbers("weights")

    def references(self) -> tuple[ReferenceRule, ...]:
        """The parsed ``reference`` option: one rule for all properties, or one per property."""
        given = [self.reference] if isinstance(self.reference, str | int | float) else list(self.reference)
        if not given:
            raise UserError("--reference: nothing given")
        return tuple(ReferenceRule.parse(rule) for rule in given)

    def reference_columns(self) -> list[str]:
        """The columns of the data that hold reference rewards."""
        return list(dict.fromkeys(rule.text for rule in self.references() if rule.kind == "column"))

    def numbers(self, option: str) -> tuple[float, ...]:
        """The values of ``scale``, ``floor`` or ``weights``: one for all properties, or one per property."""
        given = getattr(self, option)
        values = (given,) if isinstance(given, int | float) else tuple(given)
        check_numbers(option, values)
        return tuple(float(x) for x in values)

    def result_options(self) -> dict[str, Any]:
        """The options that change what is computed, as plain values: what a resumed run must repeat.

        How rows are batched is left out (it changes results by rounding alone, and a run that ran out of
        memory must be able to go on with smaller batches), as are device, threads and everything about files.
        """
        chosen = (
            "kl",
            "beta",
            "placement",
            "temperature",
            "chat",
            "eos",
            "max_length",
            "dtype",
            "limit",
            "seed",
        )
        options: dict[str, Any] = {name: getattr(self, name) for name in chosen}
        options |= {name: list(self.numbers(name)) for name in ("scale", "floor", "weights")}
        options["reference"] = [str(rule) for rule in self.references()]
        return options


def parts_folder(out: Path) -> Path:
    """Where the finished rows of a run are until its output is complete."""
    return out.with_name(out.name + ".parts")


def is_text(text: str) -> bool:
    """Whether all of it are characters: a lone surrogate is none, and can be neither written nor tokenised.

    >>> is_text("é"), is_text(chr(0xD83D))
    (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_numbers(option: str, values: Sequence[float]) -> None:
    """Refuse values of ``scale``, ``floor`` or ``weights`` that have no meaning, or none in fp32.

    Raises:
        UserError: there is none, or one is outside.
    """
    inside, wants = {
        "scale": (
            lambda x: SMALLEST <= x <= LARGEST,
            f"finite numbers above 0, from {SMALLEST:g} to {LARGEST:g}",
        ),
        # what comes next to 1 rounds to 1
        "floor": (lambda x: 0 <= x < 1 - 2**-25, "numbers of at least 0 and below 1"),
        "weights": (lambda x: abs(x) <= LARGEST, f"finite numbers, at most {LARGEST:g} in size"),
    }[option]
    if not values or not all(map(inside, values)):
        raise UserError(f"--{option} {','.join(map(str, values))}: wants {wants}")


def check_names(names: Sequence[str]) -> None:
    """Refuse property names that are empty or come twice."""
    if not names or not all(name.strip() for name in names):
        raise UserError(f"--names {','.join(names)!r}: wants one name per property, none of them empty")
    for name in names:
        if not is_text(name):
            raise UserError(f"--names: {name!r} is not UTF-8 text")
    doubles = sorted({name for name in names if list(names).count(name) > 1})
    if doubles:
        raise UserError(f"--names {','.join(names)}: {doubles[0]!r} comes twice")


def per_property(values: Sequence[Any], names: Sequence[str], option: str) -> list[Any]:
    """Spread one value over all properties, or check that there is one for each."""
    if len(values) == 1:
        return list(values) * len(names)
    if len(values) != len(names):
        raise UserError(
            f"--{option}: {counted(len(values), 'value')} for "
            f"{counted(len(names), 'property', 'properties')} ({', '.join(names)}); give one for all, or one for each"
        )
    return list(values)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
