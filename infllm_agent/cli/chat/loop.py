"""The interactive loop of ``infllm-agent chat``, and how it shows itself where there is no terminal to speak of."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from infllm_agent.cli.chat import status
from infllm_agent.cli.chat.commands import Commands, Display
from infllm_agent.cli.input import Interrupts, read_lines, standard_input
from infllm_agent.cli.output import print_message, print_table, write_piece
from infllm_agent.errors import Cancelled, InfLLMError
from infllm_agent.inspector.report import Report
from infllm_agent.inspector.terminal import render
from infllm_agent.messages import Message
from infllm_agent.platform.text import printable
from infllm_agent.reply import Reply
from infllm_agent.session.session import Session

if TYPE_CHECKING:
    from infllm_agent.cli.work import Work


class Face(Display, Protocol):
    """Where the lines of a chat come from, and what shows it."""

    def lines(self) -> Generator[str, None, None]:
        """What was typed, message by message, until the user leaves. Raises Cancelled when it has to end."""


class Chat:
    """Takes messages and acts on them: a command, or something to answer."""

    def __init__(self, work: Work, sampling: dict[str, Any]) -> None:
        self._work = work
        self._sampling = sampling
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._face: Face
        if moves_its_cursor():
            from infllm_agent.cli.chat.screen import Screen

            self._face = Screen(work, lambda: self._commands)
        else:
            self._face = Plain(work.interrupts)
        self._commands = Commands(work, self._face)
        if self._interactive:
            count = work.session.message_count
            self._face.line(f'session "{work.session.name}", {count} messages; /help lists the commands')

    def run(self) -> None:
        """Until the input ends, ``/quit``, or Ctrl-C at the prompt."""
        interrupts = self._work.interrupts
        with closing(self._face.lines()) as lines:
            for line in lines:
                if line.strip() == "/quit":
                    return
                self._turn(line)
                if interrupts.final:
                    raise Cancelled("stopped")
                interrupts.clear()

    def _turn(self, line: str) -> None:
        try:
            with suppress(Cancelled):
                self._act(line)
            self._work.session.commit()
        except InfLLMError as error:
            if not self._interactive or self._work.session.closed:
                raise
            self._face.error(f"error: {error}")  # such as a full disk: somebody is there to help

    def _act(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._commands.run(line)
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, text: str) -> None:
        session = self._work.session
        with self._face.answering(session) as write:
            session.append_user(text)
            with closing(session.stream_reply(**self._sampling)) as pieces:
                for piece in pieces:
                    write(piece)
        reply = session.last_reply
        assert reply is not None
        self._face.closing(reply)


def moves_its_cursor() -> bool:
    """Whether there is a terminal that can do more than print."""
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


class Plain:
    """Lines in, lines out: for pipes, files and terminals that can do no more."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()

    def lines(self) -> Generator[str, None, None]:
        yield from self._prompted() if self._interactive else read_lines(standard_input(), self._interrupts)

    def _prompted(self) -> Iterator[str]:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() its line editing)
        while True:
            try:
                with self._interrupts.waiting():
                    line = input("> ")
            except (EOFError, Cancelled):
                print()
                if self._interrupts.final:
                    raise Cancelled("stopped") from None
                return
            yield line

    def line(self, text: str) -> None:
        print(printable(text))

    def error(self, text: str) -> None:
        print(printable(text), file=sys.stderr)

    def help(self, rows: Iterable[tuple[str, str]]) -> None:
        for usage, what in rows:
            print(f"{usage:<18} {what}")
        print("Ctrl-C ends an answer; it is kept as it stands. Every turn is committed.")

    def messages(self, messages: Iterable[Message], words: str = "") -> None:
        for message in messages:
            print_message(message)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        print_table(head, [[f"{c:.0%}" if isinstance(c, float) else printable(c) for c in row] for row in rows])

    def inspected(self, report: Report) -> None:
        render(report, report.answers[-1], Console(highlight=False))

    def reading(self, session: Session) -> nullcontext[None]:
        return nullcontext()

    @contextmanager
    def answering(self, session: Session) -> Iterator[Callable[[str], None]]:
        try:
            yield write_piece
        finally:
            print(flush=True)

    def closing(self, reply: Reply) -> None:
        if self._interactive:
            for line in status.closing(reply):
                print(f"({line})")
