"""The logic of properties: which outputs count as good, written as a formula over properties.

A formula is built from properties, each named once, so that their judgements can be taken as independent:

=======================  ==========================================================  =====================
in Python                in a string                                                 good means
=======================  ==========================================================  =====================
``prop("helpful")``      ``helpful``, or ``"any text"`` in quotes                    the property holds
``prop(2)``              ``2``                                                       that of column 2 holds
``a & b``                ``a & b``                                                   both hold
``a | b``                ``a | b``                                                   at least one holds
``~a``                   ``~a``                                                      it does not hold
``at_least(2, a, b, c)`` ``at_least(2, a, b, c)``                                    that many hold
``weakest(a, b)``        ``weakest(a, b)``                                           both, judged as one
``prop("helpful") ** 2`` ``helpful ** 2``                                            its probability squared
=======================  ==========================================================  =====================

``**`` binds tighter than ``~``, ``~`` than ``&``, and ``&`` than ``|``, in strings as in Python. ``str(formula)`` is a
string that gives an equal formula back, so that a formula can stand in a YAML file. Parsing runs no code.

Backends take a formula as a *program*: instructions in postfix order, three integers each, that work on a stack of
probabilities. ``csrc/math/formula.h`` and ``eager/formula.py`` interpret it.

===========  =============  ======  ==============================================================
instruction  first          second  does
===========  =============  ======  ==============================================================
0 property   column         0       pushes the probability of that column's property
1 not        0              0       replaces the top by its complement
2 all        n              0       replaces n probabilities by that of all of them
3 any        n              0       ... of any of them
4 at least   n              m       ... of at least m of them, 1 < m < n
5 weakest    n              0       ... by the smallest
===========  =============  ======  ==============================================================
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from numbers import Real
from typing import NamedTuple, NoReturn

MAX_PROPERTIES = 32

_BARE_NAME = re.compile(r"[^\W\d]\w*(?:[.\-/]\w+)*")
_RESERVED = frozenset({"at_least", "weakest", "and", "or", "not"})


class Instruction(IntEnum):
    """What an instruction of a program does; its first integer."""

    PROPERTY = 0
    NOT = 1
    ALL = 2
    ANY = 3
    AT_LEAST = 4
    WEAKEST = 5


@dataclass(frozen=True, repr=False)
class Formula:
    """Which outputs count as good. Made by :func:`prop`, ``&``, ``|``, ``~``, :func:`at_least` and :func:`weakest`.

    Formulas are immutable. Two are equal if they are built alike; they can be hashed, pickled and copied.

    Example:
        >>> import lsc_kernels as lk
        >>> formula = lk.prop("helpful") & lk.at_least(2, "polite", "brief", "correct") & ~lk.prop("verbose")
        >>> print(formula)
        helpful & at_least(2, polite, brief, correct) & ~verbose
        >>> lk.Formula.parse(str(formula)) == formula
        True
    """

    text: str = field(init=False, compare=False)
    """What ``str`` says. torch.compile takes that for a constant, and a formula not in every version."""

    def __new__(cls, *_: object, **__: object) -> Formula:
        if cls in (Formula, _Several):
            raise TypeError(
                "a formula is made by prop(name), at_least, weakest, & | ~, or Formula.parse(text)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", str(self))

    def __and__(self, other: object) -> Formula:
        return _joined(AllOf, "&", self, other)

    def __or__(self, other: object) -> Formula:
        return _joined(AnyOf, "|", self, other)

    def __invert__(self) -> Formula:
        return self.part if isinstance(self, Not) else Not(self)

    def __pow__(self, exponent: object) -> Formula:
        raise TypeError(f"** takes one property, a weight for it; got ({self}) ** {exponent}")

    def __bool__(self) -> NoReturn:
        raise TypeError("a formula is neither true nor false: write & for `and`, | for `or`, ~ for `not`")

    def __repr__(self) -> str:
        return f"Formula.parse({str(self)!r})"

    @property
    def parts(self) -> tuple[Formula, ...]:
        """The formulas it is made of."""
        return ()

    @property
    def properties(self) -> tuple[str | int, ...]:
        """The names and column numbers it mentions, from left to right."""
        return tuple(leaf.name for leaf in _leaves(self))

    def describe(self) -> str:
        """What counts as good, in words, and the probability of it.

        Example:
            >>> import lsc_kernels as lk
            >>> print(lk.Formula.parse("helpful & (brief | ~verbose)").describe())
            helpful and (brief or not verbose)
            P(helpful) * (1 - (1 - P(brief)) * P(verbose))
        """
        return f"{_words(self)}\n{_probability(self)}"

    @staticmethod
    def parse(text: str) -> Formula:
        """The formula that a string says. See the module for the syntax.

        Raises:
            TypeError: not a string.
            ValueError: not a formula; the message points at the character.

        Example:
            >>> import lsc_kernels as lk
            >>> lk.Formula.parse("helpful & ~verbose") == lk.prop("helpful") & ~lk.prop("verbose")
            True
            >>> lk.Formula.parse("helpful & & brief")
            Traceback (most recent call last):
            ValueError: formula: a property, '~' or '(' is wanted here; got '&'
              helpful & & brief
                        ^
        """
        if not isinstance(text, str):
            raise TypeError(f"formula must be a string; got {type(text).__name__}")
        return _Parser(text).parse()


@dataclass(frozen=True, repr=False)
class Property(Formula):
    """One property, by name or column, with the exponent on its probability."""

    name: str | int
    exponent: float = 1.0

    def __pow__(self, exponent: object) -> Property:
        if isinstance(exponent, bool) or not isinstance(exponent, Real):
            raise TypeError(f"an exponent must be a number; got {type(exponent).__name__}")
        number = float(exponent)
        if not 0 < number < math.inf:
            raise ValueError(f"an exponent must be finite and > 0; got {exponent}")
        if self.exponent != 1.0:
            raise ValueError(f"{self} has an exponent already; got another, {exponent}")
        return Property(self.name, number)

    def __str__(self) -> str:
        name = _name(self)
        return name if self.exponent == 1.0 else f"{name} ** {_number(self.exponent)}"


@dataclass(frozen=True, repr=False)
class Not(Formula):
    """The complement: not good."""

    part: Formula

    @property
    def parts(self) -> tuple[Formula, ...]:
        return (self.part,)

    def __str__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, (AllOf, AnyOf)) else f"~{self.part}"


@dataclass(frozen=True, repr=False)
class _Several(Formula):
    """A formula of several independent ones."""

    several: tuple[Formula, ...]

    @property
    def parts(self) -> tuple[Formula, ...]:
        return self.several


class AllOf(_Several):
    """Every part holds."""

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, AnyOf) else str(part) for part in self.several)


class AnyOf(_Several):
    """At least one part holds."""

    def __str__(self) -> str:
        return " | ".join(str(part) for part in self.several)


@dataclass(frozen=True, repr=False)
class AtLeast(_Several):
    """At least ``least`` of the parts hold."""

    least: int

    def __str__(self) -> str:
        return f"at_least({self.least}, {', '.join(str(part) for part in self.several)})"


class Weakest(_Several):
    """Every part holds, as judged by fully dependent judges: the least probable one decides."""

    def __str__(self) -> str:
        return f"weakest({', '.join(str(part) for part in self.several)})"


def prop(name: str | int) -> Property:
    """One property as a formula: by its name in ``names``, or by its column number in the scores.

    ``prop("helpful") ** 2`` has the exponent 2 on its probability.

    Args:
        name: a string that is not empty, or a column number >= 0.

    Raises:
        TypeError: neither a string nor an integer.
        ValueError: an empty name, or a negative column.

    Example:
        >>> import lsc_kernels as lk
        >>> print(lk.prop("helpful") ** 2 & ~lk.prop(3))
        helpful ** 2 & ~3
    """
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise TypeError(f"a property is a name or a column number; got {type(name).__name__}")
    if isinstance(name, str) and not name.strip():
        raise ValueError(f"a property's name must not be empty; got {name!r}")
    if isinstance(name, int) and name < 0:
        raise ValueError(f"a property's column must be >= 0; got {name}")
    return Property(name)


def at_least(m: int, *formulas: Formula | str | int) -> Formula:
    """At least ``m`` of the formulas hold, judged independently.

    ``at_least(n, ...)`` of n formulas means that all of them hold, ``at_least(1, ...)`` that any does.

    Args:
        m: how many, from 1 to the number of formulas.
        formulas: formulas; a name or a column number stands for that property.

    Raises:
        TypeError: ``m`` is not an integer, or an argument is no formula.
        ValueError: ``m`` is out of range, no formula, or a property named twice.

    Example:
        >>> import lsc_kernels as lk
        >>> print(lk.at_least(2, "helpful", "honest", ~lk.prop("verbose")))
        at_least(2, helpful, honest, ~verbose)
    """
    if isinstance(m, bool) or not isinstance(m, int):
        raise TypeError(f"at_least: the first argument is how many must hold, an integer; got {m!r}")
    parts = _operands("at_least", formulas)
    if not 1 <= m <= len(parts):
        raise ValueError(f"at_least: how many must hold must be from 1 to {len(parts)}; got {m}")
    return parts[0] if len(parts) == 1 else AtLeast(parts, m)


def weakest(*formulas: Formula | str | int) -> Formula:
    """The least probable of the formulas: the AND of judgements that depend on one another fully.

    Where the judges of several properties agree with one another (one model, one prompt), the AND of independent
    judgements counts one doubt several times; the minimum counts it once.

    Args:
        formulas: formulas; a name or a column number stands for that property. Ties go to the first.

    Raises:
        TypeError: an argument is no formula.
        ValueError: no formula, or a property named twice.

    Example:
        >>> import lsc_kernels as lk
        >>> print(lk.weakest("helpful", "harmless") & ~lk.prop("verbose"))
        weakest(helpful, harmless) & ~verbose
    """
    parts = _operands("weakest", formulas)
    return parts[0] if len(parts) == 1 else Weakest(parts)


def _operands(function: str, given: Sequence[object]) -> tuple[Formula, ...]:
    if not given:
        raise ValueError(f"{function}: give at least one formula; got none")
    parts = tuple(part if isinstance(part, Formula) else prop(part) for part in given)  # type: ignore[arg-type]
    _check_independent(parts)
    return parts


def _joined(kind: type[AllOf] | type[AnyOf], operator: str, left: Formula, right: object) -> Formula:
    if not isinstance(right, Formula):
        raise TypeError(f"{operator} takes two formulas, as lk.prop(name) makes them; got {right!r}")
    parts = tuple(
        part for side in (left, right) for part in (side.parts if isinstance(side, kind) else (side,))
    )
    _check_independent(parts)
    return kind(parts)


def _leaves(formula: Formula) -> Iterator[Property]:
    if isinstance(formula, Property):
        yield formula
    for part in formula.parts:
        yield from _leaves(part)


def _check_independent(parts: Sequence[Formula]) -> None:
    """No property may stand in two parts."""
    seen: set[str | int] = set()
    for part in parts:
        for leaf in _leaves(part):
            if leaf.name in seen:
                raise ValueError(
                    f"formula: property {leaf.name!r} is named twice; its judgements would not be independent"
                )
            seen.add(leaf.name)
    if len(seen) > MAX_PROPERTIES:
        raise ValueError(f"formula: at most {MAX_PROPERTIES} properties; got {len(seen)}")


# Writing


def _name(leaf: Property) -> str:
    """As a string says it."""
    name = leaf.name
    if isinstance(name, int):
        return str(name)
    if _BARE_NAME.fullmatch(name) and name not in _RESERVED:
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _words(formula: Formula) -> str:
    if isinstance(formula, Property):
        name = _name(formula) if isinstance(formula.name, str) else f"property {formula.name}"
        return name if formula.exponent == 1.0 else f"{name} (weight {_number(formula.exponent)})"
    if isinstance(formula, Not):
        return f"not {_in_words(formula.part)}"
    if isinstance(formula, (AllOf, AnyOf)):
        return (" and " if isinstance(formula, AllOf) else " or ").join(map(_in_words, formula.parts))
    listed = ", ".join(map(_words, formula.parts))
    if isinstance(formula, AtLeast):
        return f"at least {formula.least} of ({listed})"
    return f"the least certain of ({listed})"


def _in_words(part: Formula) -> str:
    return f"({_words(part)})" if isinstance(part, (AllOf, AnyOf)) else _words(part)


def _probability(formula: Formula) -> str:
    if isinstance(formula, Property):
        probability = f"P({_name(formula)})"
        return probability if formula.exponent == 1.0 else f"{probability}^{_number(formula.exponent)}"
    if isinstance(formula, Not):
        return _complement(formula.part)
    if isinstance(formula, AllOf):
        return " * ".join(map(_factor, formula.parts))
    if isinstance(formula, AnyOf):
        return f"1 - {_complement(formula)}"
    listed = ", ".join(map(_probability, formula.parts))
    if isinstance(formula, AtLeast):
        return f"P(at least {formula.least} of: {listed})"
    return f"min({listed})"


def _complement(formula: Formula) -> str:
    if isinstance(formula, AnyOf):
        return " * ".join(map(_factor, (~part for part in formula.parts)))
    return f"1 - {_factor(formula)}"


def _factor(formula: Formula) -> str:
    """A probability as a factor of a product."""
    text = _probability(formula)
    return f"({text})" if text.startswith("1 - ") else text


# Reading

_TOKEN = re.compile(
    rf"""\s*(?:
    (?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<number>\d+(?:\.\d*)?(?:[eE][+\-]?\d+)?|\.\d+(?:[eE][+\-]?\d+)?)
    |(?P<name>{_BARE_NAME.pattern})
    |(?P<symbol>\*\*|[&|~(),])
    |(?P<end>$)
    )""",
    re.VERBOSE | re.DOTALL,
)
_HINTS = {
    "and": "write & for and",
    "or": "write | for or",
    "not": "write ~ for not",
    "!": "write ~ for not",
    "^": "write ** for an exponent",
    "*": "write & for and, ** for an exponent",
    "-": "write ~ for not",
    '"': "this quote is never closed",
    "'": "this quote is never closed",
}
_MAX_DEPTH = 64
_MAX_DIGITS = 18  # of what the programs' integers hold


def _blank(character: str) -> str:
    """As wide as the character on a terminal, so that a caret stands under the one that is meant."""
    if character == "\t":
        return "\t"
    if unicodedata.combining(character):
        return ""
    return "\N{IDEOGRAPHIC SPACE}" if unicodedata.east_asian_width(character) in "WF" else " "


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Parser:
    """Recursive descent, one method per rule, with the strings' positions for the errors.

    formula: term ('|' term)*      factor: '~'* atom
    term: factor ('&' factor)*     atom: '(' formula ')' | function '(' ... ')' | leaf
    leaf: property ['**' number]
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.depth = 0
        self.position = 0
        self.seen: set[str | int] = set()
        self.token = self.next_token()

    def parse(self) -> Formula:
        formula = self.formula()
        if self.token.kind != "end":
            self.fail(f"'&', '|' or the end is wanted here; got {self.found()}")
        return formula

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        start = self.token.start if at is None else at
        before, after = self.text[:start].rpartition("\n")[2], self.text[start:].partition("\n")[0]
        space = "".join(map(_blank, before))
        raise ValueError(f"formula: {what}\n  {before}{after}\n  {space}^")

    def next_token(self) -> _Token:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            start = len(self.text) - len(self.text[self.position :].lstrip())
            wrong = self.text[start]
            hint = _HINTS.get(wrong)
            self.fail(f"{wrong!r} has no meaning here" + (f": {hint}" if hint else ""), start)
        self.position = match.end()
        kind = match.lastgroup
        assert kind is not None
        return _Token(kind, match[kind], match.start(kind))

    def take(self) -> _Token:
        taken, self.token = self.token, self.next_token()
        return taken

    def found(self) -> str:
        """What stands here, for an error."""
        if self.token.kind == "end":
            return "the end"
        hint = _HINTS.get(self.token.text)
        return repr(self.token.text) + (f" ({hint})" if hint else "")

    def at(self, symbol: str) -> bool:
        return self.token.kind == "symbol" and self.token.text == symbol

    def expect(self, symbol: str, meaning: str) -> None:
        if not self.at(symbol):
            self.fail(f"{symbol!r} is wanted here, {meaning}; got {self.found()}")
        self.take()

    def formula(self) -> Formula:
        formula = self.term()
        while self.at("|"):
            self.take()
            formula |= self.term()
        return formula

    def term(self) -> Formula:
        formula = self.factor()
        while self.at("&"):
            self.take()
            formula &= self.factor()
        return formula

    def factor(self) -> Formula:
        negated = False
        while self.at("~"):
            self.take()
            negated = not negated
        formula = self.atom()
        return ~formula if negated else formula

    def atom(self) -> Formula:
        if self.at("("):
            opening = self.take()
            formula = self.nested(opening)
            self.expect(")", "to close a bracket")
            return formula
        if self.token.kind == "name" and self.text[self.position :].lstrip().startswith("("):
            return self.function()
        return self.leaf()

    def nested(self, opening: _Token) -> Formula:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            self.fail(f"brackets are nested more than {_MAX_DEPTH} deep", opening.start)
        formula = self.formula()
        self.depth -= 1
        return formula

    def function(self) -> Formula:
        name = self.take()
        if name.text not in ("at_least", "weakest"):
            self.fail(f"{name.text!r} is no function: there are at_least and weakest", name.start)
        opening = self.take()
        least = self.how_many() if name.text == "at_least" else None
        parts = []
        if not self.at(")"):
            parts.append(self.nested(opening))
            while self.at(","):
                self.take()
                parts.append(self.nested(opening))
        self.expect(")", f"or ',' and another formula of {name.text}")
        if not parts:
            self.fail(f"{name.text} has no formula", name.start)
        if least is None:
            return weakest(*parts)
        if not 1 <= int(least.text) <= len(parts):
            self.fail(
                f"at_least must ask for 1 to {len(parts)} of its formulas; got {least.text}", least.start
            )
        return at_least(int(least.text), *parts)

    def how_many(self) -> _Token:
        if self.token.kind != "number" or not self.token.text.isdigit():
            self.fail(f"a whole number is wanted here, how many must hold; got {self.found()}")
        if len(self.token.text) > _MAX_DIGITS:
            self.fail(f"how many must hold has at most {_MAX_DIGITS} digits; got {len(self.token.text)}")
        least = self.take()
        if not self.at(")"):
            self.expect(",", "between how many must hold and the formulas")
        return least

    def leaf(self) -> Formula:
        token = self.token
        if token.kind == "number" and len(token.text) > _MAX_DIGITS:
            self.fail(f"a column has at most {_MAX_DIGITS} digits; got {len(token.text)}")
        if token.kind == "number" and not token.text.isdigit():
            self.fail(f"a column is a whole number; got {token.text!r}")
        if token.kind in ("symbol", "end") or token.text in _HINTS:
            self.fail(f"a property, '~' or '(' is wanted here; got {self.found()}")
        name: str | int = token.text
        if token.kind == "number":
            name = int(token.text)
        elif token.kind == "quoted":
            name = re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
            if not name.strip():
                self.fail("a property's name must not be empty")
        if name in self.seen:
            self.fail(f"property {name!r} is named twice; its judgements would not be independent")
        if len(self.seen) == MAX_PROPERTIES:
            self.fail(f"this is one property more than the {MAX_PROPERTIES} a formula may have")
        self.seen.add(name)
        self.take()
        formula = prop(name)
        if self.at("**"):
            self.take()
            formula **= self.exponent()
        return formula

    def exponent(self) -> float:
        if self.token.kind != "number":
            self.fail(f"a number > 0 is wanted here, an exponent; got {self.found()}")
        value = float(self.token.text)
        if not 0 < value < math.inf:
            self.fail(f"an exponent must be finite and > 0; got {self.token.text}")
        self.take()
        return value


