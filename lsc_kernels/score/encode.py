"""From text to token ids: where the response starts, what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..wording import first_line
from .data import ASSISTANT, HUMAN, Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and response; the response is ``ids[start:]``; how many tokens of each were cut."""

    ids: list[int]
    start: int
    prompt_cut: int = 0
    response_cut: int = 0


Encoding: TypeAlias = Encoded | str  # a str says why a row cannot be encoded


def encoded(encoding: Encoding) -> Encoded:
    """The encoding of a row that is known to have one."""
    assert isinstance(encoding, Encoded), encoding
    return encoding


class TextEncoder:
    """Turns rows into the token ids one model sees.

    Prompt and response are tokenised as one text, and the response starts where that differs from the
    prompt's own tokens: a token that spans the border belongs to the response. Text that does not fit into
    ``limit`` tokens loses the oldest tokens of the prompt first, and the end of the response only when the
    response alone is too long; special tokens at the ends stay.

    Args:
        tokenizer: the model's own tokenizer; it needs no padding token.
        limit: the most tokens the model takes; None for no limit.
        chat: ``auto`` (the chat template for chats), ``always`` (for text too), ``never``.
        append_eos: end plain text with the end-of-sequence token (a chat template writes its own).
        for_policy: the ids are actions to be given log-probabilities. The first one then needs a token before
            it, and what a chat template writes after the end of the turn is left out, being never sampled.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None,
        chat: str,
        append_eos: bool,
        for_policy: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self.append_eos = append_eos and tokenizer.eos_token_id is not None
        self.for_policy = for_policy
        self.chat = chat if getattr(tokenizer, "chat_template", None) else "never"
        added = {token for token, what in tokenizer.added_tokens_decoder.items() if what.special}
        self.special = added | set(tokenizer.all_special_ids)

    def encode(self, examples: Sequence[Example]) -> list[Encoding]:
        """Encode rows; a row that cannot be encoded gives the reason instead."""
        texts = [self._texts(example) for example in examples]
        encodings: list[Encoding] = [text if isinstance(text, str) else "" for text in texts]
        for templated in (False, True):
            rows = {
                row: text
                for row, text in enumerate(texts)
                if not isinstance(text, str) and text[2] is templated
            }
            # Both sides of a pair and all answers to one prompt share it: each text is tokenised once.
            unique = list(dict.fromkeys(text for prompt, full, _ in rows.values() for text in (prompt, full)))
            ids = dict(zip(unique, self._tokenize(unique, templated), strict=True))
            for row, (prompt, full, _) in rows.items():
                encodings[row] = self._finish(ids[prompt], ids[full], templated)
        return encodings

    def _texts(self, example: Example) -> tuple[str, str, bool] | str:
        """Prompt, prompt with response, and whether a chat template wrote them; or why that failed."""
        is_text = isinstance(example.prompt, str)
        if self.chat == "never" or (self.chat == "auto" and is_text):
            prompt = example.prompt_text
            # The plain format puts a space after "Assistant:"; text brings its own.
            return prompt, prompt + ("" if is_text else " ") + example.response, False
        turns = _turns(example.prompt) if isinstance(example.prompt, str) else example.prompt
        messages = [{"role": role, "content": content} for role, content in turns]
        answer = {"role": "assistant", "content": example.response.strip() if is_text else example.response}
        try:
            full = self._template([*messages, answer])
            for generation in (True, False):
                prompt = self._template(messages, add_generation_prompt=generation)
                if full.startswith(prompt):
                    return prompt, full, True
        except Exception as problem:  # a template is a program of its own and may raise anything
            return f"the chat template refuses it: {first_line(problem)}"
        return "the chat template rewrites the prompt once the response is there"

    def _template(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _tokenize(self, texts: list[str], templated: bool) -> list[list[int] | str]:
        """Token ids of each text, or why the tokenizer refuses it."""
        # A chat template writes the special tokens itself.
        options = {"add_special_tokens": not templated, "return_attention_mask": False, "verbose": False}
        try:
            return list(self.tokenizer(texts, **options)["input_ids"]) if texts else []
        except Exception as problem:  # the tokenizers library raises nothing more specific
            if len(texts) == 1:
                return [f"the tokenizer refuses it: {first_line(problem)}"]
            return [ids for text in texts for ids in self._tokenize([text], templated)]

    def _finish(self, prompt: list[int] | str, full: list[int] | str, templated: bool) -> Encoding:
        if isinstance(prompt, str):
            return prompt
        if isinstance(full, str):
            return full
        start = _shared_length(prompt, full)
        ids = list(full)
        if self.for_policy and templated:
            ids = ids[: self._end_of_turn(ids, start)]
        if self.append_eos and not templated and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        if all(token in self.special for token in full[start:]):
            return "the tokenizer makes no tokens of the response"
        if self.for_policy and start == 0:
            before = self.tokenizer.bos_token_id
            before = self.tokenizer.eos_token_id if before is None else before
            if before is None:
                return "the prompt has no tokens, and the tokenizer no token to begin a text with"
            ids, start = [before, *ids], 1
        return self._fit(ids, start)

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Where the turn ends: behind its last special token, if only white space follows that."""
        for end in range(len(ids), start, -1):
            if ids[end - 1] in self.special:
                return end
            if str(self.tokenizer.decode(ids[end - 1 : end])).strip():
                break
        return len(ids)

    def _fit(self, ids: list[int], start: int) -> Encoding:
        if self.limit is None or len(ids) <= self.limit:
            return Encoded(ids, start)
        head = 1 if start > 0 and ids[0] in self.special else 0
        tail = 1 if not self.for_policy and ids[-1] in self.special else 0
        # At least one token of context stays: the first response token is predicted from it.
        kept_prompt = min(start, max(self.limit - (len(ids) - start), head, 1 if self.for_policy else 0))
        kept_response = min(len(ids) - start, self.limit - kept_prompt)
        prompt = ids[:head] + ids[start - (kept_prompt - head) : start]
        response = ids[start : start + kept_response - tail] + ids[len(ids) - tail :]
        return Encoded(prompt + response, len(prompt), start - kept_prompt, len(ids) - start - kept_response)


def _shared_length(one: list[int], other: list[int]) -> int:
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))


def _turns(prompt: str) -> tuple[Message, ...]:
    """The turns of a dialogue in the plain format; any other text is one turn of the user."""
    if not prompt.startswith(HUMAN) or not prompt.rstrip().endswith(ASSISTANT.strip()):
        return (("user", prompt),)
    turns: list[Message] = []
    rest = prompt.rstrip()[: -len(ASSISTANT)]
    for piece in rest.split(HUMAN)[1:]:
        said, *answers = piece.split(ASSISTANT)
        turns += [("user", said.strip()), *(("assistant", answer.strip()) for answer in answers)]
    return tuple(turns)
