"""How a model is told of tools and writes calls, found in its chat template.

Small conversations are rendered, with tools and calls whose names and arguments are easy to find again. What stands
around them is the template's own text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from infllm_agent.chat.announcement import TOOLS_HOLE, Announcement, Frame, writers
from infllm_agent.chat.call_form import ID_HOLE, CallForm
from infllm_agent.tools import ToolSpec, dumps

# Contents that no template holds or changes.
_SYSTEM, _USER, _TEXT, _REPLY, _NEXT = (f"{letter}toolprobe7e2{letter}" for letter in "suvwx")
_RESULTS = ("result1probe7e2", "result2probe7e2")
_NAMES = ("name1probe7e2", "name2probe7e2")
_ARGUMENTS = ({"key1probe7e2": "value1probe7e2"}, {"key2probe7e2": "value2probe7e2"})
_IDS = ("Iprobe7e1", "Iprobe7e2")

Render = Callable[..., str | None]


class ToolProbe:
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
        """Find the announcement; None where the template does not announce tools with the first message, or writes them
        in another way."""
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
        for write in writers():
            first, second = (write(tool) for tool in self._tools)
            for side in (head, tail):
                if side.count(first) == side.count(second) == 1 and side.index(first) < side.index(second):
                    separator = side[side.index(first) + len(first) : side.index(second)]
                    listing = first + separator + second
                    head, tail = (side.replace(listing, TOOLS_HOLE) for side in (head, tail))
                    return Announcement(Frame(head, self._later(plain, head), tail), write, separator)
        return None

    def _later(self, plain: Frame, head: str) -> str:
        """Find the head of a message that announces tools later on: what the tools add, put into the usual head."""
        if TOOLS_HOLE not in head:
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
        """Find the form of calls; None where the template shows no calls, or not as JSON arguments behind a name."""
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
        """Render a conversation with an assistant's message of ``count`` calls; the turn, and the arguments as they
        stand in it."""
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
        """Cut the usual control text off what stands between the user's content and the first name."""
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
