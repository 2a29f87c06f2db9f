"""A chat on a terminal: a prompt over the memory's gauge, and answers that stream over a line of progress."""

from __future__ import annotations

import re
import sys
import termios
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from os import get_terminal_size
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.application import get_app
from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from infllm_agent.cli.chat import status
from infllm_agent.cli.chat.commands import Commands
from infllm_agent.cli.chat.live_text import LiveText, ticking
from infllm_agent.cli.chat.prompt import KEYS, new_prompt
from infllm_agent.cli.chat.status import Gauge, Progress
from infllm_agent.cli.input import Interrupts
from infllm_agent.cli.output import SHOWN_CHARS, message_head
from infllm_agent.errors import Cancelled
from infllm_agent.inspector.report import Report
from infllm_agent.inspector.terminal import render
from infllm_agent.messages import Message
from infllm_agent.platform.text import printable
from infllm_agent.reply import Reply
from infllm_agent.session.session import Session

if TYPE_CHECKING:
    from infllm_agent.cli.work import Work

#: Of a message that was searched for, so many characters are shown around the first word found.
EXCERPT = 300
BAR_WIDTH = 20
#: A column of a table that would be narrower is left out.
NARROWEST = 8


class Screen:
    """The ``Face`` of a chat on a terminal. What was typed is kept in the root, in ``chat-history``."""

    def __init__(self, work: Work, commands: Callable[[], Commands]) -> None:
        self._work = work
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._gauge = Gauge.of(work.session)
        self._prompt = new_prompt(Path(work.runtime.root) / "chat-history", commands, self._toolbar)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def lines(self) -> Generator[str, None, None]:
        with _keys_wait(self._work.interrupts):
            yield from self._prompted()

    def _prompted(self) -> Iterator[str]:
        interrupts = self._work.interrupts
        while True:
            self._gauge = Gauge.of(self._work.session)
            try:
                with interrupts.waiting(self._leave):
                    # The prompt must not be torn down within a signal handler: it is asked to end.
                    line = self._prompt.prompt(handle_sigint=False, pre_run=self._leave_if_asked)
            except (EOFError, Cancelled):
                if interrupts.final:
                    raise Cancelled("stopped") from None
                return
            yield line

    def _leave_if_asked(self) -> None:
        if self._work.interrupts():
            self._leave()

    def _leave(self) -> None:
        app = self._prompt.app

        def leave() -> None:
            if app.is_running and not app.is_done:
                app.exit(exception=Cancelled("stopped"))

        if app.loop is not None:
            app.loop.call_soon_threadsafe(leave)

    def _toolbar(self) -> str:
        size = get_app().output.get_size()
        lines = status.wrapped(self._gauge.fields(), size.columns - 1)
        return "\n".join(lines[: max(1, size.rows // 5)])

    # -- what is shown -----------------------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self._console.print(Text(printable(text)))

    def error(self, text: str) -> None:
        self._console.print(Text(" ".join(printable(text).split()), "red"))

    def help(self, rows: Iterable[tuple[str, str]]) -> None:
        table = Table.grid("", "", padding=(0, 2))
        for usage, what in [*rows, ("", ""), *KEYS]:
            table.add_row(Text(usage, "bold"), Text(what))
        self._console.print(table)

    def messages(self, messages: Iterable[Message], words: str = "") -> None:
        for message in messages:
            self._console.print(Text(message_head(message), "bold"))
            text = highlighted(message.text, words) if words else _beginning(message.text)
            self._console.print(Padding(text, (0, 0, 0, 4)))

    def inspected(self, report: Report) -> None:
        render(report, report.answers[-1], self._console)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        table = Table(box=None, header_style="bold", pad_edge=False)
        bar, left = max(4, min(BAR_WIDTH, self._console.width // 8)), self._console.width
        for name, *column in zip(head, *rows, strict=True):
            numeric = all(isinstance(cell, str) and cell.replace(",", "").isdigit() for cell in column)
            width = max(5 + bar if isinstance(cell, float) else cell_len(printable(cell)) for cell in (name, *column))
            if left < min(width, NARROWEST):
                break  # what does not fit is left out, the last columns first
            table.add_column(name, justify="right" if numeric else "left", no_wrap=True, width=min(width, left))
            left -= width + 2
        shown = len(table.columns)
        for row in rows:
            cells = row[:shown]
            table.add_row(*(_share(cell, bar) if isinstance(cell, float) else Text(printable(cell)) for cell in cells))
        self._console.print(table)

    @contextmanager
    def reading(self, session: Session) -> Iterator[None]:
        with self.answering(session):
            yield

    @contextmanager
    def answering(self, session: Session) -> Iterator[Callable[[str], None]]:
        progress = Progress(session)
        live = LiveText(_write, _columns, progress.line)

        def write(piece: str) -> None:
            progress.answering()
            live.text(piece)

        with ticking(live):
            try:
                yield write
            except Cancelled:
                live.end()
                wait = session.pending_tokens
                self._dim("stopped; nothing is lost" + (f", {wait:,} tokens are read next time" if wait else ""))
                raise

    def closing(self, reply: Reply) -> None:
        for line in status.closing(reply):
            self._dim(line)

    def _dim(self, text: str) -> None:
        self._console.print(Text(text, "dim"))


def highlighted(text: str, words: str) -> Text:
    """The part of a text that has the first of the words, with all of them marked."""
    text = printable(text)
    plain = _folded(text)
    found = re.compile("|".join(re.escape(_folded(word)) for word in words.split()) or r"\Z")
    first = found.search(plain)
    start = max(0, first.start() - EXCERPT // 3) if first else 0
    excerpt = Text("... " if start else "")
    excerpt.append(shown := text[start : start + EXCERPT])
    for match in found.finditer(plain, start, start + len(shown)):
        offset = len(excerpt) - len(shown) - start
        excerpt.stylize("bold reverse", match.start() + offset, match.end() + offset)
    return excerpt.append(" ..." if start + len(shown) < len(text) else "")


def _folded(text: str) -> str:
    """The text without case and accents, character for character."""
    return "".join(unicodedata.normalize("NFD", char)[0].lower()[0] for char in text)


def _beginning(text: str) -> Text:
    more = len(text) - SHOWN_CHARS
    return Text(printable(text[:SHOWN_CHARS]) + (f"\n... and {more:,} more characters" if more > 0 else ""))


def _share(share: float, width: int) -> Table:
    cell = Table.grid("", "", padding=(0, 1))
    cell.add_row(Text(f"{share:4.0%}"), Bar(1.0, 0.0, share, width=width))
    return cell


@contextmanager
def _keys_wait(interrupts: Interrupts) -> Iterator[None]:
    """What is typed while no prompt is there does not show; it waits for the next one. Ctrl-C is a signal still."""
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def give_back() -> None:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(stdin, termios.TCSANOW, before)

    quiet = list(before)
    quiet[0] &= ~termios.ICRNL
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    interrupts.before_kill = give_back
    try:
        termios.tcsetattr(stdin, termios.TCSANOW, quiet)
        yield
    finally:
        give_back()
        interrupts.before_kill = lambda: None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _columns() -> int:
    try:
        return max(2, get_terminal_size(sys.stdout.fileno()).columns)
    except OSError:
        return 80
