"""Reading (prompt, response) rows from JSON lines, Parquet and Hugging Face datasets.

A record is one line of a file; an example is one row to score. A record gives one example, or two when it is
a ``chosen``/``rejected`` pair. A record that cannot be read is a `BadLine` and does not stop the reading.
Data is streamed: one pass counts and checks it (`scan`), a second one hands it out in windows (`windows`).
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import math
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UserError
from ..wording import first_line
from .config import LARGEST, is_text
from .extras import offline_note, quiet_hub, require

if TYPE_CHECKING:
    from .config import DataSource, ScoreConfig

Message: TypeAlias = tuple[str, str]  # role, content
Side: TypeAlias = tuple[str | None, str | tuple[Message, ...], str]  # side, prompt, response
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TEXT_FIELDS = ("id", "prompt", "response", "completion", "messages", "chosen", "rejected")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Example:
    """One row to score. ``prompt`` is plain text, or the turns of a chat before the response."""

    line: int
    id: str | None
    side: str | None
    prompt: str | tuple[Message, ...]
    response: str
    columns: tuple[float, ...] = ()

    @property
    def prompt_text(self) -> str:
        """The prompt in the plain format."""
        return self.prompt if isinstance(self.prompt, str) else plain_text(self.prompt)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A record that could not be scored: its number in the data, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Scan:
    """What one pass over the data found: how much, its digest, the bad lines, the first good rows."""

    records: int
    examples: int
    characters: int
    digest: str
    bad: tuple[BadLine, ...]
    first: tuple[Example, ...]


class BadRecord(Exception):
    """Why a record cannot be scored."""


def plain_text(messages: Sequence[Message]) -> str:
    """A chat without a chat template: the format of the hh-rlhf data, ending where the assistant speaks next.

    >>> plain_text([("system", "Be brief."), ("user", "Hi.")])
    'Be brief.\\n\\nHuman: Hi.\\n\\nAssistant:'
    """
    spoken = {"user": HUMAN + " ", "assistant": ASSISTANT + " ", "system": ""}
    turns = [spoken.get(role, f"\n\n{role.capitalize()}: ") + content for role, content in messages]
    return "".join(turns) + ASSISTANT


class Data:
    """The records of one data source, read anew on every iteration.

    Args:
        source: a file, a saved dataset, the name of a hub dataset (``name`` or ``name:split``), or records.
        limit: how many records to take; all when None.
        seed: takes them at random, in input order, instead of the first ones.
        columns: the columns that hold reference rewards.

    Raises:
        UserError: there is no such data, or it cannot be read at all.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        limit: int | None = None,
        seed: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        self.columns = tuple(columns)
        self.limit = limit
        self._records = _open(source, TEXT_FIELDS + self.columns)
        self._sample: frozenset[int] | None = None
        if limit is not None and seed is not None:
            total = sum(1 for _ in self._records())
            self._sample = frozenset(random.Random(seed).sample(range(total), min(limit, total)))

    @classmethod
    def from_config(cls, config: ScoreConfig) -> Data:
        """The data that a scoring run is told to read."""
        return cls(config.data, limit=config.limit, seed=config.seed, columns=config.reference_columns())

    def __iter__(self) -> Iterator[list[Example] | BadLine]:
        for position, (line, record) in enumerate(self._records()):
            if self._sample is not None:
                if position not in self._sample:
                    continue
            elif self.limit is not None and position >= self.limit:
                return
            try:
                if isinstance(record, BadRecord):
                    raise record
                yield examples_of(line, record, self.columns)
            except BadRecord as problem:
                yield BadLine(line, str(problem))

    def scan(self, keep: int = 16) -> Scan:
        """Read everything once: count, check, digest, and keep the first few rows."""
        digest = hashlib.sha256()
        records = examples = characters = 0
        bad: list[BadLine] = []
        first: list[Example] = []
        for item in self:
            records += 1
            if isinstance(item, BadLine):
                bad.append(item)
                continue
            for example in item:
                examples += 1
                characters += size(example)
                digest.update(repr(example).encode("utf-8", "surrogatepass"))
                if len(first) < keep:
                    first.append(example)
        return Scan(records, examples, characters, digest.hexdigest(), tuple(bad), tuple(first))

    def windows(self, rows: int) -> Iterator[list[Example]]:
        """The good rows in input order, in lists of ``rows``."""
        window: list[Example] = []
        for item in self:
            if isinstance(item, BadLine):
                continue
            for example in item:
                window.append(example)
                if len(window) == rows:
                    yield window
                    window = []
        if window:
            yield window


def size(example: Example) -> int:
    """Characters of a row: what the progress bar counts, since the work grows with it."""
    prompt = example.prompt
    return len(example.response) + (
        len(prompt) if isinstance(prompt, str) else sum(len(content) for _, content in prompt)
    )


