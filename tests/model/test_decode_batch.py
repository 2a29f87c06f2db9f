"""Sessions that decode together: the same tokens as alone, in fewer forwards, and each with its own faults."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from infllm_agent import AgentRuntime
from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.attention_hook import Memory
from infllm_agent.model.decode_batch import DecodeBatch
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.probe import relative_error
from infllm_agent.model.turns import Urgency

SIZES = {"n_init": 4, "n_local": 10, "block_size": 8, "topk": 3, "chunk_size": 16, "max_cached_block": 4}
SMALL = MemoryConfig(**SIZES, candidates=6)


@pytest.fixture(autouse=True)
def _(one_thread: None) -> None:
    pass


def past(model: LocalModel, length: int) -> ContextMemory:
    memory = model.new_memory(SMALL)
    ids = [(length * i) % 90 + 3 for i in range(length)]
    for start in range(0, length, 16):
        model.forward(ids[start : start + 16], memory)
    return memory


def decode(model: LocalModel, memory: ContextMemory, count: int, batch: int) -> torch.Tensor:
    """The logits (count, vocab) of the likeliest tokens."""
    token, rows = 5, []
    for _ in range(count):
        rows.append(model.forward([token], memory, urgency=Urgency.NEXT_TOKEN, batch=batch))
        token = int(rows[-1].argmax())
    return torch.stack(rows)


def counted(model: LocalModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of each forward, as they come."""
    sizes: list[int] = []
    forward = LocalModel._logits

    def counting(self: LocalModel, ids: torch.Tensor, memories: Sequence[Memory], **options: Any) -> torch.Tensor:
        sizes.append(len(ids))
        return forward(self, ids, memories, **options)

    monkeypatch.setattr(LocalModel, "_logits", counting)
    return sizes


LENGTHS = [1, 9, 16, 60, 150, 233]  # all in the window, sinks only, a few blocks, blocks that are looked up


@pytest.mark.parametrize("name", ["llama", "llama-yarn", "qwen3", "gemma2", "gemma3", "smollm3", "phi3"])
def test_together_is_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths, each for a different number of tokens, so that sessions leave while others go on."""
    model = tiny(name)
    expected = [decode(model, past(model, length), 5 + 4 * i, 1) for i, length in enumerate(LENGTHS)]
    memories = [past(model, length) for length in LENGTHS]
    sizes = counted(model, monkeypatch)
    with ThreadPoolExecutor(len(memories)) as pool:
        got = list(pool.map(lambda i: decode(model, memories[i], 5 + 4 * i, 4), range(len(memories))))
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) < 0.01
    assert sum(sizes) == sum(map(len, expected)) == sum(memory.length for memory in memories) - sum(LENGTHS)
    assert max(sizes) in (2, 3, 4)


def test_who_comes_during_a_step_goes_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    memories = [past(model, length) for length in LENGTHS]
    sizes = counted(model, monkeypatch)
    with ThreadPoolExecutor(len(memories)) as pool:
        with model.turns.turn(model):
            doing = [pool.submit(decode, model, memory, 1, 4) for memory in memories]
            wait_until(lambda: len(model._batch._waiting) == len(memories))
        for one in doing:
            one.result()
    assert sizes == [4, 2]


def test_a_reading_session_and_those_that_decode_share_the_model() -> None:
    """Chunks are read between the steps, and both end as they do alone."""
    model = tiny("llama")
    ids = [i % 90 + 3 for i in range(400)]
    alone = past(model, 150)
    expected = torch.stack([model.forward(ids[start : start + 16], alone) for start in range(0, 400, 16)])
    said = [decode(model, past(model, length), 30, 1) for length in (60, 233)]
    memory, memories = past(model, 150), [past(model, length) for length in (60, 233)]

    def read() -> torch.Tensor:
        return torch.stack([model.forward(ids[start : start + 16], memory) for start in range(0, 400, 16)])

    with ThreadPoolExecutor(3) as pool:
        reading = pool.submit(read)
        got = list(pool.map(lambda memory: decode(model, memory, 30, 2), memories))
        assert torch.equal(reading.result(), expected)
    for one, other in zip(got, said, strict=True):
        assert relative_error(one, other) < 0.01


@pytest.mark.parametrize("where", ["attend", "reserve"])
def test_a_fault_of_one_is_its_own(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    memories = [past(model, length) for length in (60, 150, 233)]
    expected = [decode(model, past(model, length), 8, 1) for length in (60, 233)]

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("the disk is gone")

    def broken() -> torch.Tensor:
        decode(model, memories[1], 3, 3)
        monkeypatch.setattr(memories[1], where, fail)
        return decode(model, memories[1], 3, 3)

    with ThreadPoolExecutor(3) as pool:
        failing = pool.submit(broken)
        good = [pool.submit(decode, model, memories[i], 8, 3) for i in (0, 2)]
        for one, other in zip(good, expected, strict=True):
            assert relative_error(one.result(), other) < 0.01
        with pytest.raises(OSError, match="the disk is gone"):
            failing.result()
    assert memories[1].length == 153


class Interrupt(BaseException):
    pass


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises Interrupt in the main thread, where the test runs."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_main() -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


class Steps:
    """A model whose logits are the token itself; the first step can be held up, or fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.computed: list[list[int]] = []
        self.began, self.go = threading.Event(), threading.Event()
        self.error = error
        self.turn = threading.Lock()
        self.batch = DecodeBatch(lambda: self.turn, self.compute)  # type: ignore[arg-type,return-value]

    def compute(self, tokens: Sequence[int], memories: Sequence[Memory]) -> list[torch.Tensor | Exception]:
        self.began.set()
        assert self.go.wait(10)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.computed.append(list(tokens))
        return [torch.tensor(float(token)) for token in tokens]

    def take(self, token: int) -> float:
        return float(self.batch.step(token, object(), 3))  # type: ignore[arg-type]

    def until_waiting(self, count: int) -> None:
        wait_until(lambda: len(self.batch._waiting) == count)


