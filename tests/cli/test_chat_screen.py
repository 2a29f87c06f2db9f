"""The chat on a terminal: the real program in a pseudo-terminal, and its parts."""

from __future__ import annotations

import io
import json
import re
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

import pyte
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from terminal import Terminal

from infllm_agent.cli.chat.live_text import LiveText
from infllm_agent.cli.chat.screen import highlighted
from infllm_agent.cli.chat.status import wrapped
from infllm_agent.cli.chat.transcript import save
from infllm_agent.errors import InfLLMError
from infllm_agent.messages import Message
from infllm_agent.platform.text import printable
from infllm_agent.storage.session_store import SessionStore

SMALL = ["--n-local", "64", "--block-size", "16", "--chunk-size", "16", "--topk", "2", "--n-init", "8"]
ESCAPES = "\x1b[2J\x1b]0;title\x07 and \x9b31m so \x1b[999;999H on\r!"


@pytest.fixture(scope="module")
def talkative(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, which never ends its answer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("talkative")
    transformers.AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(talkative: Path, tmp_path_factory: pytest.TempPathFactory):
    """Starts a chat. The root is the same for all tests of this file: each begins where the one before has ended."""
    root = tmp_path_factory.mktemp("root")
    started = []

    def start(session: str, *options: str, **env: Any) -> Terminal:
        command = [sys.executable, "-m", "infllm_agent", "chat", session, "--root", str(root)]
        started.append(Terminal([*command, "--model", str(talkative), *options], OMP_NUM_THREADS="1", **env))
        return started[-1]

    start.root = root  # type: ignore[attr-defined]
    yield start
    for terminal in started:
        terminal.child.close(force=True)


def stored(root: Path, session: str) -> list[Message]:
    with SessionStore.open(root, session, readonly=True) as store:
        return store.messages()


def marked(terminal: Terminal) -> str:
    cells = (terminal.screen.buffer[y][x] for y in range(terminal.screen.lines) for x in range(terminal.screen.columns))
    return "".join(cell.data for cell in cells if cell.bold and cell.reverse)


def prompted(terminal: Terminal, answers: int) -> None:
    """Wait until so many answers are done and the prompt is back."""
    terminal.wait(lambda: terminal.text.count("re-used") == answers and "idle" in terminal.text)


# -- the program -----------------------------------------------------------------------------------------------------


def test_a_chat(chat, tmp_path):
    terminal = chat("ops", *SMALL, "--candidates", "4", "--max-tokens", "30")
    terminal.wait("idle")
    assert "ops · idle · 0 tokens" in terminal.text
    assert stat.S_IMODE((chat.root / "chat-history").stat().st_mode) == 0o600

    # Three ways to a new line, and a paste; Tab completes a command.
    terminal.type("first\\\rsecond\nthird\x1b\r\x1b[200~four\r\nfive\x1b[201~\r")
    prompted(terminal, 1)
    terminal.type("\x1b[200~/observe the disk is FULL, garçon; all\x1b]0;of\x07it\x1b[201~\r")
    terminal.wait(lambda: "3 messages" in terminal.text)
    terminal.type("/sea\tDisk garcon\r")
    terminal.wait("[2] observation")
    terminal.wait(lambda: marked(terminal) == "diskgarçon")

    terminal.type("what is it?\r")
    closing = r"read \d+ tokens, re-used \d+; 30 tokens, (?:[\d.,]+ tok/s, )?the first after [\d.]+ s"
    terminal.wait(lambda: re.search(closing, terminal.text.rpartition("what is it?")[2]))
    assert "cut off at max_tokens" in terminal.text
    terminal.wait("hits")
    terminal.type("/inspect\r")
    terminal.wait("memory: blocks looked up")
    terminal.type("/inspect 0\r")
    terminal.wait("error: answer 0 of session")

    terminal.type("/fork early 1\r")
    terminal.wait('session "early" made, 1 message')
    terminal.type("/open earl\r")
    terminal.wait('error: no session "earl"; did you mean "early"?')
    terminal.type("/open ea\t\r")
    terminal.wait('now in session "early", 1 message')
    terminal.wait("early · idle")
    terminal.type("/open! fresh\r")
    terminal.wait("fresh · idle · 0 tokens")
    terminal.type("/sessions\r")
    terminal.wait(
        lambda: re.search(r"^   early +1 ", terminal.text, re.M) and re.search(r"^\* +fresh +0 ", terminal.text, re.M)
    )
    terminal.type("/sessions ops\r")
    terminal.wait("ops · idle")

    for name in ("talk.md", "talk.jsonl"):
        terminal.type(f"/save {tmp_path / name}\r")
        terminal.wait(lambda name=name: (tmp_path / name).exists())
    terminal.type(f"/save {tmp_path / 'talk.md'}\r")
    terminal.wait("already: /save!")
    terminal.type("/no such\r")
    terminal.wait("no command /no;")
    terminal.type("half a line\x03/quit\r")
    assert terminal.end() == 0
    assert b"Traceback" not in terminal.raw
    assert b"\x1b]" not in terminal.raw

    messages = stored(chat.root, "ops")
    assert "\x1b]0;of\x07" in messages[2].text
    assert [m.role for m in messages] == ["user", "assistant", "observation", "user", "assistant"]
    assert messages[0].text == "first\nsecond\nthird\nfour\nfive"
    assert stored(chat.root, "early") == messages[:1]
    lines = [json.loads(line) for line in (tmp_path / "talk.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [m.text for m in messages]
    assert f"\n\n{printable(messages[2].text)}\n\n" in (tmp_path / "talk.md").read_text()


def test_stopping(chat):
    """Ctrl-C while it answers and while it reads, a terminal that becomes narrow, SIGTERM."""
    terminal = chat("ops", "--max-tokens", "100000", NO_COLOR="1")
    terminal.wait("5 messages")
    terminal.type("/history x\r")
    terminal.wait("error: /history x: give a number")
    terminal.type("\x12FULL")  # what was typed in the chat before, found
    terminal.wait("/observe the disk is FULL")
    terminal.type("\r\x03hello\r")  # taken, and thrown away
    terminal.wait("answering")
    terminal.resize(40)
    terminal.type("\x03")
    terminal.wait("stopped; kept as it stands")
    terminal.wait("idle")
    assert len(stored(chat.root, "ops")) == 7

    terminal.type("\x1b[200~" + "the tool printed a line of its log\n" * 400 + "\x1b[201~\r")
    terminal.wait(lambda: re.search(r"reading [\d,]+ of [\d,]+ tokens", terminal.text))
    terminal.type("\x03")
    terminal.wait("stopped; nothing is lost, ")
    terminal.wait("idle")
    assert len(stored(chat.root, "ops")) == 8

    terminal.type("go on\r")
    terminal.wait("answering")
    terminal.child.kill(signal.SIGTERM)
    assert terminal.end() == 1
    messages = stored(chat.root, "ops")
    assert [m.role for m in messages[5:]] == ["user", "assistant", "user", "user", "assistant"]
    assert f"interrupted: {len(messages)} messages" in " ".join(terminal.text.split())
    assert b"Traceback" not in terminal.raw
    styles = re.findall(rb"\x1b\[([\d;]+)m", terminal.raw)
    assert styles
    assert all(int(code) < 30 for style in styles for code in style.split(b";"))  # no colours


def test_a_terminal_that_cannot_move_its_cursor_and_goes_away(chat):
    with SessionStore.open(chat.root, "ops") as store:
        kept = store.message_count
    terminal = chat("ops", "--max-tokens", "100000", TERM="dumb")
    terminal.wait("commands >")
    terminal.type("/history 3\r")
    terminal.wait(lambda: "go on" in terminal.text and terminal.text.endswith(">"))
    assert b"\x1b" not in terminal.raw.replace(b"\x1b[?2004h", b"").replace(b"\x1b[?2004l", b"")
    terminal.type("and now?\r")
    terminal.wait(lambda: len(terminal.text.rpartition("and now?")[2]) > 20)
    terminal.child.ptyproc.fileobj.close()  # child.close() would interrupt it, too, if it is not quick
    while terminal.child.isalive():
        time.sleep(0.05)
    messages = stored(chat.root, "ops")
    assert [m.role for m in messages[kept:]] == ["user", "assistant"]


# -- its parts -------------------------------------------------------------------------------------------------------


class Glass:
    """A screen, and what writes to it as a terminal's driver does."""

    def __init__(self, rows: int, columns: int) -> None:
        self.screen = pyte.Screen(columns, rows)
        self.screen.set_mode(pyte.modes.LNM)
        self.writes: list[str] = []
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> None:
        self.writes.append(text)
        self._stream.feed(text)

    def rows(self) -> list[str]:
        return [row.rstrip() for row in self.screen.display]


PIECES = st.lists(st.one_of(st.text(max_size=30), st.text("ab \n\t漢é", max_size=30), st.none()), max_size=30)


@settings(deadline=None, max_examples=100)
@given(pieces=PIECES, columns=st.integers(10, 30), rows=st.integers(2, 8))
@example(pieces=["a" * 10, None, "b"], columns=10, rows=3)
@example(pieces=[None, "漢" * 5, None, "a" * 9, None, "漢"], columns=10, rows=2)
@example(pieces=[None, ESCAPES, None, ESCAPES], columns=20, rows=5)
def test_streamed_text_stands_as_if_there_were_no_line_beneath(pieces, columns, rows):
    """None is a tick of the clock. The status is as wide as the terminal."""
    live, alone = Glass(rows, columns), Glass(1000, columns)
    text = LiveText(live.write, lambda: columns, lambda: "漢x" * columns)
    for piece in pieces:
        if piece is None:
            text.renew()
            continue
        before = len(live.writes)
        text.text(piece)
        assert len(live.writes) == before + 1
        alone.write(printable(piece))
    y, alone_y = live.screen.cursor.y, alone.screen.cursor.y
    assert live.rows()[: y + 1] == alone.rows()[alone_y - y : alone_y + 1]
    assert y >= min(alone_y, rows - 2)
    assert live.screen.cursor.x == alone.screen.cursor.x
    text.end()
    assert not any(live.rows()[live.screen.cursor.y :])


def test_most_pieces_are_written_as_they_are():
    glass = Glass(10, 40)
    text = LiveText(glass.write, lambda: 40, lambda: "busy")
    text.renew()
    for word in ["one ", "two ", "three "]:
        text.text(word)
    assert glass.writes[1:] == ["one ", "two ", "three "]
    assert glass.rows()[:2] == ["one two three", "busy"]
    text.text("\n")
    assert glass.rows()[:3] == ["one two three", "", "busy"]


@given(st.lists(st.text("abc", min_size=1, max_size=30), max_size=12), st.integers(1, 60))
def test_fields_are_wrapped(fields, width):
    lines = wrapped(fields, width)
    assert " · ".join(lines) == " · ".join(fields)
    assert all(len(line) <= width or " · " not in line for line in lines)


@given(st.text(max_size=600), st.text(max_size=10))
def test_words_are_marked_in_any_text(text, words):
    shown = highlighted(text, words)
    for span in shown.spans:
        found = shown.plain[span.start : span.end]
        assert any(len(word) == len(found) for word in words.split())
    assert shown.plain.removeprefix("... ").removesuffix(" ...") in printable(text)


def test_words_are_marked_whatever_their_case_and_accents():
    shown = highlighted("x" * 900 + " Der Größte Café-Tisch", "CAFE grösste tisch")
    assert [shown.plain[s.start : s.end] for s in shown.spans] == ["Café", "Tisch"]
    assert shown.plain.startswith("... x")


def test_saving(tmp_path):
    messages = [
        Message(0, "tool", "shell", None, ESCAPES, 0.0, 0, 1),
        Message(1, "user", None, None, "é\n漢", 0.0, 1, 2),
    ]
    for name in ("a.md", "a.txt"):
        save(tmp_path / name, messages)
        text = (tmp_path / name).read_text("utf-8")
        assert printable(text) == text
        assert "[0] tool shell, " in text
    save(tmp_path / "a.jsonl", messages)
    assert [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text("utf-8").splitlines()] == [
        m.text for m in messages
    ]
    with pytest.raises(InfLLMError, match="already"):
        save(tmp_path / "a.md", [])
    save(tmp_path / "a.md", [], overwrite=True)
    assert (tmp_path / "a.md").read_text() == ""
    for name, told in [("a", "ends in .md"), ("a.exe", "ends in .md"), ("none/a.md", "cannot be written")]:
        with pytest.raises(InfLLMError, match=told):
            save(tmp_path / name, messages)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.md", "a.txt"]


def test_tables_fit_into_any_terminal(monkeypatch):
    from infllm_agent.cli.chat.screen import Screen

    for width in range(10, 100):
        screen = Screen.__new__(Screen)
        screen._console = Console(file=(shown := io.StringIO()), width=width)
        screen.table(
            ["message", "role", "attention", "text"], [["0", "user", 0.5, "漢字" * 30], ["12", "tool", 1.0, "x"]]
        )
        lines = shown.getvalue().splitlines()
        assert len(lines) == 3
        assert lines[1].split()[0] == "0"
