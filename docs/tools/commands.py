"""The reference of the command line, from the commands themselves: a hook of mkdocs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from infllm_agent.cli.app import app
from infllm_agent.cli.bench import app as benchmarks

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
        arguments = [_name(command, parameter) for parameter in own if parameter.param_type_name == "argument"]
        yield f"\n## {words}\n\n{inspect.cleandoc(command.help)}\n"
        yield f"```\n{' '.join(['infllm-agent', words, *arguments, '[OPTIONS]'])}\n```\n"
        yield from _table(command, own)
        if panels:
            links = " and ".join(f"[{_title(panel)}](#{_anchor(panel)})" for panel in panels)
            yield f"\nIt takes the {links}, too."
    for panel, (command, parameters) in shared.items():
        _, _, remark = panel.partition(" ")
        yield f"\n## {_title(panel).capitalize()} {{#{_anchor(panel)}}}\n\n{remark.strip('()').capitalize()}\n"
        yield from _table(command, parameters)


def _leaves(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _leaves(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _table(command: Any, parameters: Sequence[Any]) -> Iterator[str]:
    yield from ("| option | |", "|---|---|")
    for parameter in parameters:
        if (record := parameter.get_help_record(typer.Context(command))) is not None:
            text = record[1].replace("|", "\\|").replace("[", "\\[")
            yield f"| `{_name(command, parameter)}` | {text} |"


def _name(command: Any, parameter: Any) -> str:
    """As the command's help shows it: ``--n-local <int>``, ``SESSION``."""
    shown = str(parameter.get_help_record(typer.Context(command))[0]).replace(" range>", ">")
    return shown.partition(" <")[0] if parameter.param_type_name == "argument" else shown


def _panel(parameter: Any) -> str:
    return getattr(parameter, "rich_help_panel", None) or ""


def _title(panel: str) -> str:
    return f"{panel.split()[0].lower()} options"


def _anchor(panel: str) -> str:
    return _title(panel).replace(" ", "-")
