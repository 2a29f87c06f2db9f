"""The command line: ``infllm-agent``.

Exit codes: 0 done; 1 a failed operation, with one line on stderr; 2 bad usage, likewise. What needs no model (lists,
searches, mistakes) must not wait for one: torch and all that needs it are imported where they are used.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from infllm_agent import logs
from infllm_agent.catalog import Catalog
from infllm_agent.cli_input import Interrupts, open_input, read_text, split_lines
from infllm_agent.cli_options import AsJson, Log, Memory, Role, RuntimeOptions, Sampling, SessionName, Tracing
from infllm_agent.cli_options import takes_options as options
from infllm_agent.cli_output import DONE, Stopped, counted, note, print_json, progress, report, write_piece
from infllm_agent.cli_serve import serve
from infllm_agent.cli_sessions import app as sessions
from infllm_agent.config import MemoryConfig, SamplingConfig, TraceMode
from infllm_agent.errors import Cancelled
from infllm_agent.inspector.cli import inspect
from infllm_agent.store import SessionStore

if TYPE_CHECKING:
    from infllm_agent.message_stream import MessageStream
    from infllm_agent.reply import Reply
    from infllm_agent.runtime import AgentRuntime
    from infllm_agent.session import Session

#: Streamed messages are committed when about this many tokens have come since the last commit.
COMMIT_TOKENS = 8192
#: How many messages ``ask`` names as those that its answer attended to.
ATTENDED = 5

app = typer.Typer(
    help="A long-lived agent runtime: unbounded sessions on a local model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sessions, name="sessions")
app.command()(inspect)
app.command()(serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (``sys.argv`` if None); returns the exit code. Errors become one line on stderr."""
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # not a real file, in tests
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    command = typer.main.get_command(app)
    context = None
    # Not command.main(): it prints errors over several lines and gives Ctrl-C an exit code of its own.
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        context = command.make_context("infllm-agent", words)
        with context:
            command.invoke(context)
        sys.stdout.flush()
        return DONE
    except typer.Exit as end:
        return end.exit_code
    except (Exception, KeyboardInterrupt) as error:
        return report(error, debug=context is not None and context.params["debug"])


