"""The prompt of a chat on a terminal: its keys, its history, what it completes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from infllm_agent.cli.chat.commands import Commands

KEYS = [
    ("Enter", "send"),
    ("Alt-Enter, Ctrl-J", "a new line; so does a backslash at the end, and pasted lines stay together"),
    ("Ctrl-R, Up", "search what was typed before; go back to it"),
    ("Tab", "complete a command, a session's name, a file's name"),
    ("Ctrl-C", "ends an answer, which is kept as it stands; empties the prompt; leaves if it is empty"),
]
#: A message that is longer is not kept among what was typed.
HISTORY_CHARS = 20_000


def new_prompt(history: Path, commands: Callable[[], Commands], toolbar: Callable[[], str]) -> PromptSession[str]:
    """A prompt for messages of any number of lines.

    Args:
        history: the file that keeps what was typed.
        commands: whose names, and whose sessions' names, are completed.
        toolbar: the text beneath.
    """
    return PromptSession(
        "> ",
        prompt_continuation="  ",
        multiline=True,
        key_bindings=_keys(),
        history=_History(history),
        auto_suggest=AutoSuggestFromHistory(),
        completer=_Completer(commands),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_suspend=True,
        bottom_toolbar=toolbar,
    )


class _History(FileHistory):
    """What was typed, for its user's eyes only. Without it a chat goes on all the same."""

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.touch(0o600)
        super().__init__(path)

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if len(string) <= HISTORY_CHARS:
            with suppress(OSError):
                super().store_string(string)


class _Completer(Completer):
    """Commands, and what comes after some of them."""

    def __init__(self, commands: Callable[[], Commands]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        name, space, rest = document.text_before_cursor.partition(" ")
        if not name.startswith("/") or "\n" in name:
            return
        if not space:
            yield from _that_begin(name, [f"/{known} " for known in self._commands().names()])
        elif name in ("/open", "/sessions"):
            yield from _that_begin(rest, self._commands().session_names())
        elif name in ("/save", "/save!"):
            yield from self._paths.get_completions(Document(rest), complete_event)


def _that_begin(typed: str, known: Iterable[str]) -> Iterator[Completion]:
    return (Completion(name, -len(typed)) for name in known if name.startswith(typed))


def _keys() -> KeyBindings:
    """Keys of the prompt that differ from the usual ones."""
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # not the search of the history

    @keys.add("enter", filter=typing)
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and not buffer.document.text_after_cursor:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    @keys.add("c-j", filter=typing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _empty_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=EOFError())

    return keys
