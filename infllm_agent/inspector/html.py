"""A report as one page: a file that needs nothing else, and nothing from the web."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from infllm_agent.inspector.report import Report

#: Of a longer text the page has its beginning and what stands around the parts that were attended to most.
WHOLE_CHARS, HEAD_CHARS, AROUND_CHARS, PARTS = 4000, 500, 700, 6

# Texts are untrusted. As JSON in ASCII, without these, they cannot end the script element that holds them.
_ESCAPED = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


def write(report: Report, path: str | PathLike[str]) -> None:
    """Write the page. Raises OSError."""
    Path(path).write_text(page(report), "utf-8")


def page(report: Report) -> str:
    """The page's source. Only the template's own script may run in it, by its hash."""
    template = files("infllm_agent.inspector").joinpath("page.html").read_text("utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(page_data(report), allow_nan=False).translate(_ESCAPED)
    return template.replace("{{script-hash}}", digest, 1).replace("{{data}}", data, 1)


def page_data(report: Report) -> dict[str, Any]:
    """What the page holds: the report's data, in which a message has ``parts`` (place, text) instead of its text, and
    the ``length`` of that."""
    data = report.data()
    peaks: dict[int, list[tuple[float, int, int]]] = {}
    for answer in report.answers:
        for number, shades in answer.shades.items():
            if shades:
                most = max(shades, key=lambda one: one.focus)
                peaks.setdefault(number, []).append((most.focus, most.start, most.end))
    for message in data["messages"]:
        text = message.pop("text")
        best = sorted(peaks.get(message["index"], ()), reverse=True)[:PARTS]
        message["length"] = len(text)
        message["parts"] = [(start, text[start:end]) for start, end in _kept(len(text), best)]
    return data


def _kept(length: int, peaks: Iterable[tuple[float, int, int]]) -> list[tuple[int, int]]:
    """The parts of a text to keep, in their order, apart from each other."""
    if length <= WHOLE_CHARS:
        return [(0, length)]
    around = [(max(0, start - AROUND_CHARS), min(length, end + AROUND_CHARS)) for _, start, end in peaks]
    merged: list[tuple[int, int]] = [(0, HEAD_CHARS)]
    for start, end in sorted(around):
        first, last = merged[-1]
        if start <= last:
            merged[-1] = first, max(last, end)
        else:
            merged.append((start, end))
    return merged
