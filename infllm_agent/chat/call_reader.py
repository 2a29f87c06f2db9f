"""Finding the calls in what a model wrote.

A marker that the vocabulary has a token for (Qwen's ``<tool_call>``, Mistral's ``[TOOL_CALLS]``) opens a call as that
token only: a model that repeats what a tool has printed must not make calls of it. So the ids are what is read, and in
their text each such token is a lone surrogate, which no decoding ever gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from infllm_agent.chat.call_form import CALL_ID, ID_HOLE, CallForm
from infllm_agent.chat.encoder import TextEncoder
from infllm_agent.tools import InvalidCall, ToolCall, dumps, load_first, loads, plain_json

#: Llama's announcement of code, and now and then of calls.
PYTHON_TAG = "<|python_tag|>"


class Parsed(NamedTuple):
    """What a model wrote: its text without the valid calls, the calls, and what was meant as a call but is invalid.

    Invalid calls are left in the text, word for word.
    """

    text: str
    calls: tuple[ToolCall, ...]
    invalid: tuple[InvalidCall, ...]


class _Found(NamedTuple):
    """A call block [start, end) of the coded text, with its calls, or the reason why it has none."""

    start: int
    end: int
    calls: list[ToolCall]
    reason: str = ""


class _NoCall(ValueError):
    """Raised where what was written is not a call."""


class CallReader:
    """Reads calls in one form. "Coded" text has a lone surrogate for each token that is a marker of the form."""

    def __init__(self, form: CallForm, encoder: TextEncoder) -> None:
        written = "".join((form.alone, form.middle, form.between or "", form.end))
        self._codes: dict[str, str] = {}
        #: The code of each marker that is a token.
        self.codes: dict[int, str] = {}
        for text in encoder.control_texts:
            if text in written or (text == PYTHON_TAG and not form.opener):
                code = chr(0xD800 + len(self._codes))
                (token,) = encoder.encode_control(text)
                self._codes[text], self.codes[token] = code, code
        self.opener = self.coded(form.opener)
        self.closer = self.coded(form.closer)
        self._python_tag = self._codes.get(PYTHON_TAG, PYTHON_TAG)
        parts = [re.escape(self.coded(part.strip())) for part in form.middle.split(ID_HOLE)]
        arguments = parts[-1] if not form.quotes_name else re.escape(self.coded("[ARGS]"))
        id = rf"(?:{parts[0]}\s*({CALL_ID.pattern}))?" if len(parts) > 1 and not form.quotes_name else "()"
        self._named = re.compile(rf"([A-Za-z0-9_.-]{{1,256}})\s*{id}\s*(?:{arguments})?\s*(?=\{{)")

    def coded(self, text: str) -> str:
        """Replace markers in a control text by the codes of their tokens."""
        for marker, code in self._codes.items():
            text = text.replace(marker, code)
        return text

    def plain(self, coded: str) -> str:
        """Replace the codes in a coded text by the markers that they stand for."""
        for marker, code in self._codes.items():
            coded = coded.replace(code, marker)
        return coded

    def opens_at(self, coded: str) -> int | None:
        """Find where a call begins, or may have begun, in a coded text that is still being written."""
        if self.opener:
            place = coded.find(self.opener)
            return None if place < 0 else place
        begun = coded.lstrip()
        return len(coded) - len(begun) if begun.startswith(("{", self._python_tag)) else None

    def parse(self, coded: str, names: Collection[str] | None = None, *, behind_text: bool = False) -> Parsed:
        """Divide a whole answer, or the part of one that is left ``behind_text``, into its text and its calls.

        ``names``: the tools there are; a bare JSON object that names none of them is a text. Elsewhere calls of
        unknown tools are calls: who runs the tools says what is wrong with them. Any text can be parsed.
        """
        pieces: list[str] = []
        calls: list[ToolCall] = []
        invalid: list[InvalidCall] = []
        end = 0
        for found in self._find(coded, names):
            if found.reason:
                pieces.append(coded[end : found.end])
                invalid.append(InvalidCall(self.plain(coded[found.start : found.end]), found.reason))
            else:
                pieces.append(coded[end : found.start].rstrip())
                calls += found.calls
            end = found.end
        rest = coded[end:]
        # White space around a call that has no text on its other side belongs to the call.
        pieces.append("" if calls and not rest.strip() else rest)
        text = "".join(pieces)
        if calls and not pieces[0] and not behind_text:
            text = text.lstrip()
        return Parsed(self.plain(text), tuple(calls), tuple(invalid))

    def _find(self, coded: str, names: Collection[str] | None) -> Iterator[_Found]:
        if not self.opener:
            yield from self._bare(coded, names)
            return
        place = coded.find(self.opener)
        while place >= 0:
            found = self._block(coded, place)
            yield found
            place = coded.find(self.opener, found.end)

    def _block(self, coded: str, start: int) -> _Found:
        """Read the block that the opener at ``start`` opens."""
        begin = _past_space(coded, start + len(self.opener))
        try:
            if not self.closer and (named := self._named.match(coded, begin)):
                arguments, end = self._load(coded, named.end())
                calls = [_call({"name": named[1], "arguments": arguments, "id": named[2] or None})]
            else:
                value, end = self._load(coded, begin)
                calls = [_call(item) for item in (value if isinstance(value, list) else [value])]
                if not calls:
                    raise _NoCall("it is an empty list")
            if self.closer:
                end = _past_space(coded, end)
                if not coded.startswith(self.closer, end):
                    raise _NoCall(f"it is not closed by {self.plain(self.closer)}")
                end += len(self.closer)
            return _Found(start, end, calls)
        except (ValueError, RecursionError) as error:
            reason = _reason(error)
            return _Found(start, self._end_of_invalid(coded, begin), [], reason)

    def _load(self, coded: str, start: int) -> tuple[Any, int]:
        """Read the JSON value that begins at ``start``, and find where it ends. A marker in one of its texts is part of
        that."""
        value, length = load_first(self.plain(coded[start:]), 0)
        end = start
        while length > 0:
            length -= len(self.plain(coded[end]))
            end += 1
        return value, end

    def _end_of_invalid(self, coded: str, begin: int) -> int:
        """Find the end of an invalid call: behind its closer, else at the next call, else at the end of the text."""
        following = coded.find(self.opener, begin)
        stop = len(coded) if following < 0 else following
        closed = coded.find(self.closer, begin, stop) if self.closer else -1
        return closed + len(self.closer) if closed >= 0 else stop

    def _bare(self, coded: str, names: Collection[str] | None) -> Iterator[_Found]:
        """Find calls in JSON objects that are the whole message."""
        place = _past_space(coded, 0)
        tagged = coded.startswith(self._python_tag, place)
        start, calls = place, []
        if tagged:
            place = _past_space(coded, place + len(self._python_tag))
        elif not coded.startswith("{", place):
            return
        try:
            while place < len(coded):
                value, place = self._load(coded, place)
                if not tagged and not _looks_like_call(value):
                    return  # an answer that is JSON
                calls.append(_call(value))
                if names is not None and not tagged and calls[-1].name not in names:
                    return
                place = _past_space(coded, place)
                if coded.startswith(";", place):
                    place = _past_space(coded, place + 1)
            if calls:
                yield _Found(start, len(coded), calls)
        except (ValueError, RecursionError) as error:
            reason = _reason(error)
            if tagged or calls or re.match(r'\{\s*"name"', coded[start:]):
                yield _Found(start, len(coded), [], reason)


class CodedStream:
    """Decodes generated ids one at a time: text, and codes for some tokens. Other special tokens are left out."""

    def __init__(self, tokenizer: Tokenizer, codes: Mapping[int, str]) -> None:
        self._tokenizer, self._codes = tokenizer, codes
        self._decode = DecodeStream(skip_special_tokens=True)

    def step(self, token: int) -> str:
        """Take one more token, and give the text that is now certain: whole characters only."""
        if token in self._codes:
            self._decode = DecodeStream(skip_special_tokens=True)
            return self._codes[token]
        return self._decode.step(self._tokenizer, token) or ""


def _call(item: Any) -> ToolCall:
    if not isinstance(item, dict):
        raise _NoCall(f"it is {dumps(item):.40}, not an object")
    if isinstance(item.get("function"), dict):  # the form of OpenAI's interface
        item = {**item, **item["function"]}
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise _NoCall("it has no name")
    arguments = item.get("arguments", item.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(arguments, dict):
        raise _NoCall(f"its arguments are {dumps(arguments):.40}, not an object")
    id = item.get("id")
    return ToolCall(name, arguments, plain_json(id) if isinstance(id, str) and id else None)


def _reason(error: Exception) -> str:
    if isinstance(error, _NoCall):
        return str(error)
    return f"it is no JSON: {error.msg if isinstance(error, json.JSONDecodeError) else error}"


def _looks_like_call(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and {"parameters", "arguments"} & value.keys() != set()
    )


def _past_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place
