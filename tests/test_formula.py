"""The logic of properties: building, writing and reading formulas, and the errors of those who get it wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from _formulas import formulas
from hypothesis import given, settings
from hypothesis import strategies as st

import lsc_kernels as lk
from lsc_kernels.formula import MAX_PROPERTIES, Formula, compile_formula

a, b, c, d = (lk.prop(name) for name in "abcd")
names = st.text(min_size=1, max_size=8).filter(str.strip)
leaves = st.lists(st.one_of(names, st.integers(0, 99)), min_size=1, max_size=6, unique=True).flatmap(
    lambda found: st.tuples(
        *(
            st.one_of(
                st.just(lk.prop(name)),
                st.floats(1e-6, 1e6).map(lambda exponent, name=name: lk.prop(name) ** exponent),
            )
            for name in found
        )
    )
)
anything = leaves.flatmap(formulas)


@given(formula=anything)
@settings(max_examples=300, deadline=None)
def test_a_string_gives_the_formula_back(formula: Formula) -> None:
    again = Formula.parse(str(formula))
    assert again == formula and hash(again) == hash(formula) and str(again) == str(formula)
    assert Formula.parse(f" ( {formula}\n) ") == formula


@given(formula=anything)
@settings(max_examples=100, deadline=None)
def test_pickling_copying_yaml_and_repr(formula: Formula) -> None:
    for same in (
        pickle.loads(pickle.dumps(formula)),
        copy.deepcopy(formula),
        eval(repr(formula), {"Formula": Formula}),
        Formula.parse(yaml.safe_load(yaml.safe_dump({"formula": str(formula)}))["formula"]),
    ):
        assert same == formula and hash(same) == hash(formula)


def test_a_formula_as_a_person_writes_it_into_yaml() -> None:
    config = yaml.safe_load("""
        formula: helpful & at_least(2, polite, brief, correct) & ~verbose ** 0.5
        long: >
          helpful
          & ~verbose
        quoted: "'a property: of #many words' | ~x"
    """)
    assert Formula.parse(config["formula"]) == (
        lk.prop("helpful") & lk.at_least(2, "polite", "brief", "correct") & ~(lk.prop("verbose") ** 0.5)
    )
    assert Formula.parse(config["long"]) == lk.prop("helpful") & ~lk.prop("verbose")
    assert Formula.parse(config["quoted"]).properties == ("a property: of #many words", "x")


@pytest.mark.parametrize(
    "text, formula",
    [
        ("a", a),
        ("a&b", a & b),
        ("a & b | c", (a & b) | c),
        ("a & (b | c)", a & (b | c)),
        ("a | b & c", a | (b & c)),
        ("~a & b", (~a) & b),
        ("~(a & b)", ~(a & b)),
        ("~~a", a),
        ("~ ~ ~a", ~a),
        ("~a ** 2", ~(a**2)),
        ("(a & b) & (c & d)", a & b & c & d),
        ("(a) | ((b))", a | b),
        ("at_least(2, a, b & c, ~d)", lk.at_least(2, a, b & c, ~d)),
        ("at_least ( 1 , a|b , c )", lk.at_least(1, a | b, c)),
        ("weakest(a, weakest(b, c))", lk.weakest(a, lk.weakest(b, c))),
        ("weakest(a)", a),
        ("at_least(1, a)", a),
        ("0 & ~2", lk.prop(0) & ~lk.prop(2)),
        ('"a b" & \'c"d\' & "e\\"\\\\f"', lk.prop("a b") & lk.prop('c"d') & lk.prop('e"\\f')),
        ("at_least & weakest", lk.prop("at_least") & lk.prop("weakest")),
        ("org/model-v1.5 & größe", lk.prop("org/model-v1.5") & lk.prop("größe")),
        ("a ** 1e-3 & b ** .5 & c ** 3.", a**0.001 & b**0.5 & c**3),
        ('"0" & 0', lk.prop("0") & lk.prop(0)),
    ],
)
def test_what_strings_mean(text: str, formula: Formula) -> None:
    assert Formula.parse(text) == formula


def test_equality_is_of_structure() -> None:
    assert a & b != b & a and a & b != a | b and lk.prop(0) != lk.prop("0") and a**2 != a
    assert a & b & c == a & (b & c) and ~~a == a
    assert lk.weakest(a, b) != a & b and lk.at_least(2, a, b) != a & b
    assert len({a & b, a & b, a | b}) == 2
    assert (a & b) != "a & b"


def test_shorthand_for_properties() -> None:
    assert lk.at_least(2, "a", b, 3) == lk.at_least(2, a, b, lk.prop(3))
    assert lk.weakest("a", 0) == lk.weakest(a, lk.prop(0))


def test_properties_from_left_to_right() -> None:
    assert Formula.parse("b & at_least(1, c, ~a) & 7").properties == ("b", "c", "a", 7)


@pytest.mark.parametrize(
    "text, words, probability",
    [
        ("a", "a", "P(a)"),
        ("~a ** 2", "not a (weight 2)", "1 - P(a)^2"),
        ("a & ~b", "a and not b", "P(a) * (1 - P(b))"),
        ("a | b", "a or b", "1 - (1 - P(a)) * (1 - P(b))"),
        ("~(a | b)", "not (a or b)", "(1 - P(a)) * (1 - P(b))"),
        ("~(a & b)", "not (a and b)", "1 - P(a) * P(b)"),
        ("~(a & b) & c", "not (a and b) and c", "(1 - P(a) * P(b)) * P(c)"),
        ("a | ~b & c", "a or (not b and c)", "1 - (1 - P(a)) * (1 - (1 - P(b)) * P(c))"),
        (
            "~at_least(2, a, b, c)",
            "not at least 2 of (a, b, c)",
            "1 - P(at least 2 of: P(a), P(b), P(c))",
        ),
        ("weakest(a, 3) & b", "the least certain of (a, property 3) and b", "min(P(a), P(3)) * P(b)"),
        ('"two words" & a', '"two words" and a', 'P("two words") * P(a)'),
    ],
)
def test_describe(text: str, words: str, probability: str) -> None:
    assert Formula.parse(text).describe() == f"{words}\n{probability}"


@given(formula=leaves.flatmap(lambda found: formulas(found, with_weakest=False)))
@settings(max_examples=100, deadline=None)
def test_the_probability_that_is_described_is_the_one_meant(formula: Formula) -> None:
    """Where the expression has no function of its own, Python can evaluate it."""
    import mpmath
    from _formulas import probability

    text = formula.describe().split("\n")[-1]
    if "at least" in text or any(isinstance(name, str) for name in formula.properties):
        return
    of = {name: mpmath.mpf(1 + int(name)) / 101 for name in formula.properties}
    value = eval(text.replace("^", "**"), {"P": lambda name: of[name]})
    assert mpmath.almosteq(value, probability(formula, of), rel_eps=mpmath.mpf(1e-9))


def test_no_more_properties_than_the_kernels_have_room_for() -> None:
    most = lk.at_least(3, *range(MAX_PROPERTIES))
    assert len(most.properties) == MAX_PROPERTIES and Formula.parse(str(most)) == most
    with pytest.raises(ValueError, match="at most 32 properties; got 33"):
        most & a
    with pytest.raises(ValueError, match="one property more than the 32"):
        Formula.parse(" & ".join(map(str, range(33))))


@given(formula=anything)
@settings(max_examples=200, deadline=None)
def test_programs_balance_their_stack_and_are_short(formula: Formula) -> None:
    given_names = tuple(name for name in formula.properties if isinstance(name, str))
    order = tuple(f"column {i}" for i in range(100)) + given_names
    compiled = compile_formula(formula, order)
    assert compiled == compile_formula(str(formula), order)
    depth = 0
    for kind, first, second in zip(*(compiled.program[i::3] for i in range(3)), strict=True):
        takes = {0: 0, 1: 1}.get(kind, first)
        assert depth >= takes and (kind != 4 or 1 < second < first)
        depth += 1 - takes
    assert depth == 1 and len(compiled.program) <= 3 * 128
    assert [order[column] if column >= 100 else column for column in compiled.columns] == list(
        formula.properties
    )


def test_the_longest_program_fits() -> None:
    longest = ~lk.prop(0)
    for column in range(1, MAX_PROPERTIES):
        longest = ~(longest & ~lk.prop(column)) if column % 2 else ~(longest | ~lk.prop(column))
    assert len(compile_formula(longest, None).program) <= 3 * 128


@pytest.mark.parametrize(
    "text, message, caret",
    [
        ("", "a property, '~' or '(' is wanted here; got the end", 0),
        ("helpful & & brief", "a property, '~' or '(' is wanted here; got '&'", 10),
        ("a &", "is wanted here; got the end", 3),
        ("(a | b", "')' is wanted here, to close a bracket; got the end", 6),
        ("a)", "'&', '|' or the end is wanted here; got ')'", 1),
        ("a b", "'&', '|' or the end is wanted here; got 'b'", 2),
        ("a and b", "got 'and' (write & for and)", 2),
        ("a or b", "got 'or' (write | for or)", 2),
        ("not a", "got 'not' (write ~ for not)", 0),
        ("!a", "'!' has no meaning here: write ~ for not", 0),
        ("a ^ 2", "'^' has no meaning here: write ** for an exponent", 2),
        ("a - b", "'-' has no meaning here", 2),
        ("a & 'b", "this quote is never closed", 4),
        ("a & ''", "a property's name must not be empty", 4),
        ("a & b & a", "property 'a' is named twice; its judgements would not be independent", 8),
        ("3 | ~3", "property 3 is named twice", 5),
        ("at_least(3, a, b)", "at_least must ask for 1 to 2 of its formulas; got 3", 9),
        ("at_least(0, a, b)", "at_least must ask for 1 to 2 of its formulas; got 0", 9),
        ("at_least(a, b)", "a whole number is wanted here, how many must hold; got 'a'", 9),
        ("at_least(2.5, a, b)", "a whole number is wanted here, how many must hold; got '2.5'", 9),
        ("at_least(2)", "at_least has no formula", 0),
        ("at_least(2 a, b)", "',' is wanted here, between how many", 11),
        ("at_least(1, a, )", "a property, '~' or '(' is wanted here; got ')'", 15),
        ("weakest()", "weakest has no formula", 0),
        ("most(2, a, b)", "'most' is no function: there are at_least and weakest", 0),
        ("__import__('os')", "'__import__' is no function", 0),
        ("a ** 0", "an exponent must be finite and > 0; got 0", 5),
        ("a ** 1e999", "an exponent must be finite and > 0; got 1e999", 5),
        ("a ** b", "a number > 0 is wanted here, an exponent; got 'b'", 5),
        ("(a & b) ** 2", "the end is wanted here; got '**'", 8),
        ("1.5 & a", "a column is a whole number; got '1.5'", 0),
        ("a & " + "9" * 5000, "a column has at most 18 digits; got 5000", 4),
        (f"at_least({'9' * 5000}, a)", "how many must hold has at most 18 digits; got 5000", 9),
        ("(" * 200 + "a" + ")" * 200, "brackets are nested more than 64 deep", 64),
        ("a &\n\tb $ c", "'$' has no meaning here", 3),
    ],
)
def test_errors_point_at_the_character(text: str, message: str, caret: int) -> None:
    with pytest.raises(ValueError) as caught:
        Formula.parse(text)
    assert message in str(caught.value)
    what, line, pointer = str(caught.value).split("\n")
    assert what.startswith("formula: ") and line == "  " + text.split("\n")[-1]
    assert pointer.index("^") == 2 + caret
    assert pointer.replace("^", "").strip() == ""


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: a & a, ValueError, "property 'a' is named twice"),
    (lambda: (a | b) & ~(c & a), ValueError, "property 'a' is named twice"),
    (lambda: lk.at_least(1, a, b, a), ValueError, "property 'a' is named twice"),
    (lambda: lk.weakest("a", "a"), ValueError, "property 'a' is named twice"),
    (lambda: lk.at_least(3, a, b), ValueError, "from 1 to 2; got 3"),
    (lambda: lk.at_least(0, a, b), ValueError, "from 1 to 2; got 0"),
    (lambda: lk.at_least(-1, a, b), ValueError, "from 1 to 2; got -1"),
    (lambda: lk.at_least(2), ValueError, "at_least: give at least one formula"),
    (lambda: lk.at_least(1.5, a, b), TypeError, "how many must hold, an integer; got 1.5"),
    (lambda: lk.at_least(True, a, b), TypeError, "how many must hold, an integer; got True"),
    (lambda: lk.at_least(a, b), TypeError, "how many must hold, an integer"),
    (lambda: lk.at_least(1, a, 2.5), TypeError, "a property is a name or a column number; got float"),
    (lambda: lk.weakest(), ValueError, "weakest: give at least one formula"),
    (lambda: lk.prop(""), ValueError, "name must not be empty"),
    (lambda: lk.prop(-1), ValueError, "column must be >= 0; got -1"),
    (lambda: lk.prop(1.0), TypeError, "a property is a name or a column number; got float"),
    (lambda: lk.prop(True), TypeError, "a property is a name or a column number; got bool"),
    (lambda: a & "b", TypeError, "& takes two formulas, .*; got 'b'"),
    (lambda: a | True, TypeError, r"\| takes two formulas, .*; got True"),
    (lambda: a and b, TypeError, "write & for `and`"),
    (lambda: not a, TypeError, "~ for `not`"),
    (lambda: (a & b) ** 2, TypeError, r"\*\* takes one property.*got \(a & b\) \*\* 2"),
    (lambda: a**0, ValueError, "an exponent must be finite and > 0; got 0"),
    (lambda: a ** float("nan"), ValueError, "an exponent must be finite and > 0; got nan"),
    (lambda: a ** "2", TypeError, "an exponent must be a number; got str"),
    (lambda: (a**2) ** 3, ValueError, "has an exponent already"),
    (lambda: Formula.parse(a), TypeError, "formula must be a string; got Property"),
    (lambda: Formula(), TypeError, "a formula is made by prop"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_mistakes(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("before", "space"),
    [("helpful ", " " * 8), ("名前 ", "\N{IDEOGRAPHIC SPACE}" * 2 + " "), ('\t"a\u0301" ', "\t    ")],
)
def test_the_caret_stands_under_wide_and_combining_characters(before: str, space: str) -> None:
    with pytest.raises(ValueError, match="has no meaning here") as caught:
        lk.Formula.parse(f"{before}% b")
    assert str(caught.value).splitlines()[1:] == [f"  {before}% b", f"  {space}^"]


def test_formulas_do_not_change() -> None:
    with pytest.raises(AttributeError):
        a.name = "b"  # type: ignore[misc]
