"""The reference of the command line, from the commands themselves: a hook of mkdocs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from infllm_agent.bench.cli import app as benchmarks
from infllm_agent.cli import app

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, "\n".join(reference())) if MARK in markdown else markdown


def commands() -> dict[str, Any]:
    """Every command by its words (``sessions list``). ``bench`` hands on to an app of its own."""
    found = dict(_leaves(typer.main.get_command(app), ""))
    del found["bench"]
    return found | dict(_leaves(typer.main.get_command(benchmarks), "bench "))


def reference() -> Iterator[str]:
    """The page, part by part. Options that several commands share come once, at its end."""
    shared: dict[str, tuple[Any, list[Any]]] = {}
    for words, command in commands().items():
        own = [parameter for parameter in command.params if not _panel(parameter)]
        panels = dict.fromkeys(filter(None, map(_panel, command.params)))
        for panel in panels:
            shared[panel] = command, [parameter for parameter in command.params if _panel(parameter) == panel]
        pieces = command.collect_usage_pieces(typer.Context(command))
        usage = [piece for piece in pieces if piece != "[OPTIONS]"] + ["[OPTIONS]"]
        yield f"\n## {words}\n\n{inspect.cleandoc(command.help)}\n"
        yield f"```\ninfllm-agent {words} {' '.join(usage)}\n```\n"
        yield from _table(command, own)
        if panels:
            links = " and ".join(f"[{_title(panel).lower()}](#{_anchor(panel)})" for panel in panels)
            yield f"\nIt takes {links}, too."
    for panel, (command, parameters) in shared.items():
        yield f"\n## {_title(panel)} {{#{_anchor(panel)}}}\n"
        yield from _table(command, parameters)


def _leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _table(command: Any, parameters: Sequence[Any]) -> Iterator[str]:
    context = typer.Context(command)
    yield from ("| | |", "|---|---|")
    for parameter in parameters:
        if (record := parameter.get_help_record(context)) is not None:
            name, text = (part.replace("|", "\\|") for part in record)
            yield f"| `{name}` | {text.replace('[', chr(92) + '[')} |"


def _panel(parameter: Any) -> str:
    return getattr(parameter, "rich_help_panel", None) or ""


def _title(panel: str) -> str:
    name, _, rest = panel.partition(" ")
    return f"{name} options {rest}".strip()


def _anchor(panel: str) -> str:
    return f"{panel.split()[0].lower()}-options"