def _quiet_libraries() -> None:
    """Keep the libraries' bars and warnings off stderr; they read these variables when they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"infllm-agent {installed_version('infllm-agent')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    log: Log = None,
) -> None:
    if log is not None:
        logs.setup(log)


@app.command()
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
            from infllm_agent.chat import check_name  # the session would say the same, but after loading the model

            check_name(name, "--name")
        with _open_session(session, where, memory) as work:
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
    done, committed = 0, session.token_count
    for text, ends in split_lines(pieces) if lines else ((piece, False) for piece in pieces):
        if text:
            stream = stream or session.stream(role, name=name)
            stream.write(text)
        if ends and stream is not None:
            stream.close()
            stream = None
            if session.token_count - committed >= COMMIT_TOKENS:
                session.commit()
                committed = session.token_count
        done += len(text.encode()) + ends
        show(done, f"{session.token_count:,} tokens")
    if stream is not None:
        stream.close()


@app.command()
@options
def ask(
    session: SessionName,
    question: Annotated[str, typer.Argument(metavar="QUESTION", show_default=False)],
    prefix: Annotated[str, typer.Option(help="Words that the answer begins with.", show_default=False)] = "",
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer with JSON, valid under this JSON schema.")
    ] = None,
    as_json: AsJson = False,
    trace: Tracing = "sampled",
    *,
    where: RuntimeOptions,
    memory: Memory,
    sampling: Sampling,
) -> None:
    """Answer a question from a session."""
    if not question.strip():
        raise typer.BadParameter("it is empty", param_hint="QUESTION")
    SamplingConfig(**sampling)  # a mistake is told before the model is loaded
    form = {} if schema is None else {"schema": _read_schema(schema)}
    with _open_session(session, where, memory, create=False, trace=trace) as work:
        target = work.session
        if schema is not None:
            target.chat.grammars.schema(form["schema"])  # refused before the question is taken in
        asked = target.append_user(question)
        # Closed whatever happens, so that an answer nobody reads to its end is kept as far as it came.
        with closing(target.stream_reply(prefix=prefix, **form, **sampling)) as pieces:
            for piece in pieces:
                if not as_json:
                    write_piece(piece)
        reply = target.last_reply
        assert reply is not None
        target.commit()
        if as_json:
            attended = reply.trace.by_message(target.messages(0, asked.index), ATTENDED)
            print_json(
                _reply_fields(reply)
                | {"attended": [{"message": a.message, "share": a.share, "focus": a.focus} for a in attended]}
            )
        else:
            print(flush=True)
        if reply.finish_reason == "cancelled":
            raise Cancelled("the answer was stopped")


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(path.expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise typer.BadParameter(f"{path} holds no JSON: {reason}", param_hint="--schema") from None


def _reply_fields(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "text": reply.text,
        "tool_calls": [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in reply.tool_calls],
        "usage": {
            "input_tokens": usage.input_tokens,
            "prefilled_tokens": usage.prefilled_tokens,
            "reused_tokens": usage.reused_tokens,
            "output_tokens": usage.output_tokens,
        },
        "finish_reason": reply.finish_reason,
        "first_token_s": reply.first_token_s,
        "seconds": reply.seconds,
    }


@app.command()
@options
def chat(
    session: SessionName,
    trace: Tracing = "sampled",
    *,
    where: RuntimeOptions,
    memory: Memory,
    sampling: Sampling,
) -> None:
    """Talk with a session; made if there is none. /help lists the commands."""
    SamplingConfig(**sampling)
    with _open_session(session, where, memory, trace=trace) as work:
        from infllm_agent.cli_chat import Chat

        Chat(work, sampling).run()


@dataclass
class Work:
    """What a command works with. A chat may change the session."""

    runtime: AgentRuntime
    session: Session
    interrupts: Interrupts


@contextmanager
def _open_session(
    name: str,
    where: RuntimeOptions,
    settings: dict[str, Any],
    *,
    create: bool = True,
    trace: TraceMode = "sampled",
) -> Iterator[Work]:
    """A session with its model. However the work in it ends, what it has taken in is committed.

    Args:
        settings: memory settings that were given; the others are the session's own, or the model's defaults.
        create: whether to make the session if there is none.
        trace: of which tokens it is kept what they attended to.

    Raises:
        Stopped: the user stopped the work.
    """
    allowed = where.allowed(trace=trace)
    stored = _stored_memory(where.root, name, create=create)
    from infllm_agent.model import LocalModel
    from infllm_agent.runtime import AgentRuntime

    model = LocalModel.load(where.model, device=where.device, dtype=where.dtype, progress=note)
    config = None
    if settings:
        config = (MemoryConfig.from_record(stored) if stored else model.default_memory()).changed(**settings)
    with Interrupts() as interrupts, AgentRuntime(where.root, model, config, allowed) as runtime:
        work = Work(runtime, runtime.session(name), interrupts)
        work.session.cancelled = interrupts
        try:
            yield work
        except Cancelled:
            session = work.session
            with suppress(Cancelled):  # what waits need not go through the model now
                session.abandon_stream()
            session.commit()
            kept = f"{counted(session.message_count, 'message')}, {counted(session.token_count, 'token')}"
            raise Stopped(f'interrupted: {kept} are committed in session "{session.name}"') from None


def _stored_memory(root: Path, name: str, *, create: bool) -> dict[str, Any] | None:
    """The memory settings that a session was made with; None if it is still to be made.

    It is opened for writing, so that whatever stands in the way is told before the model is loaded.
    """
    if create and Catalog(root).find(name) is None:
        return None
    with SessionStore.open(root, name) as store:
        stored: dict[str, Any] = store.fingerprint["memory"]
        return stored


@app.command()
def demo(
    root: Annotated[
        Path | None, typer.Option(help="Where to keep the demo's session; else it is removed.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="A packaged alias, a local folder, or a hub id.")] = "smollm2",
    tokens: Annotated[int | None, typer.Option(min=1, help="Length of the tool log.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the tool log.")] = None,
    as_json: AsJson = False,
) -> None:
    """A long tool log, questions, a restart, questions again; next to what a plain window would have answered."""
    from rich.console import Console

    from infllm_agent import demo as demonstration

    with tempfile.TemporaryDirectory(prefix="infllm-demo-") as temporary:
        result = demonstration.run(
            root.expanduser() if root else Path(temporary),
            model=model,
            tokens=demonstration.TOKENS if tokens is None else tokens,
            seed=demonstration.SEED if seed is None else seed,
            console=Console(stderr=as_json, quiet=as_json),
        )
    if as_json:
        print_json(result)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def bench(context: typer.Context) -> None:
    """Measure retrieval and speed."""
    from infllm_agent.bench.cli import app as benchmarks

    command = typer.main.get_command(benchmarks)
    with command.make_context("bench", context.args, parent=context.parent) as inner:
        command.invoke(inner)