# Compiling


class Compiled(NamedTuple):
    """A formula as backends take it, for scores whose columns have given names."""

    program: tuple[int, ...]
    columns: tuple[int, ...]
    """The columns it reads, in the program's order."""
    exponents: tuple[float, ...] | None
    """Of ``columns``; None where all are 1."""
    plain: bool
    """It is the conjunction of its columns, in their order."""


def compile_formula(formula: object, names: tuple[str, ...] | None) -> Compiled:
    """The program of a formula, or of a string that says one.

    Raises:
        TypeError: neither a formula nor a string.
        ValueError: a name that is not in ``names``, a property that is named twice, once by its column; or the string
            is no formula.
    """
    if not isinstance(formula, (str, Formula)):
        raise TypeError(f"formula must be a formula, a string or None; got {type(formula).__name__}")
    return _compile(formula if isinstance(formula, str) else formula.text, names)


# What torch.compiler.assume_constant_result does, without the two seconds in which it imports the compiler.
compile_formula._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _compile(formula: str, names: tuple[str, ...] | None) -> Compiled:
    parsed = Formula.parse(formula)
    columns: dict[int, Property] = {}
    for leaf in _leaves(parsed):
        column = _column(leaf.name, names)
        if column in columns:
            twice = f"{columns[column].name!r} and {leaf.name!r}"
            raise ValueError(
                f"formula: {twice} are the same property; its judgements would not be independent"
            )
        columns[column] = leaf
    exponents = tuple(leaf.exponent for leaf in columns.values())
    plain = isinstance(parsed, Property) or (
        isinstance(parsed, AllOf) and all(isinstance(part, Property) for part in parsed.parts)
    )
    return Compiled(
        tuple(int(number) for number in _program(parsed, names)),
        tuple(columns),
        None if all(exponent == 1.0 for exponent in exponents) else exponents,
        plain and list(columns) == sorted(columns),
    )


def _column(name: str | int, names: tuple[str, ...] | None) -> int:
    if isinstance(name, int):
        return name
    if names is None:
        raise ValueError(
            f"formula names the property {name!r}, so names must say which column each property is; got None"
        )
    if name not in names:
        close = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"formula names the property {name!r}, which is not in names, {list(names)}{hint}")
    return names.index(name)


def _program(formula: Formula, names: tuple[str, ...] | None) -> Iterator[int]:
    if isinstance(formula, Property):
        yield from (Instruction.PROPERTY, _column(formula.name, names), 0)
        return
    for part in formula.parts:
        yield from _program(part, names)
    several, least = len(formula.parts), getattr(formula, "least", 0)
    if isinstance(formula, Not):
        yield from (Instruction.NOT, 0, 0)
    elif isinstance(formula, Weakest):
        yield from (Instruction.WEAKEST, several, 0)
    elif isinstance(formula, AllOf) or least == several:
        yield from (Instruction.ALL, several, 0)
    elif isinstance(formula, AnyOf) or least == 1:
        yield from (Instruction.ANY, several, 0)
    else:
        yield from (Instruction.AT_LEAST, several, least)
