"""Names, keys and texts as attack: kept verbatim or refused, and never a control token or a path."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chat_families
import tool_families

from infllm_agent import AgentRuntime
from infllm_agent.chat.encoder import clean_text
from infllm_agent.chat.format import ChatFormat
from infllm_agent.errors import InvalidName
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import Message, SessionStore
from infllm_agent.tools import ToolCall, ToolSpec
from survival.script import SETTINGS

SQL = ["'", '"', ";", "--", "/*", "' OR '1'='1", "'); DROP TABLE messages; --", "%", "_", "\\", "NULL", "$x", ":name"]
SQL += ["?1", "{x}", "{0.__class__}", "%s", "__class__", "__reduce__", "lc", "$ref", "constructor", "eval(", "NEAR("]
SQL += ["../", "/etc/passwd", "..", ".", "~", "-rf", "C:\\", "a\0b", "\n", "\r", "\x1b[2J", "con", "*****", "^", "NOT"]
ODD = ["", " ", "\t", "\n\n", "\0", "\x00\x00", "\x7f", "\u202e", "\u2066", "\u200d", "\ufeff", "\u2028", "\x85"]
ODD += ["e\u0301", "\U0001f469\u200d\U0001f680", "数据", "\uffff", "\U0010ffff", "\u0378", "a" * 300, "é" * 50]
LONE = ["\ud800", "\udfff", "\udc80"]  # also what invalid UTF-8 becomes with surrogateescape


def text(dice: random.Random, *, lone: bool = False, pieces: int = 6) -> str:
    """Odd text from odd pieces."""
    kinds = [SQL, ODD, chat_families.CONTROL_TEXTS, *([LONE] if lone else [])]
    parts = []
    for _ in range(dice.randint(0, pieces)):
        if dice.random() < 0.7:
            parts.append(dice.choice(dice.choice(kinds)))
        else:
            points = dice.choice([dice.randrange(0x80), dice.randrange(0xD800), dice.randrange(0xE000, 0x110000)])
            parts.append(chr(points) * dice.randint(1, 3))
    return "".join(parts)


class Names:
    """Names, searches and the keys of what is stored as JSON, in one root."""

    def __init__(self, folder: Path) -> None:
        self._root = folder / "root"
        self._folder = folder
        self._store = SessionStore.create(self._root, "ops", {"model": "tiny"})
        self._waiting: list[Message] = []

    def trial(self, seed: int) -> Counter[str]:
        dice = random.Random(seed)
        good = f"b.{seed}:x" if seed % 10 == 0 else text(dice, lone=True, pieces=3)
        (name,) = dice.choices([text(dice, lone=True, pieces=3), "a" + text(dice, pieces=2), good], [7, 1, 1])
        outcome = self._make(name)
        self._keep(dice)
        found = {path.relative_to(self._folder).parts[0] for path in self._folder.iterdir()}
        assert found == {"root"}, f"something is outside the root: {found}"
        assert {path.name for path in self._root.iterdir()} <= {"sessions", "catalog.db", "catalog.db-journal"}
        return Counter({"names and keys": 1, f"name {outcome}": 1})

    def _make(self, name: str) -> str:
        try:
            with SessionStore.open_or_create(self._root, name, {"model": "tiny", "said": name}) as store:
                assert store.name == name
            assert Catalog(self._root).find(name) is not None
            Catalog(self._root).delete(name)
        except InvalidName as error:
            assert "\n" not in str(error)  # noqa: PT017 - other names are good
            return "refused"
        return "kept"

    def _keep(self, dice: random.Random) -> None:
        """A message, and every tenth time a commit of all of them."""
        count = self._store.message_count + len(self._waiting)
        calls = (ToolCall("grep", {text(dice): {text(dice): text(dice)}}, "call1"),)
        name, call_id = text(dice) or None, text(dice) or None
        self._waiting.append(Message(count, "assistant", name, call_id, text(dice), time.time(), 0, 0, calls))
        if len(self._waiting) == 10:
            self._commit({text(dice): text(dice), "nested": {text(dice): [text(dice)]}}, text(dice, lone=True))

    def _commit(self, state: dict[str, Any], query: str) -> None:
        store, messages = self._store, self._waiting
        self._waiting = []
        store.commit(messages=messages, token_ids=[], chunks=[], state=state, bytes_on_disk=0)
        assert store.messages(-len(messages)) == messages
        assert store.state == state
        for hit in store.search(query, 3):
            assert store.messages(hit.index, hit.index + 1) == [hit]
        for message in messages:
            if message.text.strip():
                assert store.search(message.text, 1), f"{message.text!r} is not found"

    def close(self) -> None:
        self._store.verify()
        self._store.close()


class ControlTokens:
    """Every field of a conversation, in every family of templates, spelling control tokens."""

    def __init__(self) -> None:
        formats = {f"{name} (plain)": chat_families.family(name)[1] for name in chat_families.FAMILY_NAMES}
        formats |= {name: tool_families.family(name, markers=True)[1] for name in tool_families.FAMILIES}
        self._formats = sorted(formats.items())

    def trial(self, seed: int) -> Counter[str]:
        dice = random.Random(seed)
        family, chat = self._formats[seed % len(self._formats)]
        shape = [dice.choice(["system", "user", "assistant", "tool", "observation"]) for _ in range(dice.randint(1, 5))]
        state = dice.getstate()
        hostile = self._controls(chat, shape, dice, lambda: text(dice, lone=True))
        dice.setstate(state)
        harmless = self._controls(chat, shape, dice, lambda: (text(dice, lone=True), "x")[1])
        assert hostile == harmless, f"{family}: control ids {hostile} instead of {harmless}"
        return Counter({"conversations": 1, f"of {family}": 1})

    def _controls(self, chat: ChatFormat, shape: list[str], dice: random.Random, say: Callable[[], str]) -> list[int]:
        ids: list[int] = []
        for number, role in enumerate(shape):
            calls: tuple[ToolCall, ...] = ()
            tools: tuple[ToolSpec, ...] = ()
            if role == "assistant" and dice.random() < 0.5:
                calls = (ToolCall("grep", {say(): say(), "a" + say(): [say(), {say(): 1}]}, "abcdefgh1"),)
            if role == "system" and dice.random() < 0.5:
                schema = {"properties": {"q": {"description": say(), "enum": [say()]}}, "description": say()}
                tools = (ToolSpec("grep", say(), schema),)
            name = "grep" if role in ("tool", "observation") else None
            call_id = "abcdefgh1" if role == "tool" else None
            ids += chat.open(role, name=name, first=number == 0, tools=tools, call_id=call_id)
            # What follows a text may depend on whether there is one.
            body = "x" + say() + "x"
            ids += chat.encoder.encode_text(clean_text(body))
            ids += chat.close(role, name=name, tools=tools, call_id=call_id, calls=calls, after_text=True)
        return [token for token in ids if token in chat.encoder.control_ids]


class OddText:
    """A session that is told odd things, whole and in pieces, and stays usable."""

    RENEW = 100

    def __init__(self, model: LocalModel, folder: Path) -> None:
        self._runtime = AgentRuntime(folder, model, SETTINGS)
        self._name = ""

    def trial(self, seed: int) -> Counter[str]:
        dice = random.Random(seed)
        if seed % self.RENEW == 0 or not self._name:
            if self._name:
                self._runtime.delete(self._name)
            self._name = f"odd-{seed}"
        session = self._runtime.session(self._name)
        session.eager = False
        said, pieces = text(dice, lone=True, pieces=12), []
        role = dice.choice(["user", "tool", "observation", "system"])
        name = "shell" if role == "tool" else None
        if dice.random() < 0.5 or role == "system":
            session.append(role, said, name=name)
        else:
            at = 0
            with session.stream(role, name=name) as sink:
                while at < len(said):
                    size = dice.randint(1, 5)
                    pieces.append(said[at : at + size])
                    sink.write(pieces[-1])
                    at += size
        (message,) = session.messages(-1)
        expected = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in said)
        assert message.text == expected, f"{message.text!r} instead of {expected!r}"
        if dice.random() < 0.1:
            session.reply(max_tokens=2)
            before = session.messages()
            session.commit()
            session.rollback()
            assert session.messages() == before
        return Counter({"odd texts": 1, "streamed": bool(pieces)})
