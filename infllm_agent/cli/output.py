"""What the command line writes: answers on stdout; one line for a failure, and progress for people, on stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import typer
from pydantic import ValidationError

from infllm_agent.errors import ConfigError, InfLLMError, InvalidName
from infllm_agent.messages import Message
from infllm_agent.platform.text import local_time, printable
from infllm_agent.storage.catalog import SessionInfo

DONE, FAILED, BAD_USAGE = 0, 1, 2

#: Of a long message, people are shown this many characters.
SHOWN_CHARS = 1000

# click's own, or that of the copy which newer versions of typer carry.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]


class Interrupted(InfLLMError):
    """The user stopped the work; the message says what was kept."""


def print_json(value: Any) -> None:
    """One JSON value on one line, in ASCII: it survives any locale."""
    print(json.dumps(value))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, aligned: numbers to the right, everything else to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    numeric = [all(row[i].replace(",", "").isdigit() for row in rows) for i in range(len(head))]
    for row in (head, *rows):
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        print("  ".join(cells).rstrip())


def print_message(message: Message) -> None:
    """A message for people: a head line, and the beginning of its text, indented."""
    print(message_head(message))
    print("\n".join(f"    {line}" for line in printable(message.text[:SHOWN_CHARS]).split("\n")))
    if (more := len(message.text) - SHOWN_CHARS) > 0:
        print(f"    ... and {more:,} more characters")


def message_head(message: Message) -> str:
    """Number, role, name and time of a message, in one line."""
    who = f"{message.role} {message.name}" if message.name else message.role
    return f"[{message.index}] {who}, {local_time(message.time)}"


def message_fields(message: Message) -> dict[str, Any]:
    """A message for programs: verbatim."""
    return {
        "message": message.index,
        "role": message.role,
        "name": message.name,
        "time": message.time,
        "text": message.text,
    }


def session_fields(info: SessionInfo) -> dict[str, Any]:
    """A session for programs; times are unix seconds."""
    return {
        "name": info.name,
        "messages": info.messages,
        "tokens": info.tokens,
        "blocks": info.blocks,
        "bytes": info.bytes,
        "created": info.created,
        "updated": info.updated,
        "model": info.model,
    }


def write_piece(piece: str) -> None:
    """A piece of a text that is still being written: at once, and verbatim unless a terminal shows it."""
    sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


def confirmed(question: str, *, yes: bool, what: str) -> bool:
    """Whether to go on with what cannot be undone: asked on the terminal, unless the user has said ``--yes``.

    Args:
        what: needs a yes, for the error where nobody can be asked.

    Raises:
        BadParameter: stdin is no terminal, and ``yes`` is not given.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{what} for good needs --yes where nobody can be asked", param_hint="--yes")
    return typer.confirm(question, err=True)


def note(line: str) -> None:
    """What takes long, for whoever sits and waits."""
    if sys.stderr.isatty():
        print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar if stderr is a terminal. Yields a function that takes the amount done and a remark."""
    if not sys.stderr.isatty():
        yield lambda done, remark: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[remark]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total, remark="")
        yield lambda done, remark: bars.update(task, completed=done, remark=remark)


def report(error: BaseException, *, debug: bool) -> int:
    """Write one line about what went wrong to stderr; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):
        _discard_stdout()
    code, line = _explain(error)
    with suppress(OSError):  # nobody may be there to read it
        print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and its line."""
    if isinstance(error, _USAGE_ERROR):
        return BAD_USAGE, f"error: {_usage(error)}"
    if isinstance(error, Interrupted):
        return FAILED, str(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return FAILED, "interrupted: nothing was changed"
    if isinstance(error, ConfigError | InvalidName):
        return BAD_USAGE, f"error: {error}"
    if isinstance(error, InfLLMError):
        return FAILED, f"error: {error}"
    if isinstance(error, BrokenPipeError):
        return FAILED, "error: whoever read the output has closed it"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        return FAILED, f"error: {where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return FAILED, "error: out of memory; lower --n-local, --topk or --max-cached-block"
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return FAILED, f"error: unexpected {what} (infllm-agent --debug COMMAND ... shows where)"


def _usage(error: Any) -> str:
    """What typer has to say about wrong arguments: what, which value, and where to read on."""
    cause = error.__cause__ or error.__context__
    value = repr(cause.errors()[0]["input"]) if isinstance(cause, ValidationError) else ""
    what = error.format_message().replace("Value error, ", "").rstrip(".")
    if value not in what:  # typer's newer versions leave it out
        what = f"{what}, not {value}"
    command = error.ctx.command_path if error.ctx is not None else "infllm-agent"
    return f"{what}. See: {command} --help"


def _discard_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes stdout at its end."""
    with suppress(OSError, ValueError):  # stdout may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
