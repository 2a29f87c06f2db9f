"""The command line: what it prints, how it exits, and what it leaves behind."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import get_args

import pytest

from infllm_agent import __version__
from infllm_agent.cli import ask
from infllm_agent.cli import input as cli_input
from infllm_agent.cli import options as cli_options
from infllm_agent.cli import output as cli_output
from infllm_agent.cli.chat import loop as cli_chat
from infllm_agent.config import MemoryConfig, SamplingConfig
from infllm_agent.session import session as sessions
from infllm_agent.storage.catalog import Catalog

LINE = "12:30 the tool printed error 404 and the agent asked again\n"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


# -- the main path ---------------------------------------------------------------------------------------------------


def test_ingest_ask_and_look(cli, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("the tool printed a line\nretry in 5 s\n\nerror 404\n")
    done = cli("ingest", "ops", str(log), "--lines", "--role", "tool", "--name", "shell", "--json").json
    assert {"session": "ops", "messages": 3, "role": "tool"}.items() <= done.items()
    assert done["tokens"] > 10
    assert done["tok_s"] == pytest.approx(done["tokens"] / done["seconds"])

    answer = cli("ask", "ops", "what failed?", "--max-tokens", "5", "--json").json
    assert set(answer) >= {"text", "tool_calls", "usage", "first_token_s", "seconds", "attended"}
    usage = answer["usage"]
    assert usage["input_tokens"] == usage["prefilled_tokens"] + usage["reused_tokens"]
    assert 1 <= usage["output_tokens"] <= 5
    assert {item["message"] for item in answer["attended"]} <= {0, 1, 2}
    assert sum(item["share"] for item in answer["attended"]) == pytest.approx(1)

    (listed,) = cli("sessions", "list", "--json").json
    assert list(listed) == ["name", "messages", "tokens", "blocks", "bytes", "created", "updated", "model"]
    assert (listed["name"], listed["messages"], listed["model"]) == ("ops", 5, str(cli.model))
    assert set(listed["bytes"]) == {"device", "host", "disk"}
    assert listed["bytes"]["disk"] > 0
    shown = cli("sessions", "show", "ops", "--last", "2", "--json").json
    assert listed.items() <= shown.items()
    assert [message["role"] for message in shown["recent"]] == ["user", "assistant"]
    assert shown["recent"][1]["text"] == answer["text"]

    (found,) = cli("sessions", "search", "ops", "ERROR", "--json").json
    assert list(found) == ["message", "role", "name", "time", "text"]
    assert (found["message"], found["role"], found["name"], found["text"]) == (2, "tool", "shell", "error 404")
    assert cli("sessions", "search", "ops", "nowhere", "--json").json == []


def test_people_are_shown_the_same(cli):
    assert cli("sessions", "list").out == f"no sessions in {cli.root}\n"
    told = cli("ingest", "ops", stdin=b"one observation with \x1b[2Jan escape\n" + b"x" * 3000)
    assert re.fullmatch(r"ops: 1 message, [\d,]+ tokens in [\d.]+ s \([\d,]+ tok/s\)\n", told.out)
    head, row = cli("sessions", "list").out.splitlines()
    assert head.split()[:3] == ["name", "messages", "tokens"]
    assert row.split()[:2] == ["ops", "1"]
    shown = cli("sessions", "show", "ops").out
    assert "[0] observation, " in shown
    assert "more characters" in shown
    assert "\x1b" not in shown
    assert "[0] observation" in cli("sessions", "search", "ops", "escape").out
    assert cli("sessions", "search", "ops", "nowhere").out == "nothing found\n"


def test_an_answer_under_a_schema(cli, tmp_path):
    cli("ingest", "ops", stdin=b"the disk is full")
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"what": {"enum": ["disk", "net"]}}, "required": ["what"]}')
    answer = cli("ask", "ops", "what?", "--schema", str(schema), "--json").json
    assert json.loads(answer["text"])["what"] in ("disk", "net")
    assert (answer["finish_reason"], answer["tool_calls"]) == ("stop", [])
    schema.write_text('{"type": "nonesuch"}')
    assert "nonesuch" in cli("ask", "ops", "what?", "--schema", str(schema)).error
    schema.write_text("{")
    assert cli("ask", "ops", "what?", "--schema", str(schema)).code == 2


def test_the_answer_is_streamed_and_begins_with_the_prefix(cli, monkeypatch):
    pieces = []
    monkeypatch.setattr(ask, "write_piece", pieces.append)
    cli("ingest", "ops", stdin=b"error 404")
    assert cli("ask", "ops", "what?", "--prefix", "It was", "--max-tokens", "6").out == "\n"
    assert pieces[0] == "It was"
    assert len(pieces) > 2
    with cli.store("ops") as store:
        assert store.messages()[-1].text == "".join(pieces)


def test_sampling_options_reach_the_answer(cli):
    cli("ingest", "ops", stdin=b"error 404")
    ask = ("ask", "ops", "what?", "--json", "--temperature", "5", "--max-tokens", "8")
    texts = {cli(*ask, "--seed", seed).json["text"] for seed in "1234"}
    assert len(texts) > 1
    assert cli("ask", "ops", "what?", "--max-tokens", "3", "--json").json["finish_reason"] in ("length", "stop")


def test_tracing_is_an_option(cli):
    cli("ingest", "ops", stdin=b"error 404")
    ask = ("ask", "ops", "what failed?", "--max-tokens", "2", "--json")
    assert cli(*ask, "--trace", "off").json["attended"] == []
    with cli.store("ops") as store:
        assert store.traced() == []
    assert {"message", "share", "focus"} == set(cli(*ask, "--trace", "on").json["attended"][0])
    cli(*ask)
    with cli.store("ops") as store:
        sizes = {trace.answer: len(trace.layers) for trace in store.traces()}
        assert sizes == {4: 3, 6: 3}
    assert "perhaps" in cli(*ask, "--trace", "perhaps").error


def test_memory_options_hold_for_a_new_session_and_stay_with_it(cli):
    small = ("--n-local", "64", "--block-size", "16", "--chunk-size", "32", "--topk", "2", "--n-init", "8")
    cli("ingest", "ops", *small, stdin=LINE.encode() * 40)
    with cli.store("ops") as store:
        memory = store.fingerprint["memory"]
    assert (memory["n_local"], memory["block_size"], memory["topk"]) == (64, 16, 2)
    assert cli("ingest", "ops", stdin=b"no options: its own").code == 0
    assert cli("ingest", "ops", "--topk", "2", stdin=b"the same again").code == 0
    assert cli("sessions", "show", "ops", "--json").json["blocks"] > 10
    assert "memory.topk" in cli("ingest", "ops", "--topk", "3", stdin=b"another").error


def test_every_setting_is_an_option(cli):
    text = cli("ask", "--help").out
    for name in (*MemoryConfig.model_fields, *SamplingConfig.model_fields):
        assert f"--{name.replace('_', '-')} " in text


def test_roles_are_those_of_the_chat_format():
    from infllm_agent.chat.format import ROLES

    assert get_args(cli_options.Role) == ROLES


def test_a_stream_is_committed_on_the_way(cli, monkeypatch):
    monkeypatch.setattr(sessions, "COMMIT_TOKENS", 100)
    cli("ingest", "ops", "--lines", stdin=LINE.encode() * 20)
    with cli.store("ops") as store:
        assert store.message_count == 20
        assert store.generation > 3


def test_delete(cli):
    cli("ingest", "ops", stdin=b"text")
    assert "--yes" in cli("sessions", "delete", "ops").error
    assert cli("sessions", "delete", "ops", "--yes", "--json").json == {"deleted": "ops"}
    assert cli("sessions", "list", "--json").json == []
    assert cli("sessions", "delete", "ops", "--yes").error.startswith('error: no session "ops"')


def test_fork(cli):
    sizes = ("--n-local", "32", "--block-size", "8", "--chunk-size", "16", "--topk", "2", "--n-init", "4")
    cli("ingest", "ops", "--lines", *sizes, stdin=LINE.encode() * 12)
    whole = cli("sessions", "fork", "ops", "whole", "--json").json
    shown = cli("sessions", "show", "whole", "--last", "0", "--json").json
    assert shown.items() >= whole.items()
    assert (whole["name"], whole["messages"]) == ("whole", 12)
    assert whole["blocks"] > 10
    assert re.fullmatch(
        r"early: 3 messages, [\d,]+ tokens\n", cli("sessions", "fork", "ops", "early", "--messages", "3").out
    )
    with cli.store("ops") as source, cli.store("early") as fork:
        assert fork.messages() == source.messages(0, 3)
    assert cli("ask", "early", "what failed?", "--max-tokens", "2", "--json").json["usage"]["reused_tokens"] > 50
    assert "already exists" in cli("sessions", "fork", "ops", "early").error
    assert "after 13 messages: it has 12" in cli("sessions", "fork", "ops", "never", "--messages", "13").error
    assert "no session" in cli("sessions", "fork", "nothing", "never").error
    assert len(cli("sessions", "list", "--json").json) == 3


def test_fork_loads_the_model_where_it_must(cli):
    sizes = ("--n-local", "32", "--block-size", "8", "--chunk-size", "16", "--topk", "2", "--n-init", "4")
    cli("ingest", "ops", "--lines", "--block-key", "representatives", *sizes, stdin=LINE.encode() * 12)
    assert cli("sessions", "fork", "ops", "early", "--messages", "3", "--json").json["messages"] == 3
    with cli.store("ops") as source, cli.store("early") as fork:
        assert fork.messages() == source.messages(0, 3)
        assert fork.chunks() == source.chunks()[: len(fork.chunks())]


def test_version_and_help(cli):
    assert cli("--version").out == f"infllm-agent {__version__}\n"
    assert cli("--help").code == 0
    assert cli("sessions", "--help").code == 0


# -- chat ------------------------------------------------------------------------------------------------------------


def test_chat_answers_lines_and_obeys_commands(cli):
    lines = [
        "hello",
        "/observe the disk is full",
        "/usage",
        "/search disk",
        "/history 1",
        "//etc is a folder",
        "/fork other 1",
        "/help",
        "/quit",
        "x",
    ]
    talk = cli("chat", "ops", "--max-tokens", "3", stdin="\n".join(lines).encode())
    assert talk.code == 0
    assert "3 messages, " in talk.out
    assert talk.out.count("the disk is full") == 2
    assert "/history [N]" in talk.out
    assert 'session "other" made, 1 message' in talk.out
    with cli.store("other") as store:
        assert [m.text for m in store.messages()] == ["hello"]
    with cli.store("ops") as store:
        messages = store.messages()
    assert [m.role for m in messages] == ["user", "assistant", "observation", "user", "assistant"]
    assert messages[3].text == "/etc is a folder"


def test_chat_survives_wrong_commands(cli):
    talk = cli("chat", "ops", "--max-tokens", "2", stdin=b"/nothing\n/history x\n/observe\n/fork\n/fork a 9\n\nhello")
    assert talk.code == 0
    assert len(talk.err.splitlines()) == 5
    with cli.store("ops") as store:
        assert store.message_count == 2


@pytest.fixture
def _signals_arrive():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals_arrive")
def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(cli, monkeypatch):
    pressed = []

    def press_once(piece):
        if not pressed:
            pressed.append(piece)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(cli_chat, "write_piece", press_once)
    assert cli("chat", "ops", "--max-tokens", "9", stdin=b"first\nsecond\n").code == 0
    with cli.store("ops") as store:
        messages = store.messages()
    assert [m.role for m in messages] == ["user", "assistant", "user", "assistant"]
    assert len(messages[1].text) < len(messages[3].text)


@pytest.mark.usefixtures("_signals_arrive")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_answer_that_is_stopped_stays_as_it_stands(cli, monkeypatch, number):
    cli("ingest", "ops", stdin=b"error 404")
    monkeypatch.setattr(ask, "write_piece", lambda piece: os.kill(os.getpid(), number))
    stopped = cli("ask", "ops", "what?", "--max-tokens", "50")
    assert stopped.code == 1
    with cli.store("ops") as store:
        assert [m.role for m in store.messages()] == ["observation", "user", "assistant"]
        told = f'interrupted: 3 messages, {store.token_count:,} tokens are committed in session "ops"'
    assert stopped.error == told


def test_an_answer_that_nobody_reads_is_kept(cli, monkeypatch):
    cli("ingest", "ops", stdin=b"error 404")

    def closed(piece):
        raise BrokenPipeError

    monkeypatch.setattr(ask, "write_piece", closed)
    monkeypatch.setattr(cli_output, "_discard_stdout", lambda: None)
    assert cli("ask", "ops", "what?").error == "error: whoever read the output has closed it"
    with cli.store("ops") as store:
        assert [m.role for m in store.messages()] == ["observation", "user", "assistant"]


# -- processes -------------------------------------------------------------------------------------------------------


def test_stdout_and_stderr_are_pure(cli):
    process = cli.start("ingest", "ops", "-", "--json")
    out, err = process.communicate(b"error 404")
    assert process.returncode == 0
    assert json.loads(out)["messages"] == 1
    assert out.count(b"\n") == 1
    assert err == b""


def test_what_needs_no_model_does_not_load_torch(cli):
    cli("ingest", "ops", stdin=b"error 404")
    program = (
        "import sys; from infllm_agent.cli.app import main;"
        "codes = [main(a.split()) for a in ('sessions list', 'sessions show ops', 'sessions search ops error',"
        " 'ask nobody why', 'ask ops why --topk x', 'sessions delete ops --yes', '--help')];"
        "heavy = sys.modules.keys() & {'torch', 'transformers', 'langchain_core', 'rich.progress'};"
        "print(codes, sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stderr.splitlines()[-1] == "[0, 0, 0, 1, 2, 0, 0] []"


def test_a_reader_that_leaves_early(cli):
    cli("ingest", "ops", stdin=b"error 404")
    command = [sys.executable, "-m", "infllm_agent", "sessions", "show", "ops"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == "error: whoever read the output has closed it\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ingest_interrupted_between_lines(cli, number):
    lines = [f"{i} {LINE}" for i in range(1000)]
    process = cli.start("ingest", "ops", "--lines")
    process.stdin.write("".join(lines).encode())
    process.stdin.flush()  # and not closed: it waits for more
    wait_until(lambda: _committed(cli, "ops") > sessions.COMMIT_TOKENS)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == b""
    with cli.store("ops") as store:
        messages = store.messages()
        kept = f'{store.message_count:,} messages, {store.token_count:,} tokens are committed in session "ops"'
    assert err.decode() == f"interrupted: {kept}\n"
    assert [m.text + "\n" for m in messages[:-1]] == lines[: len(messages) - 1]
    assert lines[len(messages) - 1].startswith(messages[-1].text)
    assert cli("ask", "ops", "what happened?", "--max-tokens", "2", "--json").json["usage"]["output_tokens"] >= 1


def test_ingest_interrupted_within_a_message(cli):
    text = LINE * 3000
    process = cli.start("ingest", "ops", "--role", "tool", "--name", "shell")
    process.stdin.write(text.encode())  # returns when all but a pipe's capacity was read
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.startswith(b"interrupted: 1 message, ")
    with cli.store("ops") as store:
        (message,) = store.messages()
    assert message.role == "tool"
    assert len(message.text) > len(LINE)
    assert text.startswith(message.text)
    assert cli("ask", "ops", "what happened?", "--max-tokens", "2").code == 0


def test_ingest_killed(cli):
    process = cli.start("ingest", "ops", "--lines")
    lines = [f"{i} {LINE}" for i in range(1000)]
    process.stdin.write("".join(lines).encode())
    process.stdin.flush()
    wait_until(lambda: _committed(cli, "ops") > sessions.COMMIT_TOKENS)
    process.kill()
    process.communicate()
    with cli.store("ops") as store:
        assert [m.text + "\n" for m in store.messages()] == lines[: store.message_count]
        before = store.message_count
    assert cli("ingest", "ops", stdin=b"going on").code == 0
    assert cli("sessions", "show", "ops", "--json").json["messages"] == before + 1


def test_the_second_ctrl_c_ends_it_at_once():
    program = (
        "import os, signal; from infllm_agent.cli.input import Interrupts\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Interrupts() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); assert stop()\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout) == (-signal.SIGINT, b"")


def _committed(cli, session: str) -> int:
    found = {info.name: info for info in Catalog(cli.root).list()}
    return found[session].tokens if session in found else 0


# -- parts -----------------------------------------------------------------------------------------------------------


def test_lines_are_cut_the_same_however_they_arrive(monkeypatch):
    data = "a é\r\n\n漢字\rb\nlast".encode()
    for size in (1, 2, 3, 100):
        monkeypatch.setattr(cli_input, "READ_BYTES", size)
        source = io.BytesIO(data)
        assert list(cli_input.read_lines(source, cli_input.Interrupts())) == ["a é", "", "漢字", "b", "last"]
        source.seek(0)
        assert "".join(cli_input.read_text(source, cli_input.Interrupts())) == data.decode()


def test_progress_is_for_terminals_only(capsys):
    with cli_output.progress("ingesting", 100) as show:
        show(50, "half")
    cli_output.note("fetching")
    assert capsys.readouterr() == ("", "")