def test_when_the_leader_is_interrupted_the_others_go_on() -> None:
    steps = Steps(Interrupt())
    with ThreadPoolExecutor(3) as pool:
        with steps.turn:
            entered = []
            for token in (1, 2, 3):
                entered.append(pool.submit(steps.take, token))
                steps.until_waiting(token)
        steps.go.set()
        with pytest.raises(Interrupt):
            entered[0].result(10)
        assert [one.result(10) for one in entered[1:]] == [2.0, 3.0]
    assert sorted(token for step in steps.computed for token in step) == [2, 3]


def test_who_is_interrupted_in_the_queue_is_not_computed(interruptible: None) -> None:
    steps = Steps()
    steps.go.set()
    with ThreadPoolExecutor(2) as pool, ExitStack() as held:
        held.enter_context(steps.turn)
        first = pool.submit(steps.take, 1)
        steps.until_waiting(1)
        pool.submit(lambda: (steps.until_waiting(2), interrupt_main()))
        with pytest.raises(Interrupt):
            steps.take(2)
        held.close()
        assert first.result(10) == 1.0
    assert steps.computed == [[1]]
    assert steps.take(3) == 3.0


def test_who_is_interrupted_during_a_step_leaves_when_it_is_over(interruptible: None) -> None:
    """Its memory is being computed with: only when that is over may its owner look at it again."""
    steps = Steps()

    def interrupt() -> None:
        assert steps.began.wait(10)
        interrupt_main()
        threading.Event().wait(0.1)
        steps.go.set()

    with ThreadPoolExecutor(2) as pool, ExitStack() as held:
        held.enter_context(steps.turn)
        first = pool.submit(steps.take, 1)
        steps.until_waiting(1)
        pool.submit(lambda: (steps.until_waiting(2), held.close(), interrupt()))
        with pytest.raises(Interrupt):
            steps.take(2)
        assert steps.computed == [[1, 2]]
        assert first.result(10) == 1.0


def wait_until(done: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if done():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came to that")


def test_answers_of_a_runtimes_sessions(
    tmp_path: Path, tiny_model: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["ops", "web", "db", "mail"]

    def answers(root: Path, batch: int) -> list[str]:
        config = RuntimeConfig(batch=batch)
        with AgentRuntime(root, tiny_model, config=config) as runtime, ThreadPoolExecutor(4) as pool:
            for number, name in enumerate(names):
                runtime.session(name).append_user("retry in 5 s, error 404 " * (20 * number + 1))
            replies = pool.map(lambda name: runtime.session(name).reply(max_tokens=24), names)
            return [reply.text for reply in replies]

    alone = answers(tmp_path / "alone", 1)
    sizes = counted(tiny_model, monkeypatch)
    assert answers(tmp_path / "together", 4) == alone
    assert max(sizes) > 1
    with AgentRuntime(tmp_path / "together", tiny_model) as runtime:  # and under other settings they go on
        assert runtime.session("web").reply(max_tokens=3).usage.output_tokens
