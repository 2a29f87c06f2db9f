"""Metrics and logs: what they say is what happened."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.blocks.device_cache import BlockCache
from infllm_agent.blocks.segments import BlockFiles
from infllm_agent.blocks.store import BlockStore
from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import Cancelled, ConfigError, InvalidName, StorageError
from infllm_agent.integrations.langchain import ChatInfLLM
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform import logs
from infllm_agent.storage.session_store import SessionStore

SMALL = MemoryConfig(
    n_init=4, n_local=32, block_size=8, topk=2, candidates=4, chunk_size=16, max_cached_block=4, question_tail=8
)
SECRET = "xylophone"
LOG = "".join(f"line {n}: the tool printed error {n * 7 % 13} {SECRET}\n" for n in range(20))
GUIDE = Path(__file__).parents[2] / "docs" / "runtime.md"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny_model: LocalModel, tmp_path: Path) -> Iterator[Callable[..., AgentRuntime]]:
    opened: list[AgentRuntime] = []

    def make(root: str = "root", **config: Any) -> AgentRuntime:
        settings = RuntimeConfig(**{"metrics": True} | config)
        opened.append(AgentRuntime(tmp_path / root, tiny_model, SMALL, settings))
        return opened[-1]

    yield make
    for runtime in opened:
        runtime.close()


def scraped(runtime: AgentRuntime) -> dict[str, float]:
    """What a scrape gives, by the name of the sample and its labels' values."""
    assert runtime.metrics is not None
    samples = [sample for family in text_string_to_metric_families(runtime.metrics.text()) for sample in family.samples]
    return {
        " ".join([sample.name.removeprefix("infllm_"), *sample.labels.values()]): sample.value for sample in samples
    }


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Keys or values of a block, counted where they are: in the device's cache, in host memory, in files."""
    seen = {"device": 0, "host": 0, "disk": 0}
    fetch, planes, read, attend = BlockCache.fetch, BlockStore._planes, BlockFiles.read, MemoryLayer.attend
    attending = False  # else a fork looks for what an earlier window held

    def counting_fetch(cache: BlockCache, blocks: list[int], loader: Any) -> list[int]:
        seen["device"] += 2 * sum(block in cache for block in blocks)
        return fetch(cache, blocks, loader)

    def counting_planes(store: BlockStore, blocks: Sequence[int], *arguments: Any) -> Any:
        seen["host"] += len(blocks) * attending
        return planes(store, blocks, *arguments)

    def counting_read(files: BlockFiles, blocks: Sequence[int], *arguments: Any) -> None:
        seen["host"] -= len(blocks) * attending
        seen["disk"] += len(blocks) * attending
        read(files, blocks, *arguments)

    def attending_attend(*arguments: Any, **options: Any) -> Any:
        nonlocal attending
        attending = True
        try:
            return attend(*arguments, **options)
        finally:
            attending = False

    monkeypatch.setattr(MemoryLayer, "attend", attending_attend)
    monkeypatch.setattr(BlockCache, "fetch", counting_fetch)
    monkeypatch.setattr(BlockStore, "_planes", counting_planes)
    monkeypatch.setattr(BlockFiles, "read", counting_read)
    return seen


def test_what_is_counted_is_what_happened(make: Callable[..., AgentRuntime], fetched: dict[str, int]) -> None:
    runtime = make()
    ops, web = runtime.session("ops"), runtime.session("web")
    ops.append_system("You read logs.")
    ops.append_tool_result("shell", LOG)
    replies = [ops.reply(max_tokens=5)]
    ops.commit()  # from here on its blocks lie in files
    ops.append_user("and then?")
    replies.append(ops.reply(max_tokens=7))
    web.append_user("hello")
    pieces = web.stream_reply(max_tokens=50, temperature=2.0, seed=1)
    next(pieces)
    pieces.close()
    assert web.last_reply is not None
    replies.append(web.last_reply)
    chunks = [length for session in (ops, web) for _, length in session.chunks()]
    now = scraped(runtime)
    assert now["tokens_read_total"] == sum(chunks) == ops.memory.length + web.memory.length
    assert now["forward_seconds_count decode"] == chunks.count(1)
    assert now["forward_seconds_count prefill"] == len(chunks) - chunks.count(1)
    assert now["tokens_written_total"] == sum(reply.usage.output_tokens for reply in replies)
    assert now["answers_total length"] == 2
    assert now["answers_total cancelled"] == 1
    assert now["first_token_seconds_count"] == now["answer_seconds_count"] == 3
    assert now["first_token_seconds_sum"] == pytest.approx(sum(reply.first_token_s for reply in replies))
    assert [now[f"messages_total {role}"] for role in ("system", "tool", "user", "assistant")] == [1, 1, 2, 3]
    assert now["sessions_opened_total"] == now["sessions_open"] == 2
    assert now["commit_seconds_count"] == 1
    assert {tier: now[f"block_lookups_total {tier}"] for tier in fetched} == fetched
    assert all(fetched.values())
    size = ops.memory.store.shape.plane_bytes(0)
    assert now["block_loaded_bytes_total host"] == fetched["host"] * size
    assert now["block_loaded_bytes_total disk"] == fetched["disk"] * size
    assert now["memory_bytes device"] == ops.memory.bytes() + web.memory.bytes()
    assert now["memory_bytes host"] == runtime.tiers.host_bytes() > 0
    assert now["memory_bytes disk"] == ops.memory.store.stored * ops.memory.store.shape.stride > 0
    runtime.release("ops")
    runtime.release("web")
    closed = scraped(runtime)
    assert [closed[name] for name in ("sessions_open", "memory_bytes device", "memory_bytes disk")] == [0, 0, 0]
    assert closed["commit_seconds_count"] == 3
    assert closed["tokens_read_total"] == now["tokens_read_total"]


