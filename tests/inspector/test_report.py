"""The inspector: what a stored session's answers attended to, gathered without a model, and shown."""

from __future__ import annotations

import io
import itertools
import json
import time
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from rich.console import Console

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, InfLLMError, UnknownMessage, UnknownSession
from infllm_agent.inspector import html, picture
from infllm_agent.inspector.places import Places, open_tokenizer
from infllm_agent.inspector.report import gather
from infllm_agent.inspector.terminal import render
from infllm_agent.messages import Message
from infllm_agent.storage.session_store import SessionStore

pytestmark = pytest.mark.usefixtures("one_thread")

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script> ]]> &lt;/script&gt; <img src=http://evil.example/x onerror=alert(1)>",
    "line\u2028separator\u2029paragraph",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J",
    "\U0001f600 emoji \U0001f469\u200d\U0001f680, \u202eright to left\u202c, na\u00efve \u65e5\u672c\u8a9e",
    "{{data}} {{script-hash}}",
    "user",
]
LONG = "lorem " * 400 + "the planted needle is 4821 " + "ipsum " * 1200


@pytest.fixture(scope="module")
def root(tiny_model, tmp_path_factory) -> Path:
    """``asked``: hostile texts, a long one, two questions with traced answers. ``silent``: no answers. ``untraced``."""
    from infllm_agent.runtime import AgentRuntime

    folder = tmp_path_factory.mktemp("root")
    memory = MemoryConfig(
        n_init=4, n_local=32, block_size=8, topk=16, max_cached_block=32, candidates=0, chunk_size=64, question_tail=16
    )
    with AgentRuntime(folder, tiny_model, memory) as runtime:
        session = runtime.session("asked")
        session.append_system("You watch a log.")
        for text in HOSTILE:
            session.append_tool_result("shell", text)
        session.append_observation(LONG)
        for question in ("what is the needle?", HOSTILE[0]):
            session.append_user(question)
            session.reply(max_tokens=6)
        session.commit()
        silent = runtime.session("silent")
        silent.append_user("hello")
        silent.commit()
        untraced = runtime.session("untraced")
        untraced.trace = "off"
        untraced.append_user("hello")
        untraced.reply(max_tokens=3)
        untraced.commit()
    return folder


@pytest.fixture(scope="module")
def report(root):
    return gather(root, "asked")


def test_it_holds_what_is_stored(root, report):
    with SessionStore.open(root, "asked", readonly=True) as store:
        assert list(report.messages) == store.messages()
        assert [answer.message for answer in report.answers] == store.traced()
    for answer in report.answers:
        assert report.messages[answer.message].role == "assistant"
        assert answer.question == answer.message - 1
        assert sum(one.share for one in answer.attended) == pytest.approx(1, abs=0.01)
        assert max(one.message for one in answer.attended) < answer.question
        assert answer.trace.sinks + answer.trace.looked_up + answer.trace.window == pytest.approx(1, abs=0.01)
        for number, shades in answer.shades.items():
            length = len(report.messages[number].text)
            assert all(0 <= one.start < one.end <= length for one in shades)
    json.dumps(report.data(), allow_nan=False)


def test_another_process_may_have_it_open(root):
    with SessionStore.open(root, "asked"):
        assert gather(root, "asked").session == "asked"


def test_one_answer_is_chosen_by_number_or_from_the_end(root, report):
    first, last = (answer.message for answer in report.answers)
    assert [a.message for a in gather(root, "asked", first).answers] == [first]
    assert [a.message for a in gather(root, "asked", -1).answers] == [last]
    assert [a.message for a in gather(root, "asked", -2).answers] == [first]
    assert [a.message for a in gather(root, "asked", last=1).answers] == [last]
    for wrong in (0, 999, -3):
        with pytest.raises(UnknownMessage, match=f"answer {wrong} .*{first}, {last}"):
            gather(root, "asked", wrong)