def examples_of(line: int, record: Any, columns: Sequence[str] = ()) -> list[Example]:
    """The rows of one record.

    Raises:
        BadRecord: fields are missing, empty or of the wrong kind.
    """
    if not isinstance(record, Mapping):
        raise BadRecord("not an object with named fields")
    given = {key for key in TEXT_FIELDS if record.get(key) is not None}
    if {"chosen", "rejected"} <= given:
        sides = _pair(record)
    elif "messages" in given:
        sides = [
            (None, *_split_chat(_messages(record["messages"], "messages", "no list of messages"), "messages"))
        ]
    elif "prompt" in given and given & {"response", "completion"}:
        field = "response" if "response" in given else "completion"
        sides = [(None, _prompt(record["prompt"]), _response(record[field], field))]
    else:
        raise BadRecord(_what_is_missing(given))
    for side, _, response in sides:
        if not response.strip():
            raise BadRecord("response is empty" if side is None else f"{side} response is empty")
    own_id = None if record.get("id") is None else str(record["id"])
    _check_characters(own_id, sides)
    references = tuple(_reference(record, column) for column in columns)
    return [Example(line, own_id, side, prompt, response, references) for side, prompt, response in sides]


def _check_characters(own_id: str | None, sides: Sequence[Side]) -> None:
    """JSON can spell what is no character, and what no tokenizer and no Parquet file takes."""
    texts = {"id": own_id or ""}
    for side, prompt, response in sides:
        spoken = [prompt] if isinstance(prompt, str) else [part for message in prompt for part in message]
        texts |= {"prompt": "".join(spoken), side or "response": response}
    for field, text in texts.items():
        if not is_text(text):
            raise BadRecord(f"{field} holds half a character (a lone surrogate)")


