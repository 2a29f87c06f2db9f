r"""How one model is told of tools, and how it writes calls.

Both are found in the model's own chat template, by rendering small conversations with tools and calls whose names and
arguments are easy to find again. What stands around them is the template's own text (control text); the rest comes
from outside and is encoded as text, whatever it spells. A template that knows no tools, or has them in a form that is
not JSON, gets the Hermes form, which most open models have seen, explained in plain words.

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
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from infllm_agent.chat.encoder import TextEncoder
from infllm_agent.tools import ToolCall, ToolSpec, dumps

#: Stands where an id is to be put: of the call whose name came last.
ID_HOLE = "\ue010"
#: Stands where the list of tools is to be put.
_TOOLS_HOLE = "\ue011"
#: What models write ids of: Mistral's templates refuse anything else.
CALL_ID = re.compile("[A-Za-z0-9]{9}")

# Contents that no template holds or changes.
_SYSTEM, _USER, _TEXT, _REPLY, _NEXT = (f"{letter}toolprobe7e2{letter}" for letter in "suvwx")
_RESULTS = ("result1probe7e2", "result2probe7e2")
_NAMES = ("name1probe7e2", "name2probe7e2")
_ARGUMENTS = ({"key1probe7e2": "value1probe7e2"}, {"key2probe7e2": "value2probe7e2"})
_IDS = ("Iprobe7e1", "Iprobe7e2")

_JSON_BEGIN = re.compile(r'\[?\s*\{\s*"')
_JSON_END = re.compile(r"[^}\]]*[}\]][\s}\]]*")

Render = Callable[..., str | None]


class Part(NamedTuple):
    """A piece of what a model reads: control text of the template, or text from outside."""

    text: str
    control: bool


class Frame(NamedTuple):
    """The control text around one role's content, as ``chat.Wrapper`` has it."""

    first: str
    later: str
    tail: str


@dataclass(frozen=True)
class CallForm:
    """How calls are written: the control text between their names and arguments, with ``ID_HOLE`` where an id goes.

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
        """The calls as a model is shown them. A form for one call only is repeated, a line for each."""
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


_HERMES = CallForm(
    alone='<tool_call>\n{"name": "',
    after_text='\n<tool_call>\n{"name": "',
    middle='", "arguments": ',
    between='}\n</tool_call>\n<tool_call>\n{"name": "',
    end="}\n</tool_call>",
)


@dataclass(frozen=True)
class Announcement:
    """How a system message announces tools: its frame with ``_TOOLS_HOLE`` in it, and how each tool is written."""

    frame: Frame
    write: Callable[[dict[str, Any]], str]
    separator: str

    def parts(self, frame_text: str, tools: Sequence[ToolSpec]) -> Iterator[Part]:
        """One side of the frame, filled in."""
        before, hole, after = frame_text.partition(_TOOLS_HOLE)
        yield Part(before, True)
        if hole:
            for number, tool in enumerate(tools):
                if number:
                    yield Part(self.separator, True)
                yield Part(self.write(tool.to_json()), False)
        yield Part(after, True)


class ToolFormat:
    """One model's form of tools and calls, from its chat template.

    Args:
        render: messages (and ``tools``) to text; None where the template refuses them.
        system, user, assistant: the control text around these roles' contents; ``system`` equals ``user`` where the
            template has no system message.
        prompt: what asks the model for its turn.
        stops: texts of the control tokens that end a turn.

    ``native``: whether the template knows tools.
    """

    def __init__(
        self,
        render: Render,
        encoder: TextEncoder,
        *,
        system: Frame,
        user: Frame,
        assistant: Frame,
        prompt: str,
        stops: Sequence[str],
    ) -> None:
        self.encoder = encoder
        probe = _Probe(render, encoder.control_texts, system, user, assistant, prompt, stops)
        announcement, form = probe.announcement(), probe.call_form()
        told = "".join(announcement.frame) if announcement else ""
        if form is None and _HERMES.opener in told and '"arguments"' in told:
            form = _HERMES  # SmolLM3's template tells of calls but cannot show one
        self.native = announcement is not None and form is not None
        self.form = form or _HERMES
        if announcement is None or form is None:
            announcement = _plain_announcement(system, self.form)
        self._announcement = announcement

    def open_system(self, tools: Sequence[ToolSpec], *, first: bool) -> list[Part]:
        """What stands before the content of a system message that announces tools."""
        frame = self._announcement.frame
        return list(self._announcement.parts(frame.first if first else frame.later, tools))

    def close_system(self, tools: Sequence[ToolSpec]) -> list[Part]:
        """What stands behind it."""
        return list(self._announcement.parts(self._announcement.frame.tail, tools))

    def encode_calls(self, calls: Sequence[ToolCall], *, after_text: bool) -> list[int]:
        """The ids of calls that are read cold, to follow the text of an assistant's message."""
        return encode_parts(self.encoder, self.form.parts(calls, after_text=after_text))