@pytest.mark.parametrize(
    ("name", "error", "what"),
    [
        ("nobody", UnknownSession, "nobody"),
        ("silent", InfLLMError, "no answers yet"),
        ("untraced", InfLLMError, "no trace"),
    ],
)
def test_what_cannot_be_inspected_is_said(root, name, error, what):
    with pytest.raises(error, match=what):
        gather(root, name)


def test_places_are_the_tokens_own(root, report, tiny_model_folder):
    """Put together, the characters of a message's tokens are its text, each in its place."""
    tokenizer = open_tokenizer(str(tiny_model_folder))
    with SessionStore.open(root, "asked", readonly=True) as store:
        places = Places(report.messages, store.token_ids, tokenizer)
        for message in report.messages:
            if message.role == "assistant":
                continue  # a model of random weights says bytes that are no text
            tokens = list(range(message.start, message.end))
            ranges, exact = places.of(message, tokens)
            assert exact
            inside = [one for one in ranges if one[0] < one[1]]
            assert inside[0][0] == 0
            assert inside[-1][1] == len(message.text)
            # A token of plain letters says exactly what stands in its place.
            for token, (start, end) in zip(tokens, ranges, strict=True):
                said = tokenizer.decode(store.token_ids(token, token + 1), skip_special_tokens=False)
                if start < end and "\ufffd" not in said:
                    assert message.text[start:end] == said
            assert set(range(len(message.text))) <= {i for start, end in inside for i in range(start, end)}


