"""Live sessions: queued, read in the background, bounded, and as durable as what they are made of."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import (
    BudgetExceeded,
    ConfigError,
    InfLLMError,
    InvalidName,
    QueueFull,
    SessionLocked,
    Stopped,
)
from infllm_agent.live.live_session import LiveSession
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.session_store import SessionStore

SMALL = MemoryConfig(
    n_init=4, n_local=32, block_size=8, topk=2, candidates=4, chunk_size=16, max_cached_block=4, question_tail=8
)
LOG = [f"line {n}: the tool printed error {n * 7 % 13} at 12:{n % 60:02d}\n" for n in range(60)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make(tiny_model: LocalModel, tmp_path: Path) -> Iterator[Callable[..., AgentRuntime]]:
    opened: list[AgentRuntime] = []

    def make(**config: Any) -> AgentRuntime:
        runtime = AgentRuntime(tmp_path / "root", tiny_model, SMALL, RuntimeConfig(**config))
        opened.append(runtime)
        return runtime

    yield make
    for runtime in opened:
        runtime.close()


def until(done: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def texts(live: LiveSession) -> list[str]:
    return [message.text for message in live.messages()]


def test_a_live_session_is_a_session(make: Callable[..., AgentRuntime]) -> None:
    """Its history, its chunks and its answer are those of a session that is told the same things directly."""
    runtime = make()
    live, plain = runtime.live("live"), runtime.session("plain")
    receipts = [live.append_system("You read logs."), live.append_observation("rain", name="weather")]
    plain.append_system("You read logs.")
    plain.append_observation("rain", name="weather")
    with live.stream_tool_result("shell", call_id="c1") as sink, plain.stream_tool_result("shell", call_id="c1") as own:
        for line in LOG:
            sink.write(line)
            own.write(line)
    receipts.append(live.append_user("what happened?"))
    plain.append_user("what happened?")
    live.flush(20)  # else the question would begin a chunk of its own
    pieces = live.stream_reply(max_tokens=12)
    streamed = []
    while True:
        try:
            streamed.append(next(pieces))
        except StopIteration as end:
            reply = end.value
            break
    expected = plain.reply(max_tokens=12)
    assert reply.text == "".join(streamed) == expected.text
    assert [receipt.result(0).role for receipt in receipts] == ["system", "observation", "user"]
    assert sink.receipt.result(0).text == "".join(LOG)
    session = runtime.session("live")
    assert session.token_ids() == plain.token_ids()
    assert session.chunks() == plain.chunks()


def test_a_message_is_acknowledged_when_it_is_on_disk(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    runtime = make()
    live = runtime.live("ops")
    with runtime.model.turns.turn(runtime.model):  # the model is busy: nothing can be read
        message = live.append_tool_result("shell", "".join(LOG)).result(20)
        with SessionStore.open(tmp_path / "root", "ops", readonly=True) as store:
            assert store.messages() == [message]
            assert store.chunks() == []
    live.flush(20)
    with SessionStore.open(tmp_path / "root", "ops", readonly=True) as store:
        read = sum(length for _, length in store.chunks())
        assert store.token_count - SMALL.chunk_size < read <= store.token_count


def test_the_context_is_read_while_the_tool_still_runs(make: Callable[..., AgentRuntime]) -> None:
    runtime = make()
    live = runtime.live("ops")
    with live.stream_tool_result("build") as sink:
        for line in LOG:
            sink.write(line)
        until(lambda: live._inbox.chars == 0)
        session = runtime.open_idle("ops")
        until(lambda: session.token_count > 0 and session.pending_tokens < SMALL.chunk_size)
        assert session.message_count == 0  # the message is not complete
        assert session.memory.length > 0
    assert sink.receipt.result(20).text == "".join(LOG)


def test_writers_wait_when_too_much_is_queued(make: Callable[..., AgentRuntime]) -> None:
    runtime = make(queued_chars=1000, waiting_tokens=64)
    live = runtime.live("ops")
    text = "x" * 600
    with runtime.model.turns.turn(runtime.model):
        given = [live.append("user", text)]
        refused = ""
        while not refused and len(given) < 10:
            try:
                given.append(live.append("user", text, timeout=0.2))
            except QueueFull as error:
                refused = str(error)
        assert "queued_chars" in refused
        with pytest.raises(QueueFull), live.stream("tool", name="sh") as sink:
            sink.write(text, timeout=0.2)

        async def write() -> None:
            await live.aappend("user", "late")

        async def too_long() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(write(), 0.2)

        asyncio.run(too_long())
    last = live.append("user", "after")  # the model is free again: there will be room
    assert last.result(60).text == "after"
    assert texts(live) == [text] * len(given) + ["", "after"]  # nothing that was refused, everything that was taken


def test_messages_of_no_role_or_name_fail_alone(make: Callable[..., AgentRuntime]) -> None:
    live = make().live("ops")
    good, bad, worse, fine = (
        live.append_user("a"),
        live.append("king", "b"),
        live.append_tool_result("no good", "c"),
        live.append_user("d"),
    )
    assert [good.result(20).text, fine.result(20).text] == ["a", "d"]
    for receipt in (bad, worse):
        with pytest.raises(InvalidName):
            receipt.result(20)
    assert texts(live) == ["a", "d"]
    with pytest.raises(ConfigError, match="temperature"):
        live.reply(temperature=-1)
    assert live.reply(max_tokens=2).usage.output_tokens > 0
    with pytest.raises(InvalidName):
        make().live("../escape")


def test_an_answer_can_be_cut_short(make: Callable[..., AgentRuntime]) -> None:
    live = make().live("ops")
    live.append_user("tell me all")
    pieces = live.stream_reply(max_tokens=4000)
    first = next(pieces)
    pieces.close()
    live.append_user("thanks").result(60)
    history = texts(live)
    assert history[0] == "tell me all"
    assert history[1].startswith(first)
    assert history[2] == "thanks"


def test_more_sessions_than_fit_are_closed_and_reopened(make: Callable[..., AgentRuntime]) -> None:
    ceiling = 2 * make().working_size() + make().working_size() // 2
    runtime = make(device_budget=ceiling)
    largest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            largest = max(largest, sum(runtime.open_sizes().values()))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    lives = [runtime.live(f"s{n}") for n in range(12)]
    for turn in range(3):
        receipts = [live.append_tool_result("log", f"{turn} {live.name} " + "".join(LOG[:8])) for live in lives]
        for live, receipt in zip(lives, receipts, strict=True):
            assert live.name in receipt.result(60).text
    for live in lives:
        assert live.reply(max_tokens=2).usage.prefilled_tokens > 0
    done.set()
    watcher.join()
    assert largest <= ceiling
    assert not all(runtime.is_open(live.name) for live in lives)
    assert all(len(texts(live)) == 4 for live in lives)


def test_a_ceiling_that_nothing_fits_under(make: Callable[..., AgentRuntime]) -> None:
    with pytest.raises(ConfigError, match="device_budget"):
        make(device_budget=1000)
    runtime = make(device_budget=int(1.1 * make().working_size()))
    runtime.session("held").append_user("mine")
    with pytest.raises(BudgetExceeded, match="opened directly"):
        runtime.live("other").append_user("x").result(20)
    runtime.release("held")
    assert runtime.live("other").append_user("x").result(20).text == "x"


def test_an_idle_session_is_closed_and_its_message_goes_on(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    runtime = make(idle_s=0.1)
    live = runtime.live("ops")
    live.append_user("hello").result(20)
    until(lambda: not runtime.is_open("ops"))
    SessionStore.open(tmp_path / "root", "ops").close()  # another process could have it now
    with live.stream_tool_result("slow") as sink:
        for part in ("first, half a wo", "rd, and ", "the end"):
            sink.write(part)
            until(lambda: live._inbox.chars == 0)
            until(lambda: not runtime.is_open("ops"))
    assert sink.receipt.result(20).text == "first, half a word, and the end"
    runtime.close()
    other = AgentRuntime(tmp_path / "other", runtime.model, SMALL)
    plain = other.session("ops")
    plain.append_user("hello")
    plain.append_tool_result("slow", "first, half a word, and the end")
    with SessionStore.open(tmp_path / "root", "ops", readonly=True) as store:
        assert list(store.token_ids()) == plain.token_ids()
    other.close()


def test_a_message_that_arrives_slowly_is_on_disk_meanwhile(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    live = make(commit_s=0.1).live("ops")
    with live.stream_tool_result("slow") as sink:
        sink.write("the first part and ")

        def on_disk() -> bool:
            with SessionStore.open(tmp_path / "root", "ops", readonly=True) as store:
                return (store.state or {}).get("arriving", {}).get("text") == "the first part and "

        until(lambda: live._inbox.chars == 0)
        until(on_disk)


def test_a_message_that_trickles_in_is_on_disk_meanwhile(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    """No pause between its pieces is as long as ``commit_s``; each finds another worker."""
    live = make(commit_s=1.0).live("ops")
    on_disk = ""
    with live.stream_tool_result("slow") as sink:
        for number in range(20):
            sink.write(f"part {number} ")
            time.sleep(0.3)
            with SessionStore.open(tmp_path / "root", "ops", readonly=True) as store:
                on_disk = (store.state or {}).get("arriving", {}).get("text", "")
            if on_disk:
                break
    assert on_disk.startswith("part 0 part 1 ")


def test_what_arrived_of_a_message_outlives_its_process(tiny_model: LocalModel, tmp_path: Path) -> None:
    with AgentRuntime(tmp_path / "root", tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        sink = session.stream_tool_result("build")
        sink.write("".join(LOG) + "half a wo")
        session.commit()
        sink.write("rd that is lost")
        session.close()  # as a kill would
    with AgentRuntime(tmp_path / "root", tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        assert [m.text for m in session.messages()] == ["".join(LOG) + "half a wo"]
        session.append_user("and?")
        session.reply(max_tokens=2)
        plain = runtime.session("plain")
        plain.append_tool_result("build", "".join(LOG) + "half a wo")
        plain.append_user("and?")
        plain.reply(max_tokens=2)
        assert session.token_ids() == plain.token_ids()


def test_a_session_that_fails_leaves_the_others_alone(
    make: Callable[..., AgentRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    sick, well = runtime.live("sick"), runtime.live("well")
    sick.append_user("before").result(20)
    broken = runtime.open_idle("sick").memory
    forward = LocalModel.forward

    def fail(self: LocalModel, ids: Any, memory: Any, **options: Any) -> Any:
        if memory is broken:
            broken.length += 1  # in the middle of it
            raise RuntimeError("the device is gone")
        return forward(self, ids, memory, **options)

    monkeypatch.setattr(LocalModel, "forward", fail)
    asked = threading.Thread(target=lambda: well.reply(max_tokens=30))
    well.append_user("hello")
    asked.start()
    with pytest.raises(RuntimeError, match="the device is gone"):
        sick.reply(max_tokens=5)
    asked.join()
    assert [m.role for m in well.messages()] == ["user", "assistant"]
    assert sick.append_user("again").result(20).text == "again"  # opened again, as last committed
    assert sick.reply(max_tokens=2).text is not None
    assert [m.text for m in sick.messages()][:2] == ["before", "again"]


def test_a_full_disk_fails_what_was_not_written(
    make: Callable[..., AgentRuntime], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = make()
    live = runtime.live("ops")
    live.append_user("kept").result(20)

    def full(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SessionStore, "commit", full)
        with pytest.raises(InfLLMError, match="No space left"):
            live.append_user("lost").result(20)
    live.append_user("then").result(20)
    assert texts(live) == ["kept", "then"]


def test_closing_takes_in_what_is_queued(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    runtime = make(workers=1)
    lives = [runtime.live(f"s{n}") for n in range(4)]
    sinks = [live.stream_tool_result("tail") for live in lives]
    with runtime.model.turns.turn(runtime.model):
        for sink in sinks:
            sink.write("".join(LOG))
        asked: list[BaseException] = []

        def ask() -> None:
            try:
                lives[0].reply()
            except InfLLMError as error:
                asked.append(error)

        question = threading.Thread(target=ask)
        question.start()
        until(lambda: lives[0].queued == 2)
        runtime.stop()
        with pytest.raises(Stopped):
            lives[1].append_user("too late")
    runtime.close()
    question.join(20)
    assert isinstance(asked[0], Stopped)
    for live, sink in zip(lives, sinks, strict=True):
        assert texts(live) == ["".join(LOG)]
        with pytest.raises(Stopped):
            sink.write("more")


PROGRAM = """
import sys, threading
from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.config import RuntimeConfig
from infllm_agent.platform.signals import exit_on_signals

