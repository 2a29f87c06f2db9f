r"""How a model writes calls of tools.

The forms of the known families, as found:

    Qwen, SmolLM2, SmolLM3 (Hermes)   <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>, one block a call
    Mistral                           [TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}, ...]
    Mistral from v11 on               [TOOL_CALLS]name[ARGS]{...}, perhaps with [CALL_ID]id before [ARGS]
    Llama 3.1, 3.2                    {"name": ..., "parameters": {...}}, a single call that is the whole message
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from infllm_agent.tools import ToolCall, dumps

#: Stands where an id is to be put: that of the call whose name came last.
ID_HOLE = "\ue010"
#: What models write ids of: Mistral's templates refuse anything else.
CALL_ID = re.compile("[A-Za-z0-9]{9}")

_JSON_BEGIN = re.compile(r'\[?\s*\{\s*"')
_JSON_END = re.compile(r"[^}\]]*[}\]][\s}\]]*")


class Part(NamedTuple):
    """A piece of what a model reads: control text of the template, or text from outside."""

    text: str
    control: bool


@dataclass(frozen=True)
class CallForm:
    """The way in which calls are written: control text between names and arguments, with ``ID_HOLE`` where an id goes.

    ``alone`` + name + ``middle`` + arguments + (``between`` + name + ``middle`` + arguments) * n + ``end``, where
    ``after_text`` takes the place of ``alone`` behind a text. ``between`` is None where there can be one call only.
    """

    alone: str
    after_text: str
    middle: str
    between: str | None
    end: str

    @property
    def opener(self) -> str:
        """What tells a call from a text, or "" if only the JSON itself does."""
        found = _JSON_BEGIN.search(self.alone)
        return (self.alone[: found.start()] if found else self.alone).strip()

    @property
    def closer(self) -> str:
        """What stands behind the JSON of a call, or ""."""
        found = _JSON_END.match(self.end)
        return (self.end[found.end() :] if found else self.end).strip()

    @property
    def quotes_name(self) -> bool:
        """Whether the name stands in a JSON string."""
        return self.alone.endswith('"')

    @property
    def is_json(self) -> bool:
        """Whether what stands between opener and closer is JSON, or a name and JSON."""
        if not self.quotes_name:
            return self.alone.strip() == self.opener and re.search(r'["{}\s]', self.middle) is None
        written = "".join(part.text for part in self.parts([ToolCall("name", {})], after_text=False))
        try:
            json.loads(written.strip().removeprefix(self.opener).removesuffix(self.closer))
        except ValueError:
            return False
        return True

    def parts(self, calls: Sequence[ToolCall], *, after_text: bool) -> Iterator[Part]:
        """Write calls as a model is shown them. A form for one call only is repeated, a line for each."""
        for number, call in enumerate(calls):
            id = written_id(call.id or f"{call.name} {number}")
            if number == 0:
                yield Part(self.after_text if after_text else self.alone, True)
            elif self.between is None:
                yield Part("\n" + self.alone, True)
            yield Part(dumps(call.name)[1:-1] if self.quotes_name else call.name, False)
            yield from filled(self.middle, id)
            yield Part(dumps(call.arguments), False)
            if number == len(calls) - 1 or self.between is None:
                yield from filled(self.end, id)
            else:
                yield from filled(self.between, id)


HERMES = CallForm(
    alone='<tool_call>\n{"name": "',
    after_text='\n<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    end="}\n</tool_call>",
)


def written_id(id: str) -> str:
    """Write an id for forms that have one: as it is if they allow it, else as a short id made from it."""
    return id if CALL_ID.fullmatch(id) else short_id(id)


def short_id(seed: str) -> str:
    """Make an id of nine letters and digits from a seed; equal seeds give equal ids."""
    return hashlib.sha256(seed.encode("utf-8", "replace")).hexdigest()[:9]


def filled(text: str, id: str) -> Iterator[Part]:
    """Fill an id, which comes from outside, into the holes of a control text."""
    for number, piece in enumerate(text.split(ID_HOLE)):
        if number:
            yield Part(id, False)
        if piece:
            yield Part(piece, True)
