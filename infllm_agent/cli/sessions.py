"""``infllm-agent sessions``: what can be said about sessions, and done to them, mostly without their model."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from infllm_agent.cli import maintenance
from infllm_agent.cli.input import Interrupts
from infllm_agent.cli.options import AsJson, Root, SessionName
from infllm_agent.cli.output import (
    FAILED,
    confirmed,
    message_fields,
    note,
    print_json,
    print_message,
    print_table,
    session_fields,
)
from infllm_agent.errors import NeedsModel
from infllm_agent.platform.text import counted, local_time, printable
from infllm_agent.storage.catalog import Catalog, SessionInfo
from infllm_agent.storage.session_store import SessionStore

app = typer.Typer(help="List, search, fork, check, export, import and delete sessions. Hardly ever needs a model.")

COLUMNS = ["name", "messages", "tokens", "blocks", "disk bytes", "created", "updated", "model"]


@app.command("list")
def list_sessions(root: Root, as_json: AsJson = False) -> None:
    """All sessions, as of their last commits."""
    catalog = Catalog(root)
    found = catalog.list()
    if as_json:
        print_json([session_fields(info) for info in found])
    elif found:
        print_table(COLUMNS, [_session_row(info) for info in found])
    else:
        print(f"no sessions in {catalog.root}")
    for problem in catalog.problems():
        print(printable(f"warning: not readable: {problem}"), file=sys.stderr)


@app.command()
def show(
    session: SessionName,
    last: Annotated[int, typer.Option(min=0, help="How many of the latest messages to show.")] = 5,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """One session, with its latest messages."""
    with closing(SessionStore.open(root, session, readonly=True)) as store:
        info = store.info
        recent = store.messages(-last) if last else []
    if as_json:
        print_json(session_fields(info) | {"recent": [message_fields(message) for message in recent]})
        return
    for name, value in zip(COLUMNS, _session_row(info), strict=True):
        print(f"{name:<12}{value}")
    for message in recent:
        print()
        print_message(message)


@app.command()
def search(
    session: SessionName,
    query: Annotated[str, typer.Argument(metavar="QUERY", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="At most so many messages.")] = 20,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Messages that have all the words, newest first."""
    with closing(SessionStore.open(root, session, readonly=True)) as store:
        found = store.search(query, limit)
    if as_json:
        print_json([message_fields(message) for message in found])
        return
    for message in found:
        print_message(message)
    if not found:
        print("nothing found")


@app.command()
def fork(
    session: SessionName,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new session's name.", show_default=False)],
    messages: Annotated[
        int | None, typer.Option(min=0, help="Take over the first so many messages.", show_default="all")
    ] = None,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Make a session that begins as another one, without reading its messages again.

    Where only the model can tell what its memory was at that message (layers with sliding windows, block_key
    "representatives"), the model that the session was made with is loaded and reads them again.
    """
    from infllm_agent.storage.fork import fork_stored  # loads torch

    try:
        made = fork_stored(root, session, new, messages)
    except NeedsModel as error:
        note(str(error))
        made = _fork_with_model(root, session, new, messages)
    if as_json:
        print_json(session_fields(made))
    else:
        print(f"{new}: {counted(made.messages, 'message')}, {counted(made.tokens, 'token')}")


def _fork_with_model(root: Path, session: str, new: str, messages: int | None) -> SessionInfo:
    from infllm_agent.runtime import AgentRuntime

    with closing(SessionStore.open(root, session, readonly=True)) as store:
        model, dtype = store.fingerprint["model"], store.fingerprint["dtype"]
    with Interrupts() as interrupts, AgentRuntime.open(root, model, dtype=dtype, progress=note) as runtime:
        runtime.session(session).cancelled = interrupts
        return runtime.fork(session, new, messages).store.info


@app.command()
def delete(
    session: SessionName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    *,
    root: Root,
    as_json: AsJson = False,
) -> None:
    """Delete a session with everything that belongs to it."""
    catalog = Catalog(root)
    catalog.require(session)
    if not confirmed(f'Delete session "{session}" and all its messages for good?', yes=yes, what="deleting"):
        print("not deleted", file=sys.stderr)
        raise typer.Exit(FAILED)
    catalog.delete(session)
    if as_json:
        print_json({"deleted": session})
    else:
        print(f"{session}: deleted")


app.command()(maintenance.check)
app.command()(maintenance.export)
app.command("import")(maintenance.import_)
app.command()(maintenance.prune)
app.command()(maintenance.publish)
app.command()(maintenance.pull)


def _session_row(info: SessionInfo) -> list[str]:
    """A session for people: ``COLUMNS``."""
    return [
        info.name,
        f"{info.messages:,}",
        f"{info.tokens:,}",
        f"{info.blocks:,}",
        f"{info.bytes['disk']:,}",
        local_time(info.created),
        local_time(info.updated),
        printable(info.model),
    ]