def chat(live, log):
    number = 0
    while True:
        if number % 3 == 2:
            with live.stream_tool_result("shell") as sink:
                for part in range(20):
                    sink.write(f"{number} part {part} of the output\\n")
            receipt = sink.receipt
        elif number % 5 == 3:
            live.reply(max_tokens=10)
            number += 1
            continue
        else:
            receipt = live.append_observation(f"{number} " + "something was seen " * 20)
        message = receipt.result()
        log.write(f"{live.name} {message.index} {message.text!r}\\n")  # one write: what others acknowledge
        log.flush()
        number += 1

if __name__ == "__main__":
    root, model, path = sys.argv[1:]
    memory = MemoryConfig.model_validate_json(SETTINGS)
    config = RuntimeConfig(workers=4)
    with exit_on_signals(), AgentRuntime.open(root, model, memory, config, dtype="float32") as runtime:
        threads = [
            threading.Thread(target=chat, args=(runtime.live(f"s{n}"), open(f"{path}/s{n}.log", "w")), daemon=True)
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
"""


def test_sigterm_in_the_middle_of_everything(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Eight sessions, half of them without a worker, streams and answers open: all that was acknowledged is there."""
    program = PROGRAM.replace("SETTINGS", repr(SMALL.model_dump_json()))
    logs = tmp_path / "logs"
    logs.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "root"), str(tiny_model_folder), str(logs)],
        stderr=subprocess.PIPE,
        text=True,
    )
    acknowledged = [logs / f"s{n}.log" for n in range(8)]
    until(
        lambda: process.poll() is not None or all(p.exists() and p.read_text().count("\n") > 3 for p in acknowledged),
        120,
    )
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors.replace("Exception in thread", "") or "Stopped" in errors
    for path in acknowledged:
        with SessionStore.open(tmp_path / "root", path.stem) as store:
            store.verify()
            messages = {m.index: m.text for m in store.messages()}
        for line in path.read_text().splitlines():
            _, index, text = line.split(" ", 2)
            assert repr(messages[int(index)]) == text


