"""The interactive loop of ``infllm-agent chat``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

from infllm_agent.cli_input import Interrupts, read_lines, standard_input
from infllm_agent.cli_output import counted, print_message, write_piece
from infllm_agent.errors import Cancelled, InfLLMError
from infllm_agent.session import Session

HELP = """\
/help              this list
/history [N]       the last N messages (10)
/search WORDS      messages of this session that have all the words
/observe TEXT      add an observation, without asking for an answer
/fork NAME [N]     a new session that begins as this one, with all messages so far or the first N
/usage             sizes of the session
/quit              leave; so do Ctrl-D and Ctrl-C at the prompt
//TEXT             say TEXT with one slash in front
Ctrl-C ends an answer; it is kept as it stands. Every turn is committed."""


class Chat:
    """Reads lines and acts on them: a command, or a message that is answered."""

    def __init__(self, session: Session, interrupts: Interrupts, sampling: dict[str, Any]) -> None:
        self._session = session
        self._interrupts = interrupts
        self._sampling = sampling
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda rest: print(HELP),
            "history": self._history,
            "search": self._search,
            "observe": self._observe,
            "fork": self._fork,
            "usage": self._usage,
        }

    def run(self) -> None:
        """Until the input ends, ``/quit``, or Ctrl-C at the prompt."""
        if self._interactive:
            print(f'session "{self._session.name}", {self._session.message_count} messages; /help lists the commands')
        for line in self._prompted() if self._interactive else read_lines(standard_input(), self._interrupts):
            if line.strip() == "/quit":
                return
            with suppress(Cancelled):
                self._act(line)
            self._session.commit()
            if self._interrupts.final:
                raise Cancelled("stopped")
            self._interrupts.clear()

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

    def _act(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            command = self._commands.get(name)
            if command is None:
                print(f"no command /{name}; /help lists them, //{name} says it as text", file=sys.stderr)
            else:
                try:
                    command(rest.strip())
                except InfLLMError as error:
                    if isinstance(error, Cancelled):
                        raise
                    print(f"error: {error}", file=sys.stderr)
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line)

    def _answer(self, text: str) -> None:
        self._session.append_user(text)
        try:
            with closing(self._session.stream_reply(**self._sampling)) as pieces:
                for piece in pieces:
                    write_piece(piece)
        finally:
            print(flush=True)

    def _history(self, count: str) -> None:
        if count and not count.isdigit():
            raise InfLLMError(f"/history {count}: give a number")
        for message in self._session.messages(-max(1, int(count or 10))):
            print_message(message)

    def _search(self, words: str) -> None:
        found = self._session.store.search(words)
        for message in reversed(found):
            print_message(message)
        if not found:
            print("nothing found")

    def _observe(self, text: str) -> None:
        if not text:
            raise InfLLMError("/observe: give the text")
        self._session.append_observation(text)

    def _fork(self, rest: str) -> None:
        match rest.split():
            case [name]:
                messages = None
            case [name, count] if count.isdecimal():
                messages = int(count)
            case _:
                raise InfLLMError("/fork: give the new session's name, and perhaps how many messages to take over")
        with self._session.fork(name, messages) as fork:
            made = counted(fork.message_count, "message")
        print(f'session "{name}" made, {made}; open it with: infllm-agent chat {name}')

    def _usage(self, _: str) -> None:
        usage = self._session.usage
        sizes = ", ".join(f"{tier} {size:,} bytes" for tier, size in usage["bytes"].items())
        print(f"{usage['messages']:,} messages, {usage['tokens']:,} tokens, {usage['blocks']:,} blocks; {sizes}")
