"""``infllm-agent inspect``: what an answer attended to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from infllm_agent.cli.options import AsJson, Root, SessionName
from infllm_agent.cli.output import message_fields, print_json
from infllm_agent.inspector.report import Answer, Report, answer_data, gather
from infllm_agent.platform.text import printable


def inspect(
    session: SessionName,
    answer: Annotated[
        int | None,
        typer.Option(help="The number of the answer's message; -1 is the latest one.", show_default="the latest"),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a page: all the latest answers.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw layer by place in the session.", show_default=False)
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Show so many messages.")] = 8,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """What an answer attended to: messages, words, layers. Needs no model."""
    if png is not None:
        from infllm_agent.inspector import picture

        picture.check()
    # One answer is enough for anything but the page.
    report = gather(root, session, answer if answer is not None or html is not None else -1)
    chosen = report.answers[-1]
    written = {}
    if html is not None:
        from infllm_agent.inspector.html import write

        written["html"] = html.expanduser()
        write(report, written["html"])
    if png is not None:
        written["png"] = png.expanduser()
        picture.draw(report, chosen, written["png"])
    if as_json:
        print_json(_fields(report, chosen, top) | {kind: str(path) for kind, path in written.items()})
    elif written:
        for path in written.values():
            print(printable(f"wrote {path}"))
    else:
        from rich.console import Console

        from infllm_agent.inspector.terminal import render

        render(report, chosen, Console(highlight=False), top)


def _fields(report: Report, answer: Answer, top: int) -> dict[str, Any]:
    """An answer for programs: texts verbatim; places count characters."""
    data = answer_data(answer)
    shades, question = data.pop("shades"), answer.question
    return data | {
        "session": report.session,
        "model": report.model,
        "question": None if question is None else message_fields(report.messages[question]),
        "answer": message_fields(report.messages[answer.message]),
        "attended": [
            one | message_fields(report.messages[one["message"]]) | {"shades": shades.get(str(one["message"]), [])}
            for one in data["attended"][:top]
        ],
    }