def encode_parts(encoder: TextEncoder, parts: Iterator[Part] | Sequence[Part]) -> list[int]:
    """Ids of parts: added tokens are recognised in control text only."""
    return [
        token
        for part in parts
        for token in (encoder.encode_control(part.text) if part.control else encoder.encode_text(part.text))
    ]


def written_id(id: str) -> str:
    """The id as it stands in forms that have one: itself, if it is of their kind."""
    return id if CALL_ID.fullmatch(id) else short_id(id)


def short_id(seed: str) -> str:
    """An id of nine letters and digits, the same for the same seed."""
    return hashlib.sha256(seed.encode("utf-8", "replace")).hexdigest()[:9]


def filled(text: str, id: str) -> Iterator[Part]:
    """Control text with an id, which comes from outside, in its holes."""
    for number, piece in enumerate(text.split(ID_HOLE)):
        if number:
            yield Part(id, False)
        if piece:
            yield Part(piece, True)


def _plain_announcement(system: Frame, form: CallForm) -> Announcement:
    example = "".join(
        part.text for part in CallForm.parts(form, [ToolCall("<function-name>", {})], after_text=False)
    ).replace("{}", "<args-json-object>", 1)
    words = (
        "\n\n# Tools\n\nYou may call functions to help with the user's request. Their signatures are:\n<tools>\n"
        f"{_TOOLS_HOLE}\n</tools>\n\n"
        f"To call a function, write its name and its arguments as JSON, in this form:\n{example}"
    )
    return Announcement(Frame(system.first, system.later, words + system.tail), dumps, "\n")


