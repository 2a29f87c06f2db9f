"""``infllm-agent ingest``: a file or stdin streams into a session."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from infllm_agent.cli.input import open_input, read_text, split_lines
from infllm_agent.cli.options import AsJson, Memory, Role, RuntimeOptions, SessionName
from infllm_agent.cli.options import takes_options as options
from infllm_agent.cli.output import note, print_json, progress
from infllm_agent.cli.work import open_session
from infllm_agent.platform.text import counted

if TYPE_CHECKING:
    from infllm_agent.session.message_stream import MessageStream
    from infllm_agent.session.session import Session


@options
def ingest(
    session: SessionName,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="What to read; - is stdin.")] = "-",
    role: Annotated[Role, typer.Option(help="What the text is.")] = "observation",
    name: Annotated[str | None, typer.Option(help="The tool, or the source of the observation.")] = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is a message of its own; empty ones are none.")
    ] = False,
    as_json: AsJson = False,
    *,
    where: RuntimeOptions,
    memory: Memory,
) -> None:
    """Stream a file or stdin into a session; made if there is none."""
    with open_input(file) as (source, size):
        if name is not None:
            from infllm_agent.chat.format import (
                check_name,  # the session would say the same, but after loading the model
            )

            check_name(name, "--name")
        with open_session(session, where, memory) as work:
            target, interrupts = work.session, work.interrupts
            if file == "-" and sys.stdin.isatty():
                note("reading from the terminal; end with Ctrl-D")
            began, messages, tokens = time.perf_counter(), target.message_count, target.token_count
            with progress(f"ingesting into {session}", size) as show:
                _ingest(target, read_text(source, interrupts, newlines=lines), role, name, lines, show)
            target.commit()
            seconds = time.perf_counter() - began
            messages, tokens = target.message_count - messages, target.token_count - tokens
    speed = tokens / seconds
    if as_json:
        print_json(
            {
                "session": session,
                "messages": messages,
                "tokens": tokens,
                "seconds": seconds,
                "tok_s": speed,
                "role": role,
            }
        )
    elif not messages:
        print(f"{session}: nothing ingested, the input is empty")
    else:
        taken = f"{counted(messages, 'message')}, {counted(tokens, 'token')}"
        print(f"{session}: {taken} in {seconds:.1f} s ({speed:,.0f} tok/s)")


def _ingest(
    session: Session,
    pieces: Iterator[str],
    role: Role,
    name: str | None,
    lines: bool,
    show: Callable[[int, str], None],
) -> None:
    """All the text as one message, or each line as one. A message begins with its first character: none, no message."""
    stream: MessageStream | None = None
    done = 0
    for text, ends in split_lines(pieces) if lines else ((piece, False) for piece in pieces):
        if text:
            stream = stream or session.stream(role, name=name)
            stream.write(text)
        if ends and stream is not None:
            stream.close()
            stream = None
        if session.is_due:
            session.commit()
        done += len(text.encode()) + ends
        show(done, f"{session.token_count:,} tokens")
    if stream is not None:
        stream.close()
