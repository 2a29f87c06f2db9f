"""The command line: ``infllm-agent``.

Exit codes: 0 done; 1 a failed operation, with one line on stderr; 2 bad usage, likewise. What needs no model (lists,
searches, mistakes) must not wait for one: torch and all that needs it are imported where they are used.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from infllm_agent.cli.ask import ask
from infllm_agent.cli.ingest import ingest
from infllm_agent.cli.inspect import inspect
from infllm_agent.cli.options import AsJson, Logging, Memory, RuntimeOptions, Sampling, SessionName, Tracing
from infllm_agent.cli.options import takes_options as options
from infllm_agent.cli.output import DONE, print_json, report
from infllm_agent.cli.serve import serve
from infllm_agent.cli.sessions import app as sessions
from infllm_agent.cli.work import open_session
from infllm_agent.config import SamplingConfig
from infllm_agent.platform import logs

if TYPE_CHECKING:
    pass


app = typer.Typer(
    help="A long-lived agent runtime: unbounded sessions on a local model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sessions, name="sessions")
app.command()(ingest)
app.command()(ask)
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
    log: Logging = None,
) -> None:
    if log is not None:
        logs.setup(log)


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
    with open_session(session, where, memory, trace=trace) as work:
        from infllm_agent.cli.chat.loop import Chat

        Chat(work, sampling).run()


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

    from infllm_agent.cli import demo as demonstration

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
    from infllm_agent.cli.bench import app as benchmarks

    command = typer.main.get_command(benchmarks)
    with command.make_context("bench", context.args, parent=context.parent) as inner:
        command.invoke(inner)