def test_lookups_survive_a_rollback_and_a_fork(make: Callable[..., AgentRuntime], fetched: dict[str, int]) -> None:
    """Both make a new memory, whose own counters begin at 0."""
    runtime = make()
    session = runtime.session("ops")
    session.append_tool_result("shell", LOG)
    session.commit()
    session.append_tool_result("shell", LOG)
    session.rollback()
    session.append_tool_result("shell", LOG)
    runtime.fork("ops", "what-if", 1).append_tool_result("shell", LOG)
    now = scraped(runtime)
    assert {tier: now[f"block_lookups_total {tier}"] for tier in fetched} == fetched
    assert now["messages_total tool"] == 4
    assert now["sessions_opened_total"] == 2


def test_live_sessions_and_langchains_are_counted(make: Callable[..., AgentRuntime]) -> None:
    runtime = make()
    live = runtime.live("ops")
    with runtime.model.turns.turn(runtime.model):  # the model is busy, so that something waits
        live.append_tool_result("shell", LOG).result(20)
        asked = threading.Thread(target=live.reply, kwargs={"max_tokens": 3})
        asked.start()
        live.stream("user")  # waits behind the answer
        while (busy := scraped(runtime))["model_waiting_threads"] == 0 or busy["queued_items"] < 2:
            pass
        assert busy["sessions_running"] == 1
        assert busy["sessions_open"] == 1
    asked.join()
    ChatInfLLM(runtime=runtime, session_id="chain", max_tokens=2).invoke("hello")
    runtime.close()
    now = scraped(runtime)
    assert now["answer_queue_seconds_count"] == 1
    assert now["answers_total length"] == 2
    assert now["tokens_written_total"] == 5
    assert [now[name] for name in ("sessions_running", "queued_items", "queued_chars", "sessions_open")] == [0] * 4


def test_queued_text_is_counted(make: Callable[..., AgentRuntime]) -> None:
    runtime = make(waiting_tokens=1)
    live = runtime.live("ops")
    with runtime.model.turns.turn(runtime.model):
        live.append_user("x" * 600).result(20)
        live.append_user("y" * 300)
        assert scraped(runtime)["queued_chars"] == 300
        assert scraped(runtime)["queued_items"] == 1