def test_without_a_tokenizer_places_are_whole_words_in_proportion(root, report):
    message = next(message for message in report.messages if message.text == LONG)
    with SessionStore.open(root, "asked", readonly=True) as store:
        places = Places(report.messages, store.token_ids, None)
        tokens = [message.start, (message.start + message.end) // 2, message.end - 1]
        ranges, exact = places.of(message, tokens)
    assert not exact
    assert ranges[0][0] == 0
    assert abs(ranges[1][0] - len(LONG) / 2) < 20
    assert ranges[2][1] == len(LONG.rstrip())
    for start, end in ranges:
        assert LONG[start:end] == LONG[start:end].strip()
        assert LONG[start - 1 : start].strip() == LONG[end : end + 1].strip() == ""


def test_a_text_of_broken_bytes_takes_no_time(tiny_model_folder):
    text = "\ufffd" * 20_000
    tokenizer = open_tokenizer(str(tiny_model_folder))
    ids = tokenizer.encode(text).ids
    message = Message(0, "tool", "shell", None, text, 0.0, 0, len(ids))
    places = Places([message], lambda start, stop: ids[start:stop], tokenizer)
    began = time.perf_counter()
    assert places.of(message, [0])[1] is False
    assert time.perf_counter() - began < 1


def test_a_tokenizer_is_never_fetched(tmp_path, monkeypatch):
    import socket

    def refuse(*arguments):
        raise AssertionError("the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "tokenizer.json").write_text("{}")
    for model in ("nobody/nothing", str(tmp_path), str(tmp_path / "none"), "\x00 no name"):
        assert open_tokenizer(model) is None


class _Page(HTMLParser):
    """The scripts of a page, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.addresses: list[str | None] = []
        self.tags: list[str] = []
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
            self._inside = True

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def _parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    return page


def test_the_page_holds_the_report_and_no_other_script(report, tmp_path):
    html.write(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    template = _parsed(files("infllm_agent.inspector").joinpath("page.html").read_text("utf-8"))
    page = _parsed(text)
    assert page.tags == template.tags
    assert page.addresses == []
    assert "http:" not in text.replace(json.dumps(HOSTILE[1])[1:-1].translate(html._ESCAPED), "")
    assert "https:" not in text
    (kind, embedded), (_, script) = page.scripts
    assert kind == {"id": "data", "type": "application/json"}
    assert script == template.scripts[1][1]
    assert not set("<>&\u2028\u2029") & set(embedded)
    assert json.loads(embedded) == json.loads(json.dumps(html.page_data(report)))
    texts = ["".join(part for _, part in message["parts"]) for message in json.loads(embedded)["messages"]]
    assert set(HOSTILE) <= set(texts)


def test_the_page_keeps_of_a_long_text_what_was_attended_to(report):
    data = html.page_data(report)
    cut = [message for message in data["messages"] if message["length"] > html.WHOLE_CHARS]
    assert [report.messages[message["index"]].text for message in cut] == [LONG]
    parts = cut[0]["parts"]
    assert sum(len(part) for _, part in parts) < html.HEAD_CHARS + html.PARTS * (2 * html.AROUND_CHARS + 300)
    assert all(LONG[start : start + len(part)] == part for start, part in parts)
    assert all(a + len(part) < b for (a, part), (b, _) in itertools.pairwise(parts))
    for answer in report.answers:
        shades = answer.shades[cut[0]["index"]]
        most = max(shades, key=lambda one: one.focus)
        assert any(start <= most.start and most.end <= start + len(part) for start, part in parts)


@pytest.mark.parametrize("colour", [False, True])
def test_nothing_of_a_message_steers_the_terminal(report, colour):
    for answer in report.answers:
        out = io.StringIO()
        console = Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=100)
        render(report, answer, console, top=50)
        text = out.getvalue()
        assert "\x9b" not in text
        assert "\x07" not in text
        assert "\x1b]" not in text
        assert colour or "\x1b" not in text
        assert f"answer {answer.message}" in text
        assert "memory: blocks looked up" in text
        assert "tool shell" in text
        assert "[31mred" in text.replace("\n", "")  # shown, without what would make it a command


def test_the_picture_is_a_png(report, tmp_path):
    picture.draw(report, report.answers[0], tmp_path / "heat.png")
    written = (tmp_path / "heat.png").read_bytes()
    assert written.startswith(b"\x89PNG\r\n\x1a\n")
    heat = picture._heat(report.answers[0], report.messages[report.answers[0].message].end)
    for row, layer in zip(heat, report.answers[0].trace.layers, strict=True):
        assert row.sum() == pytest.approx(layer.attention.sum())
        assert row.sum() > 0


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"infllm-agent\[bench\]"):
        picture.check()


def test_the_command(cli, root, report, tmp_path):
    def inspect(*arguments: str):
        return cli("inspect", *arguments, "--root", str(root))

    last = report.answers[-1]
    shown = inspect("asked")
    assert shown.code == 0
    assert f"answer {last.message}" in shown.out
    assert f"answer {report.answers[0].message}" in inspect("asked", "--answer", "-2").out

    value = inspect("asked", "--json", "--top", "2").json
    assert value["answer"]["message"] == last.message
    assert value["question"]["text"] == HOSTILE[0]
    assert [one["message"] for one in value["attended"]] == [one.message for one in last.attended[:2]]
    assert len(value["layers"]) == len(last.trace.layers)

    page, heat = tmp_path / "a.html", tmp_path / "a.png"
    both = inspect("asked", "--html", str(page), "--png", str(heat))
    assert both.out.splitlines() == [f"wrote {page}", f"wrote {heat}"]
    assert page.read_text("utf-8") == html.page(report)
    assert heat.stat().st_size > 0

    for code, what, *arguments in (
        (1, "nobody", "nobody"),
        (1, "no answers yet", "silent"),
        (1, "no trace", "untraced"),
        (1, "has no trace", "asked", "--answer", "0"),
        (1, "No such file", "asked", "--html", str(tmp_path / "none" / "a.html")),
        (1, "Is a directory", "asked", "--png", str(tmp_path)),
        (2, "--top", "asked", "--top", "0"),
    ):
        failed = inspect(*arguments)
        assert failed.code == code
        assert what in failed.error
