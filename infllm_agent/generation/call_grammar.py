"""Calls of tools, in the form in which a model writes them, as Lark grammars."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from infllm_agent.chat.call_form import CALL_ID, ID_HOLE
from infllm_agent.chat.format import ChatFormat
from infllm_agent.tools import dumps


class CallGrammar:
    """Lark grammars of answers with calls in one form."""

    def __init__(self, chat: ChatFormat, *, parallel: bool) -> None:
        self._encoder = encoder = chat.encoder
        self._form, self._reader = form, reader = chat.tools.form, chat.reader
        self._parallel = parallel
        self._control = re.compile("|".join(map(re.escape, encoder.control_texts)) or "(?!)")
        # Further control tokens in free text, such as those of a think block, stay what they are.
        free = sorted(encoder.control_ids - chat.stop_ids - reader.codes.keys())
        self._free = f"<[{_ranges(free)}]>" if free else ""
        # A form without a marker, or with one that is no token: the text itself tells.
        self._spelled = not form.opener or self._control.fullmatch(form.opener) is None

    def forced(self, functions: Sequence[tuple[str, str]], instead: str = "") -> str:
        """Describe calls, or what the expression ``instead`` describes."""
        form = self._form
        more = f"({self._text(form.between)} call)*" if self._parallel and form.between is not None else ""
        start = f"start: {self._text(form.alone)} call {more} {self._text(form.end)}"
        start += f" | {instead}" if instead else ""
        return "\n".join([start, self._call(functions)])

    def text_only(self) -> str:
        """Describe text in which no call can be opened."""
        return "\n".join(["start: text", self._free_text()])

    def voluntary(self, functions: Sequence[tuple[str, str]]) -> str:
        """Describe text in which calls may be opened."""
        form, opener = self._form, self._form.opener
        rest = form.alone.partition(opener)[2] if opener else form.alone
        block = f"{self._text(rest)} call {self._text(form.end)}"
        if form.closer or not opener:  # otherwise a block holds all calls, and nothing follows it
            many, after = "*" if self._parallel else "?", "text"
        else:
            more = f"({self._text(form.between)} call)*" if self._parallel and form.between is not None else ""
            block = f"{self._text(rest)} call {more} {self._text(form.end)}"
            many, after = "?", ""
        if not opener:
            tag = [f"<[{token}]>?" for token in self._reader.codes]
            lines = [f"start: text | {' '.join(tag)} {block}"]
        elif self._spelled:
            before = f"( FREE? {self._free} )*" if self._free else ""
            lines = [
                f"start: ( {before} opened {block} ){many} text",
                f"opened[lazy]: /(?s:.*){_regex(opener)}/",
                f"FREE: {self._without_opener()}",
            ]
        elif after:
            lines = [f"start: text ( {self._text(opener)} {block} text ){many}"]
        else:
            lines = [f"start: text ( {self._text(opener)} {block} )?"]
        return "\n".join([*lines, self._free_text(), self._call(functions)])

    def _call(self, functions: Sequence[tuple[str, str]]) -> str:
        middle = self._text(self._form.middle)
        names = (json.dumps(dumps(name)[1:-1] if self._form.quotes_name else name) for name, _ in functions)
        return "call: " + " | ".join(
            f"{name} {middle} {schema}" for name, (_, schema) in zip(names, functions, strict=True)
        )

    def _free_text(self) -> str:
        more = f"( {self._free} TEXT? )*" if self._free else ""
        return f"text: TEXT? {more}\nTEXT: {self._without_opener()}"

    def _without_opener(self) -> str:
        if not self._form.opener:
            return '/(?s:.+)/ & ~/\\s*\\{\\s*"name"(?s:.*)/'
        return f"/(?s:.+)/ & ~/(?s:.*){_regex(self._form.opener)}(?s:.*)/" if self._spelled else "/(?s:.+)/"

    def _text(self, control_text: str | None) -> str:
        """Write control text as a sequence of tokens and literals."""
        items: list[str] = []
        place = 0
        text = control_text or ""
        for found in self._control.finditer(text):
            items += self._literals(text[place : found.start()])
            items += [f"<[{token}]>" for token in self._encoder.encode_control(found[0])]
            place = found.end()
        return " ".join([*items, *self._literals(text[place:])])

    def _literals(self, text: str) -> list[str]:
        holes = re.split(f"({ID_HOLE})", text)
        return [f"/{CALL_ID.pattern}/" if part == ID_HOLE else json.dumps(part) for part in holes if part]


def _regex(text: str) -> str:
    """Write a text as a regular expression between slashes."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _ranges(ids: Sequence[int]) -> str:
    """Write sorted ids as "3-10,12"."""
    ranges: list[list[int]] = []
    for token in ids:
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