def test_a_failure_is_counted_once(make: Callable[..., AgentRuntime], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = make()
    live = runtime.live("ops")
    with pytest.raises(InvalidName):
        live.append("king", "b").result(20)
    with pytest.raises(ConfigError):
        live.reply(temperature=-1)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:  # seen by the commit, the worker and the dispatcher
        patch.setattr(SessionStore, "commit", full)
        with pytest.raises(StorageError):
            live.append_user("lost").result(20)
    plain = runtime.session("plain")
    plain.append_user("hello")
    plain.cancelled = lambda: True
    with pytest.raises(Cancelled):  # which is no failure
        plain.append_tool_result("shell", LOG)
    now = scraped(runtime)
    failures = {name: value for name, value in now.items() if name.startswith("failures_total")}
    assert failures == {
        "failures_total InvalidName": 1,
        "failures_total ConfigError": 1,
        "failures_total StorageError": 1,
    }


def test_scrapes_while_others_work(make: Callable[..., AgentRuntime]) -> None:
    runtime = make(workers=3)
    done, falls = threading.Event(), []

    def scrape() -> None:
        before: dict[str, float] = {}
        while not done.wait(0.01):
            now = scraped(runtime)
            falls.extend(name for name in before if name.endswith("_total") and now[name] < before[name])
            before = now

    scrapers = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in scrapers:
        thread.start()
    lives = [runtime.live(f"s{n}") for n in range(4)]
    for live in lives:
        live.append_tool_result("shell", LOG)
    written = sum(live.reply(max_tokens=4).usage.output_tokens for live in lives)
    runtime.close()
    done.set()
    for thread in scrapers:
        thread.join()
    assert not falls
    assert scraped(runtime)["tokens_written_total"] == written
    stored = [SessionStore.open(runtime.root, live.name, readonly=True).chunks() for live in lives]
    assert scraped(runtime)["tokens_read_total"] == sum(length for chunks in stored for _, length in chunks)


def test_two_runtimes_count_apart_and_none_counts_by_default(make: Callable[..., AgentRuntime]) -> None:
    one, other, silent = make(), make("elsewhere"), make("third", metrics=False)
    for runtime in (one, silent):
        runtime.session("ops").append_user("hello")
    assert silent.metrics is None
    assert scraped(one)["messages_total user"] == 1
    assert "messages_total user" not in scraped(other)


def test_they_are_served(make: Callable[..., AgentRuntime]) -> None:
    runtime = make()
    assert runtime.metrics is not None
    port = runtime.metrics.serve(0)
    runtime.session("ops").append_user("hello")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        assert 'infllm_messages_total{role="user"} 1.0' in page.read().decode()
    with pytest.raises(ConfigError, match=f"on port {port}"):
        runtime.metrics.serve(0)
    other = make("elsewhere")
    assert other.metrics is not None
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1"):
        other.metrics.serve(port)
    runtime.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_without_the_library_the_error_names_the_extra(
    make: Callable[..., AgentRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "infllm_agent.session.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r'pip install "infllm-agent\[metrics\]"'):
        make()
    make(metrics=False).session("ops").append_user("works without")


def test_the_guide_names_every_metric(make: Callable[..., AgentRuntime]) -> None:
    runtime = make()
    assert runtime.metrics is not None
    families = [family for family in runtime.metrics.registry.collect() if family.name.startswith("infllm_")]
    known = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    rows = [line for line in GUIDE.read_text("utf-8").splitlines() if line.startswith("| `infllm_")]
    assert set(re.findall(r"`(infllm_\w+)", "".join(row.split("|")[1] for row in rows))) == known


# -- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What came to stderr; afterwards logging is as it was."""
    logger = logging.getLogger(logs.LOGGER)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield lambda: capsys.readouterr().err
    logger.handlers, logger.level, logger.propagate = before


def test_nothing_is_logged_unless_asked_for(make: Callable[..., AgentRuntime], stderr: Callable[[], str]) -> None:
    live = make(metrics=False).live("ops")
    with pytest.raises(InvalidName):
        live.append("king", "b").result(20)
    assert stderr() == ""


def test_the_log_says_what_happens_and_no_texts(make: Callable[..., AgentRuntime], stderr: Callable[[], str]) -> None:
    logs.setup("json", level="DEBUG")
    logs.setup("json")  # once more does not double it
    runtime = make(metrics=False)
    session = runtime.session("ops")
    session.append_system(f"Never say {SECRET}.")
    session.append_tool_result("shell", LOG)
    reply = session.reply(max_tokens=4, prefix=SECRET)
    session.fork("what-if").close()
    live = runtime.live("live")
    live.append_user(SECRET)
    live.reply(max_tokens=2)
    with pytest.raises(InvalidName):
        live.append("king", SECRET).result(20)
    runtime.close()
    written = stderr()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["event"] for line in lines if line.get("session") == "ops"] == [
        *["opened", "message", "message", "message", "answered", "committed", "closed"]
    ]
    assert [line["event"] for line in lines if line.get("session") == "what-if"] == ["opened", "forked", "closed"]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    (answered,) = [line for line in lines if line["event"] == "answered" and line["session"] == "ops"]
    assert answered["output_tokens"] == reply.usage.output_tokens == 4
    assert answered["seconds"] == pytest.approx(reply.seconds, abs=1e-5)
    (failed,) = [line for line in lines if line["level"] == "WARNING"]
    assert (failed["event"], failed["session"], failed["error"]) == ("failed", "live", "InvalidName")
    assert SECRET not in written


def test_what_nobody_else_hears_of_has_a_traceback(
    make: Callable[..., AgentRuntime], stderr: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.setup("json", level="ERROR")
    live = make().live("ops")
    live.append_user("hello").result(20)
    monkeypatch.setattr(LocalModel, "forward", lambda *_, **__: 1 / 0)
    live.append_tool_result("shell", LOG)
    with pytest.raises(ZeroDivisionError):
        live.flush(20)
    (line,) = [json.loads(line) for line in stderr().splitlines()]
    assert "ZeroDivisionError" in line["traceback"]
    assert (line["session"], line["error"]) == ("ops", "ZeroDivisionError")


def test_a_line_of_text_stays_one(stderr: Callable[[], str]) -> None:
    logs.setup("text")
    logs.event(logging.getLogger("infllm_agent.x"), logging.INFO, "e", "%(said)s", said="a\nWARNING \x1b[2J")
    (line,) = stderr().splitlines()
    assert line.endswith("INFO a\ufffdWARNING \ufffd[2J")


@pytest.mark.parametrize(("format", "level"), [("xml", "INFO"), ("json", "LOUD")])
def test_unknown_formats_and_levels(format: Any, level: str) -> None:
    with pytest.raises(ConfigError, match=r"xml|LOUD"):
        logs.setup(format, level)


def test_the_command_line_logs(cli: Any, stderr: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFLLM_LOG", "json")
    done = cli("ingest", "ops", stdin=LOG.encode())
    assert done.code == 0
    assert [json.loads(line)["event"] for line in done.err.splitlines()] == ["opened", "message", "committed", "closed"]
    monkeypatch.setenv("INFLLM_LOG", "xml")
    assert cli("sessions", "list").code == 2
    monkeypatch.delenv("INFLLM_LOG")
    assert cli("--log", "text", "sessions", "list").code == 0
