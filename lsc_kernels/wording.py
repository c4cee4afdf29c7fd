"""How messages are worded, in every command alike."""

from __future__ import annotations

MOST_OF_A_LINE = 300


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, whose plural ends in s unless it is given.

    >>> counted(1, "row"), counted(0, "row"), counted(2, "property", "properties")
    ('1 row', '0 rows', '2 properties')
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def first_line(problem: BaseException) -> str:
    """The first line of what an error says, which is the part that fits in a one-line message; where it ends in a colon
    it says nothing without those behind it.

    >>> first_line(ValueError("no such size\\nsee the manual")), first_line(ValueError("wants one of:\\n a,\\n b"))
    ('no such size', 'wants one of: a, b')
    """
    lines = [line.strip() for line in str(problem).strip().splitlines()]
    if not lines:
        return type(problem).__name__
    return lines[0] if not lines[0].endswith(":") else " ".join(lines)[:MOST_OF_A_LINE]
