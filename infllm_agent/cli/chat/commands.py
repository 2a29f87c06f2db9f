"""What the commands of ``infllm-agent chat`` do, whatever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.filesize import decimal

from infllm_agent.cli.chat.transcript import FORMS, save
from infllm_agent.errors import Cancelled, InfLLMError, UnknownSession
from infllm_agent.inspector.report import Report, gather
from infllm_agent.messages import Message
from infllm_agent.platform.text import counted, local_time
from infllm_agent.reply import Reply
from infllm_agent.session.session import Session
from infllm_agent.storage.catalog import Catalog

if TYPE_CHECKING:
    from infllm_agent.cli.work import Work

#: What can be typed, and what it does.
HELP = [
    ("/help", "this list"),
    ("/history [N]", "the last N messages (10)"),
    ("/search WORDS", "messages of this session that have all the words"),
    ("/inspect [N]", "what the latest answer attended to, or the answer that is message N"),
    ("/observe TEXT", "add an observation, without asking for an answer"),
    ("/sessions", "all sessions; /sessions NAME is /open NAME"),
    ("/open NAME", "go on in another session of this model; /open! NAME makes it if there is none"),
    ("/fork NAME [N]", "a new session that begins as this one, with all messages so far or the first N; you stay here"),
    ("/save FILE", f"the conversation as {', '.join(FORMS)}; /save! FILE overwrites"),
    ("/usage", "sizes of the session"),
    ("/quit", "leave; so do Ctrl-D and Ctrl-C at the prompt"),
    ("//TEXT", "say TEXT with one slash in front"),
]


class Display(Protocol):
    """What shows a chat: lines on any output, or a terminal."""

    def line(self, text: str) -> None:
        """One line of text."""

    def error(self, text: str) -> None:
        """One line about what went wrong."""

    def help(self, rows: Iterable[tuple[str, str]]) -> None:
        """What can be typed, and what it does."""

    def messages(self, messages: Iterable[Message], words: str = "") -> None:
        """Messages, oldest first; where they were searched for, the words."""

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> None:
        """Rows of texts; a float is a share of one."""

    def inspected(self, report: Report) -> None:
        """What one answer attended to."""

    def reading(self, session: Session) -> AbstractContextManager[object]:
        """Around what puts text through the model."""

    def answering(self, session: Session) -> AbstractContextManager[Callable[[str], None]]:
        """Around an answer; gives what writes a piece of it."""

    def closing(self, reply: Reply) -> None:
        """After an answer."""


class Commands:
    """The commands, by name, on the session that the chat is in."""

    def __init__(self, work: Work, display: Display) -> None:
        self._work = work
        self._display = display
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: display.help(HELP),
            "history": self._history,
            "search": self._search,
            "inspect": self._inspect,
            "observe": self._observe,
            "sessions": self._sessions,
            "open": self._open,
            "open!": lambda rest: self._open(rest, create=True),
            "fork": self._fork,
            "save": self._save,
            "save!": lambda rest: self._save(rest, overwrite=True),
            "usage": self._usage,
        }

    @property
    def _session(self) -> Session:
        return self._work.session

    def run(self, line: str) -> None:
        """Obey a line that begins with a slash."""
        try:
            self._run(line)
        except Cancelled:
            raise
        except InfLLMError as error:
            self._display.error(f"error: {error}")

    def _run(self, line: str) -> None:
        name, _, rest = line[1:].strip().partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._display.error(f"no command /{name}; /help lists them, //{name} says it as text")
        else:
            command(rest.strip())

    def names(self) -> list[str]:
        return sorted([*self._commands, "quit"])

    def session_names(self) -> list[str]:
        return [info.name for info in self._work.runtime.sessions()]

    def _history(self, count: str) -> None:
        if count and not count.isdecimal():
            raise InfLLMError(f"/history {count}: give a number")
        self._display.messages(self._session.messages(-max(1, int(count or 10))))

    def _search(self, words: str) -> None:
        found = self._session.store.search(words)
        self._display.messages(reversed(found), words)
        if not found:
            self._display.line("nothing found")

    def _inspect(self, number: str) -> None:
        if number and not number.isdecimal():
            raise InfLLMError(f"/inspect {number}: give a message's number, as /history shows it")
        self._display.inspected(gather(self._work.runtime.root, self._session.name, int(number) if number else -1))

    def _observe(self, text: str) -> None:
        if not text:
            raise InfLLMError("/observe: give the text")
        with self._display.reading(self._session):
            self._session.append_observation(text)

    def _sessions(self, name: str) -> None:
        if name:
            self._open(name)
            return
        rows = [
            [
                "*" if info.name == self._session.name else "",
                info.name,
                f"{info.messages:,}",
                f"{info.tokens:,}",
                decimal(info.bytes["disk"]),
                local_time(info.updated),
                Path(info.model).name,
            ]
            for info in self._work.runtime.sessions()
        ]
        self._display.table(["", "name", "messages", "tokens", "disk", "updated", "model"], rows)

    def _open(self, name: str, *, create: bool = False) -> None:
        if not name:
            raise InfLLMError("/open: give the session's name; /sessions lists them")
        work, before = self._work, self._session
        if name != before.name:
            if not create and Catalog(work.runtime.root).find(name) is None:
                near = get_close_matches(name, self.session_names(), 1)
                meant = f'; did you mean "{near[0]}"?' if near else ""
                raise UnknownSession(f'no session "{name}"{meant} (/open! {name} makes it)')
            before.commit()
            work.session = work.runtime.session(name)
            work.session.cancelled = work.interrupts
            work.runtime.release(before.name)
        self._display.line(f'now in session "{name}", {counted(self._session.message_count, "message")}')

    def _fork(self, rest: str) -> None:
        match rest.split():
            case [name]:
                messages = None
            case [name, count] if count.isdecimal():
                messages = int(count)
            case _:
                raise InfLLMError("/fork: give the new session's name, and perhaps how many messages to take over")
        with self._display.reading(self._session), self._session.fork(name, messages) as fork:
            made = counted(fork.message_count, "message")
        self._display.line(
            f'session "{name}" made, {made}; go there with: /open {name} (or, later: infllm-agent chat {name})'
        )

    def _save(self, file: str, *, overwrite: bool = False) -> None:
        if not file:
            raise InfLLMError(f"/save: give a file's name that ends in {', '.join(FORMS)}")
        messages = self._session.messages()
        save(Path(file).expanduser(), messages, overwrite=overwrite)
        self._display.line(f"{counted(len(messages), 'message')} saved in {file}")

    def _usage(self, _: str) -> None:
        usage = self._session.usage
        sizes = ", ".join(f"{tier} {size:,} bytes" for tier, size in usage["bytes"].items())
        self._display.line(
            f"{usage['messages']:,} messages, {usage['tokens']:,} tokens, {usage['blocks']:,} blocks; {sizes}"
        )