def _pair(record: Mapping[str, Any]) -> list[Side]:
    chosen, rejected, prompt = record["chosen"], record["rejected"], record.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("chosen and rejected are of different kinds")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            shared, first, second = split_dialogues(chosen, rejected)
            return [("chosen", shared, first), ("rejected", shared, second)]
        before = _prompt(prompt)
        # Some data sets repeat the prompt inside both sides; counting it as response would score it twice.
        cut = (
            len(before) if isinstance(before, str) and before and _both_start(chosen, rejected, before) else 0
        )
        return [("chosen", before, chosen[cut:]), ("rejected", before, rejected[cut:])]
    sides: list[Side] = []
    before_chat = () if prompt is None else _as_chat(_prompt(prompt))
    for side in ("chosen", "rejected"):
        turns = _messages(record[side], side)
        # With a prompt of its own, a side holds either the answer alone or the whole chat again.
        whole = turns if turns[: len(before_chat)] == before_chat else before_chat + turns
        sides.append((side, *_split_chat(whole, side)))
    return sides


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Split two whole dialogues into the shared prompt, up to the last ``Assistant:``, and the two responses.

    >>> split_dialogues("\\n\\nHuman: Hi\\n\\nAssistant: Yes", "\\n\\nHuman: Hi\\n\\nAssistant: No")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Yes', ' No')

    Raises:
        BadRecord: they share no ``Assistant:``.
    """
    shared = os.path.commonprefix([chosen, rejected])
    at = shared.rfind(ASSISTANT)
    if at < 0:
        raise BadRecord("chosen and rejected share no beginning up to 'Assistant:', and there is no prompt")
    end = at + len(ASSISTANT)
    return shared[:end], chosen[end:], rejected[end:]


def _both_start(chosen: str, rejected: str, prompt: str) -> bool:
    return chosen.startswith(prompt) and rejected.startswith(prompt)


def _split_chat(messages: tuple[Message, ...], field: str) -> tuple[tuple[Message, ...], str]:
    if not messages or messages[-1][0] != "assistant":
        raise BadRecord(f"{field} does not end with a turn of the assistant")
    if len(messages) == 1:
        raise BadRecord(f"{field} has no turn before the response")
    return messages[:-1], messages[-1][1]


def _messages(
    given: Any, field: str, wanted: str = "neither text nor a list of messages"
) -> tuple[Message, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise BadRecord(f"{field} is {wanted}")
    return tuple(_message(message, field) for message in given)


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRecord(f"{field}: a message wants a role and a content")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise BadRecord(f"{field}: the content of a message is not text")
    return message["role"], content


def _prompt(given: Any) -> str | tuple[Message, ...]:
    if isinstance(given, str):
        return given
    messages = _messages(given, "prompt")
    if not messages:
        raise BadRecord("prompt is empty")
    return messages


def _as_chat(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    return (("user", prompt),) if isinstance(prompt, str) else prompt


def _response(given: Any, field: str) -> str:
    if isinstance(given, str):
        return given
    messages = _messages(given, field)
    if len(messages) != 1 or messages[0][0] != "assistant":
        raise BadRecord(f"{field} is not one turn of the assistant")
    return messages[0][1]


def _reference(record: Mapping[str, Any], column: str) -> float:
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise BadRecord(f"reference column {column!r} holds no finite number but {value!r}")
    if not abs(value) <= LARGEST:
        raise BadRecord(f"reference column {column!r} holds a number beyond {LARGEST:g}")
    return float(value)


def _what_is_missing(given: set[str]) -> str:
    for one, other in (("chosen", "rejected"), ("rejected", "chosen"), ("prompt", "response")):
        if one in given:
            return f"has {one} but no {other}"
    if given & {"response", "completion"}:
        return f"has {min(given & {'response', 'completion'})} but no prompt"
    return "has neither prompt and response, nor messages, nor chosen and rejected"


def _open(source: DataSource, fields: Sequence[str]) -> Any:
    """A function that starts reading the source from its beginning: yields (number from 1, record)."""
    if not isinstance(source, str | Path):
        return lambda: enumerate(source, start=1)
    path = Path(source)
    name = path.name.lower()
    if path.is_file():
        if name.endswith(".parquet"):
            return _parquet_reader(path, fields)
        if name.endswith(JSON_SUFFIXES):
            return lambda: _read_json(path)
        raise UserError(
            f"--data {source}: unknown kind of file; wants {', '.join(JSON_SUFFIXES)} or .parquet"
        )
    if path.is_dir():
        return _dataset_reader(_saved_dataset(path, None), str(source), fields)
    folder, colon, split = str(source).rpartition(":")
    if colon and Path(folder).is_dir():
        return _dataset_reader(_saved_dataset(Path(folder), split), str(source), fields)
    if (
        name.endswith((*JSON_SUFFIXES, ".parquet"))
        or path.is_absolute()
        or str(source).startswith((".", "~"))
    ):
        raise UserError(f"--data {source}: no such file")
    return _dataset_reader(_hub_dataset(str(source)), str(source), fields)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            if path.name.lower().endswith((".json", ".json.gz")) and _first_byte(file) == b"[":
                file.seek(0)
                yield from enumerate(_json_array(path, file.read()), start=1)
                return
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, _json_line(line)
    except (OSError, EOFError, zlib.error) as problem:
        raise UserError(f"--data {path}: cannot be read after line {number}: {problem}") from problem


def _first_byte(file: BufferedIOBase) -> bytes:
    """The first byte that is neither white space nor the mark that some programs begin UTF-8 with."""
    for piece in iter(lambda: file.read(1024), b""):
        if begun := piece.removeprefix(codecs.BOM_UTF8).lstrip():
            return begun[:1]
    return b""


def _json_array(path: Path, text: bytes) -> list[Any]:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"--data {path}: not valid JSON: {problem}") from problem


def _json_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except UnicodeDecodeError:
        return BadRecord("not UTF-8 text")
    except (ValueError, RecursionError):
        return BadRecord("not valid JSON")


def _parquet_reader(path: Path, fields: Sequence[str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"--data {path}: cannot be read as Parquet: {first_line(problem)}") from problem
    wanted = _wanted_columns(names, fields, str(path))

    def read() -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(PARQUET_BATCH, columns=wanted):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, record
        except (pa.ArrowException, OSError) as problem:
            raise UserError(
                f"--data {path}: cannot be read after row {number}: {first_line(problem)}"
            ) from problem

    return read


def _dataset_reader(dataset: Any, source: str, fields: Sequence[str]) -> Any:
    if isinstance(dataset, dict):
        splits = ", ".join(dataset)
        raise UserError(
            f"--data {source}: holds several splits ({splits}); say which, as {source}:{next(iter(dataset))}"
        )
    chosen = dataset.select_columns(_wanted_columns(dataset.column_names, fields, source))
    return lambda: enumerate(chosen, start=1)


def _saved_dataset(path: Path, split: str | None) -> Any:
    require("datasets")
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as problem:
        raise UserError(f"--data {path}: a folder, but not a dataset written by save_to_disk") from problem
    except Exception as problem:
        raise UserError(f"--data {path}: cannot be loaded: {first_line(problem)}") from problem
    if split is None:
        return dataset
    if not isinstance(dataset, dict) or split not in dataset:
        has = ", ".join(dataset) if isinstance(dataset, dict) else "no splits"
        raise UserError(f"--data {path}:{split}: no such split; the dataset has {has}")
    return dataset[split]


def _hub_dataset(source: str) -> Any:
    require("datasets")
    from datasets import load_dataset

    name, colon, split = source.rpartition(":")
    name, split = (name, split) if colon else (source, "train")
    offline = offline_note()
    try:
        with quiet_hub(offline=bool(offline)):
            return load_dataset(name, split=split)
    except Exception as problem:
        raise UserError(
            f"--data {source}: no such file or folder, and the Hugging Face hub gave no dataset {name!r} "
            f"with split {split!r}: {offline or first_line(problem)}"
        ) from problem


def _wanted_columns(names: Sequence[str], fields: Sequence[str], source: str) -> list[str]:
    wanted = [name for name in names if name in fields]
    if not set(wanted) & set(TEXT_FIELDS) - {"id"}:
        raise UserError(
            f"--data {source}: has the columns {', '.join(names)}; wants prompt and response, messages, "
            "or chosen and rejected"
        )
    return wanted
