"""A conversation as a file: Markdown or plain text for people, JSON lines for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from infllm_agent.cli.output import message_fields, message_head
from infllm_agent.errors import InfLLMError
from infllm_agent.messages import Message
from infllm_agent.platform.files import write_atomically
from infllm_agent.platform.text import printable


def save(path: Path, messages: Iterable[Message], *, overwrite: bool = False) -> None:
    """Write the messages in the form that the file's extension names: .md, .txt or .jsonl.

    JSON lines are verbatim; in the others control characters are replaced, so that they can be shown by any program.

    Raises:
        InfLLMError: another extension; a file that is there already, unless it may be overwritten; one that cannot be
            written.
    """
    form = FORMS.get(path.suffix.lower())
    if form is None:
        raise InfLLMError(f"{path}: give a name that ends in {', '.join(FORMS)}")
    if not overwrite and os.path.lexists(path):
        raise InfLLMError(f"{path} is there already: /save! {path} overwrites it")
    try:
        write_atomically(path, lambda file: file.writelines(form(message).encode() for message in messages))
    except OSError as error:
        raise InfLLMError(f"{path} cannot be written: {error.strerror or error}") from None


def _as_markdown(message: Message) -> str:
    calls = "".join(f"\n\n    {line}" for line in _calls(message))
    return f"## {message_head(message)}\n\n{printable(message.text)}{calls}\n\n"


def _as_text(message: Message) -> str:
    lines = [*printable(message.text).split("\n"), *_calls(message)]
    return "\n".join([message_head(message), *(f"    {line}".rstrip() for line in lines)]) + "\n\n"


def _as_json(message: Message) -> str:
    calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.calls]
    return json.dumps(message_fields(message) | {"call_id": message.call_id, "calls": calls}) + "\n"


def _calls(message: Message) -> list[str]:
    return [f"calls {printable(call.name)} {json.dumps(call.arguments)}" for call in message.calls]


FORMS: dict[str, Callable[[Message], str]] = {".md": _as_markdown, ".txt": _as_text, ".jsonl": _as_json}
