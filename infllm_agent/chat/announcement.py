"""How a model is told of tools: in a system message that announces them."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from infllm_agent.chat.call_form import CallForm, Part
from infllm_agent.tools import ToolCall, ToolSpec, dumps

#: Stands where the list of tools is to be put.
TOOLS_HOLE = "\ue011"


class Frame(NamedTuple):
    """The control text around one role's content, as ``Wrapper`` has it."""

    first: str
    later: str
    tail: str


@dataclass(frozen=True)
class Announcement:
    """The way in which a system message announces tools: a frame with ``TOOLS_HOLE`` in it, and how a tool is
    written."""

    frame: Frame
    write: Callable[[dict[str, Any]], str]
    separator: str

    def parts(self, frame_text: str, tools: Sequence[ToolSpec]) -> Iterator[Part]:
        """Fill in one side of the frame."""
        before, hole, after = frame_text.partition(TOOLS_HOLE)
        yield Part(before, True)
        if hole:
            for number, tool in enumerate(tools):
                if number:
                    yield Part(self.separator, True)
                yield Part(self.write(tool.to_json()), False)
        yield Part(after, True)


def plain_announcement(system: Frame, form: CallForm) -> Announcement:
    """Announce tools in plain words, for a template that knows none."""
    example = "".join(
        part.text for part in CallForm.parts(form, [ToolCall("<function-name>", {})], after_text=False)
    ).replace("{}", "<args-json-object>", 1)
    words = (
        "\n\n# Tools\n\nYou may call functions to help with the user's request. Their signatures are:\n<tools>\n"
        f"{TOOLS_HOLE}\n</tools>\n\n"
        f"To call a function, write its name and its arguments as JSON, in this form:\n{example}"
    )
    return Announcement(Frame(system.first, system.later, words + system.tail), dumps, "\n")


def writers() -> list[Callable[[dict[str, Any]], str]]:
    """List the ways in which templates write a tool."""

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