def test_deleting_and_releasing_wait_for_the_worker(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    runtime = make()
    live = runtime.live("ops")
    live.append_tool_result("log", "".join(LOG) * 5)
    runtime.release("ops")
    assert not runtime.is_open("ops")
    assert texts(live) == ["".join(LOG) * 5]
    live.append_user("again").result(20)
    runtime.delete("ops")
    assert live.append_user("new").result(20).index == 0


def test_a_session_that_is_open_elsewhere(make: Callable[..., AgentRuntime], tmp_path: Path) -> None:
    first, second = make(), make()
    first.session("ops").append_user("mine")
    receipt = second.live("ops").append_user("theirs")
    with pytest.raises(SessionLocked):
        receipt.result(20)
    first.release("ops")
    second.live("ops").append_user("now").result(20)
    assert texts(second.live("ops")) == ["mine", "now"]


def test_the_asyncio_face(make: Callable[..., AgentRuntime]) -> None:
    runtime = make()

    async def talk(name: str) -> tuple[str, str]:
        live = runtime.live(name)
        await (await live.aappend("system", f"You are {name}."))
        async with live.stream_observation("sensor") as sink:
            for line in LOG:
                await sink.awrite(line)
        await live.aflush()
        streamed = [piece async for piece in live.astream_reply(max_tokens=8)]
        reply = await live.areply(max_tokens=3)
        return "".join(streamed), reply.text

    async def main() -> list[tuple[str, str]]:
        async with runtime:
            return await asyncio.gather(*(talk(f"s{n}") for n in range(6)))

    for n, (first, second) in enumerate(asyncio.run(main())):
        assert texts(runtime.live(f"s{n}")) == [f"You are s{n}.", "".join(LOG), first, second]


def test_a_cancelled_task_ends_its_answer(make: Callable[..., AgentRuntime]) -> None:
    live = make().live("ops")

    async def main() -> None:
        await live.aappend("user", "tell me all")
        task = asyncio.create_task(live.areply(max_tokens=100_000))
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await (await live.aappend("user", "thanks"))

    asyncio.run(main())
    assert texts(live)[0::2] == ["tell me all", "thanks"]