def _writers() -> list[Callable[[dict[str, Any]], str]]:
    """The ways in which templates write a tool."""

    def of_function(write: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
        return lambda tool: write(tool["function"])

    def indented(tool: Any) -> str:
        return json.dumps(tool, ensure_ascii=False, indent=4)

    def indented_in_list(tool: Any) -> str:
        return textwrap.indent(indented(tool), "    ")

    def compact(tool: Any) -> str:
        return json.dumps(tool, ensure_ascii=False, separators=(",", ":"))

    whole: list[Callable[[Any], str]] = [dumps, indented_in_list, indented, compact, str]
    return [*whole, *map(of_function, whole)]


class _Probe:
    """Finds the forms by rendering conversations."""

    def __init__(
        self,
        render: Render,
        control_texts: Sequence[str],
        system: Frame,
        user: Frame,
        assistant: Frame,
        prompt: str,
        stops: Sequence[str],
    ) -> None:
        self._render = render
        self._unit = re.compile("|".join([*map(re.escape, control_texts), "."]), re.DOTALL)
        self._system, self._user, self._assistant = system, user, assistant
        self._prompt, self._stops = prompt, stops
        self._tools = [
            ToolSpec(
                name,
                f"{name} described",
                {
                    "type": "object",
                    "properties": {f"{name}arg": {"type": "string", "description": "one"}},
                    "required": [f"{name}arg"],
                },
            ).to_json()
            for name in _NAMES
        ]

    def announcement(self) -> Announcement | None:
        """None where the template does not announce tools with the first message, or writes them in another way."""
        own_system = self._system.tail != self._user.tail or self._system.first != self._user.first
        text = None
        if own_system:
            system = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}]
            text = self._render(system, tools=self._tools, tools_in_user_message=False, xml_tools=self._tools)
        if text is not None and text.count(_SYSTEM) == text.count(_USER) == 1:
            head, _, rest = text.partition(_SYSTEM)
            tail, _, _ = rest.partition(_USER)
            if not tail.endswith(self._user.later):
                return None
            plain, tail = self._system, tail.removesuffix(self._user.later)
        else:
            text = self._render([{"role": "user", "content": _USER}], tools=self._tools)
            if own_system or text is None or text.count(_USER) != 1:
                return None
            plain = self._user
            head, tail = text.partition(_USER)[0], plain.tail
        for write in _writers():
            first, second = (write(tool) for tool in self._tools)
            for side in (head, tail):
                if side.count(first) == side.count(second) == 1 and side.index(first) < side.index(second):
                    separator = side[side.index(first) + len(first) : side.index(second)]
                    listing = first + separator + second
                    head, tail = (side.replace(listing, _TOOLS_HOLE) for side in (head, tail))
                    return Announcement(Frame(head, self._later(plain, head), tail), write, separator)
        return None

    def _later(self, plain: Frame, head: str) -> str:
        """The head of a message that announces tools later on: what the tools add, put into the usual head."""
        if _TOOLS_HOLE not in head:
            return plain.later
        usual, units = self._unit.findall(plain.first), self._unit.findall(head)
        shared = 0
        while shared < min(len(usual), len(units)) and usual[shared] == units[shared]:
            shared += 1
        rest, added = "".join(usual[shared:]), "".join(units[shared:])
        if rest and added.endswith(rest) and plain.later.endswith(rest):  # they stand before what opens the message
            return plain.later.removesuffix(rest) + added
        return plain.later + added

    def call_form(self) -> CallForm | None:
        """None where the template does not show calls, or not as JSON arguments behind a name."""
        one = self._calls(1, "")
        if one is None:
            return None
        text, arguments = one
        head, _, rest = text.partition(_NAMES[0])
        middle, found, rest = rest.partition(arguments[0])
        end = self._before_stop(rest)
        if not found or end is None or _RESULTS[0] in middle:
            return None
        alone = self._own_part(head)
        after_text = alone
        if with_text := self._calls(1, _TEXT):
            before, found, _ = with_text[0].partition(_NAMES[0])
            if found and before.count(_TEXT) == 1:
                after_text = before.partition(_TEXT)[2]
        between = None
        if two := self._calls(2, ""):
            rest = two[0].partition(two[1][0])[2]
            between, found, rest = rest.partition(_NAMES[1])
            end_of_two = self._before_stop(rest.partition(two[1][1])[2])
            if not found or end_of_two is None or _holed(end_of_two) != _holed(end):
                between = None
        form = CallForm(
            alone=_holed(alone),
            after_text=_holed(after_text),
            middle=_holed(middle),
            between=None if between is None else _holed(between),
            end=_holed(end),
        )
        return form if form.is_json else None

    def _calls(self, count: int, content: str) -> tuple[str, list[str]] | None:
        """A conversation with an assistant's message of so many calls, and the arguments as they stand in it."""
        arguments = _ARGUMENTS[:count]
        results = [
            {"role": "tool", "content": result, "name": name, "tool_call_id": id}
            for result, name, id in zip(_RESULTS[:count], _NAMES, _IDS, strict=False)
        ]
        for given in (arguments, [dumps(value) for value in arguments]):
            calls = [
                {"id": id, "type": "function", "function": {"name": name, "arguments": value}}
                for id, name, value in zip(_IDS, _NAMES, given, strict=False)
            ]
            messages = [
                {"role": "user", "content": _USER},
                {"role": "assistant", "content": content, "tool_calls": calls},
                *results,
                {"role": "assistant", "content": _REPLY},
                {"role": "user", "content": _NEXT},
            ]
            # The tools come last: some templates announce them before the last message only, away from the calls.
            for options in ({}, {"tools": self._tools, "tools_in_user_message": False}):
                text = self._render(messages, **options)
                if text is None or text.count(_USER) != 1:
                    continue
                turn = text.partition(_USER)[2].partition(_NEXT)[0]
                written = [dumps(value) for value in arguments]
                if all(turn.count(value) == 1 for value in written):
                    return turn, written
        return None

    def _own_part(self, head: str) -> str:
        """What is left between the user's content and the first name when the usual control text is taken away."""
        head = head.removeprefix(self._user.tail)
        for usual in (self._prompt, self._assistant.later):
            if usual and head.startswith(usual):
                return head.removeprefix(usual)
        return head

    def _before_stop(self, rest: str) -> str | None:
        places = [place for place in (rest.find(stop) for stop in self._stops if stop) if place >= 0]
        return rest[: min(places)] if places else None


def _holed(text: str) -> str:
    return text.replace(_IDS[0], ID_HOLE).replace(_IDS[1], ID_HOLE)
