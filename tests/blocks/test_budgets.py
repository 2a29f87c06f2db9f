"""The ceilings for device, host memory and disk; the cache in host memory against a plain dict; eight-bit storage."""

from __future__ import annotations

import errno
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.blocks.budgets import Tiers
from infllm_agent.blocks.host_cache import Blocks, HostCache, SlotTable
from infllm_agent.config import RuntimeConfig
from infllm_agent.errors import BudgetExceeded, ConfigError, CorruptSession, StorageError
from infllm_agent.kernels.int8 import dequantize, quantize, rounded
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.files import folder_bytes
from infllm_agent.storage.session_store import SessionStore

SMALL = MemoryConfig(n_init=4, n_local=16, block_size=4, topk=4, candidates=8, chunk_size=64, max_cached_block=8)
PLANES, BYTES = 4, 8
LINE = "error 404 at 12:30, retry in 5 s, then the disk is full and node 7 is asked instead; "


def content(table: int, plane: int, block: int) -> np.ndarray:
    return np.array([table, plane, block % 256, 1, 2, 3, 4, 5], dtype=np.uint8)


class HostCacheAgainstDict(RuleBasedStateMachine):
    """What is asked for is what was stored, whoever asks in between; what was asked for last is still there; tables
    that are gone leave nothing behind."""

    @initialize(slots=st.integers(2, 24))
    def make(self, slots: int) -> None:
        self.cache = HostCache(slots, BYTES)
        self.tables = {number: SlotTable(PLANES) for number in range(3)}
        self.reads: list[int] = []

    @rule(number=st.integers(0, 2), plane=st.integers(0, PLANES - 1), data=st.data())
    def gather(self, number: int, plane: int, data: st.DataObject) -> None:
        blocks = np.array(sorted(data.draw(st.sets(st.integers(0, 40), max_size=30))), dtype=np.int64)
        last = self.gathered(number, plane, blocks)
        again = last[-(self.cache.slots // 2) :]
        out = torch.empty((len(again), BYTES), dtype=torch.uint8)
        assert self.cache.gather(self.tables[number], plane, again, out, _no) == 0

    def gathered(self, number: int, plane: int, blocks: Blocks) -> Blocks:
        read: list[int] = []

        def fill(wanted: Blocks, into: torch.Tensor) -> None:
            read.extend(wanted.tolist())
            for row, block in zip(into.numpy(), wanted, strict=True):
                row[:] = content(number, plane, int(block))

        out = torch.empty((len(blocks), BYTES), dtype=torch.uint8)
        assert self.cache.gather(self.tables[number], plane, blocks, out, fill) == len(read)
        for row, block in zip(out.numpy(), blocks, strict=True):
            assert (row == content(number, plane, int(block))).all()
        # Parts of half the slots come one after the other: of the last of them all is there.
        rest = len(blocks) % (self.cache.slots // 2) or self.cache.slots // 2
        return blocks[-rest:]

    @rule(number=st.integers(0, 2), plane=st.integers(0, PLANES - 1))
    def failing_read(self, number: int, plane: int) -> None:
        with pytest.raises(CorruptSession):
            self.cache.gather(
                self.tables[number], plane, np.array([99]), torch.empty((1, BYTES), dtype=torch.uint8), _damaged
            )

    @rule(number=st.integers(0, 2))
    def session_ends(self, number: int) -> None:
        self.tables[number] = SlotTable(PLANES)
        gc.collect(0)

    @rule(slots=st.integers(2, 24))
    def resize(self, slots: int) -> None:
        self.cache.resize(slots)

    @invariant()
    def holds(self) -> None:
        self.cache.check_integrity()
        assert len(self.cache) <= self.cache.slots
        assert self.cache.bytes() <= self.cache.slots * BYTES


def _no(wanted: Blocks, into: torch.Tensor) -> None:
    raise AssertionError(f"{wanted} should be there")


def _damaged(wanted: Blocks, into: torch.Tensor) -> None:
    raise CorruptSession("damaged")


HostCacheAgainstDict.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestHostCache = HostCacheAgainstDict.TestCase


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LocalModel:
    return LocalModel.load(str(tiny_model_folder), dtype="float32", device="cpu")


def least(model: LocalModel, config: MemoryConfig = SMALL) -> int:
    return model.new_memory(config).store.least_host_bytes()


def logits(session: Session) -> torch.Tensor:
    """After two more tokens, on a fork of the memory."""
    ids = [*session.token_ids()[session.memory.length :], 5, 6]
    return session.model.forward(ids, session.memory.fork())


# -- host memory -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems promise is theirs")
def test_what_a_cache_has_not_taken_is_not_promised_to_it() -> None:
    """A process whose empty caches exceed the machine's memory can still be forked, as a tool's process is."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cache = HostCache(2 * memory // (1 << 20), 1 << 20)
    assert cache.bytes() == 0
    if (child := os.fork()) == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("stored", ["model", "int8"])
def test_a_long_session_stays_under_a_small_budget(model: LocalModel, tmp_path: Path, stored: str) -> None:
    """Far more blocks than the budget holds: the same as without one, to the bit, at every step under the ceiling."""
    config = SMALL.changed(block_dtype=stored)
    budget = least(model, config)
    with (
        AgentRuntime(tmp_path / "small", model, config, RuntimeConfig(host_budget=budget)) as small,
        AgentRuntime(tmp_path / "large", model, config) as large,
    ):
        sessions = [runtime.session("ops") for runtime in (small, large)]
        one_room = sessions[0].memory.store.least_host_bytes() // 16
        for turn in range(6):
            for session in sessions:
                session.append_tool_result("shell", f"{turn} " + LINE * 20)  # read at once, without a commit
                assert small.tiers.host_bytes() <= budget + one_room
        assert sessions[0].memory.store.stored > sessions[1].memory.store.stored == 0
        assert sessions[0].memory.store.count * sessions[0].memory.store.shape.stride > 2 * budget
        assert torch.equal(logits(sessions[0]), logits(sessions[1]))
        assert sessions[0].memory.store.counters.disk > 0
        sessions[0].close()  # what was written, and not committed, does not count
        assert small.session("ops").token_count == 0
        small.session("ops").append_user("again")
        assert list(small.session("ops").memory.store.files.damages()) == []


def test_a_full_disk_while_reading_stops_and_loses_nothing(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AgentRuntime(tmp_path, model, SMALL, RuntimeConfig(host_budget=least(model))) as runtime:
        session, twin = runtime.session("ops"), model.new_memory(SMALL)

        def no_space(*arguments: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", no_space)
            with pytest.raises(StorageError, match="No space left"):
                session.append_tool_result("shell", LINE * 120)
        assert session.pending_tokens > 64
        session.ingest()
        assert session.memory.store.stored > 0
        session.commit()  # which makes room for a fork
        ids = session.token_ids()
        for start, length in session.chunks():
            model.forward(ids[start : start + length], twin)
        assert torch.equal(logits(session), model.forward([*ids[twin.length :], 5, 6], twin))


def test_several_sessions_share_the_budget(model: LocalModel, tmp_path: Path) -> None:
    budget = 2 * least(model)
    with AgentRuntime(tmp_path, model, SMALL, RuntimeConfig(host_budget=budget)) as runtime:
        for turn in range(4):
            for name in "abcd":
                runtime.session(name).append_tool_result("shell", f"{turn} {name} " + LINE * 20)
                assert runtime.tiers.host_bytes() <= budget + 4 * budget // 16
        whole = {name: logits(runtime.session(name)) for name in "abcd"}
        for name in "abcd":
            runtime.release(name)
        assert all(torch.equal(logits(runtime.session(name)), whole[name]) for name in "abcd")


def test_a_memory_without_files_cannot_exceed_it(model: LocalModel) -> None:
    memory = model.new_memory(SMALL, Tiers(host_budget=least(model)))
    with suppress(BudgetExceeded):
        for _ in range(1000):
            model.forward([5] * 64, memory)
    length = memory.length
    with pytest.raises(BudgetExceeded, match="host_budget"):
        model.forward([5] * 64, memory)
    assert memory.length == length, "nothing is changed"


def test_budgets_that_nothing_fits_under(model: LocalModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="host_budget 1,000 is less than"):
        AgentRuntime(tmp_path, model, SMALL, RuntimeConfig(host_budget=1000))
    with pytest.raises(ConfigError, match="host_budget"):
        RuntimeConfig(host_budget=-1)


# -- the device --------------------------------------------------------------------------------------------------------


def test_sessions_do_not_exceed_the_device(model: LocalModel, tmp_path: Path) -> None:
    one = model.new_memory(SMALL).bytes()
    with AgentRuntime(tmp_path, model, SMALL, RuntimeConfig(device_budget=2 * one + one // 2)) as runtime:
        runtime.live("idle").append_user("hello").result(30)
        runtime.session("a").append_user("one")
        runtime.session("b").append_user("two")  # closes the idle one
        assert not runtime.is_open("idle")
        with pytest.raises(BudgetExceeded, match="device_budget"):
            runtime.session("c")
        assert runtime.tiers.device_bytes() <= 2 * one + one // 2
        runtime.release("a")
        runtime.session("c").append_user("three")
        assert [message.text for message in runtime.session("b").messages()] == ["two"]


def test_an_index_that_outgrows_the_device_stops_in_time(model: LocalModel, tmp_path: Path) -> None:
    config = SMALL.changed(block_size=1, topk=8, candidates=0, max_cached_block=8)
    one = model.new_memory(config).bytes()
    with AgentRuntime(tmp_path, model, config, RuntimeConfig(device_budget=one + 1000)) as runtime:
        session = runtime.session("ops")
        with suppress(BudgetExceeded):
            for _ in range(100):
                session.append_tool_result("shell", LINE * 10)
        with pytest.raises(BudgetExceeded, match="device_budget"):
            session.ingest()
        told, length = session.message_count, session.memory.length
        assert 2048 - 64 < session.memory.store.count <= 2048
        session.commit()
        runtime.close()
    with AgentRuntime(tmp_path, model, config) as runtime:  # nothing was lost; it goes on where there is room
        session = runtime.session("ops")
        assert (session.message_count, session.memory.length) == (told, length)
        session.ingest()
        assert session.memory.store.count > 2048


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_commit_over_the_disk_budget_fails_and_can_be_done_later(model: LocalModel, tmp_path: Path) -> None:
    with AgentRuntime(tmp_path, model, SMALL) as runtime:
        for name in ("old", "ops"):
            runtime.session(name).append_tool_result("shell", LINE * 100)
    full = folder_bytes(tmp_path) + 100_000
    with AgentRuntime(tmp_path, model, SMALL, RuntimeConfig(disk_budget=full)) as runtime:
        session = runtime.session("ops")
        generation, tokens = session.store.generation, session.token_count
        session.append_tool_result("shell", LINE * 50)
        with pytest.raises(BudgetExceeded, match="disk_budget"):
            session.commit()
        with pytest.raises(BudgetExceeded, match="disk_budget"):
            runtime.fork("ops", "copy")
        with SessionStore.open(tmp_path, "ops", readonly=True) as stored:
            assert (stored.generation, stored.token_count) == (generation, tokens)
        assert folder_bytes(tmp_path) <= full
        runtime.delete("old")
        session.commit()
        expected = logits(session)
        assert folder_bytes(tmp_path) <= full
    with AgentRuntime(tmp_path, model, SMALL) as runtime:
        assert torch.equal(logits(runtime.session("ops")), expected)


def test_the_folder_is_measured_without_double_counting(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "in" / "link").hardlink_to(tmp_path / "in" / "file")
    assert 100_000 <= folder_bytes(tmp_path) < 150_000
    assert folder_bytes(tmp_path / "nothing") == 0


# -- eight bits --------------------------------------------------------------------------------------------------------


def test_an_int8_session_resumes_and_forks_to_the_bit(model: LocalModel, tmp_path: Path) -> None:
    config = SMALL.changed(block_dtype="int8")
    with AgentRuntime(tmp_path, model, config) as runtime:
        session = runtime.session("ops")
        for turn in range(4):
            session.append_tool_result("shell", f"{turn} " + LINE * 20)
        session.commit()
        session.append_tool_result("shell", "and " + LINE * 20)
        expected = logits(session)
        session.commit()
        assert torch.equal(logits(session), expected)
        fork = session.fork("earlier", 3)  # what was rounded cannot come back to the window: read again
        assert fork.read_again > 0
        twin = model.new_memory(config)
        ids = session.token_ids()
        for start, length in fork.chunks():
            model.forward(ids[start : start + length], twin)
        assert torch.equal(logits(fork), model.forward([*ids[twin.length : fork.token_count], 5, 6], twin))
        fork.close()
    with AgentRuntime(tmp_path, model, config) as runtime:
        assert torch.equal(logits(runtime.session("ops")), expected)
        exact = model.new_memory(SMALL)
        ids = runtime.session("ops").token_ids()
        for start, length in runtime.session("ops").chunks():
            model.forward(ids[start : start + length], exact)
        plain = model.forward([*ids[exact.length :], 5, 6], exact)
        assert not torch.equal(plain, expected)
        assert (plain.softmax(0) - expected.softmax(0)).abs().sum() < 0.02


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8))
def test_rounding_is_to_the_nearest_step(values: list[float]) -> None:
    x = torch.tensor(values).view(1, 2, 2, 2)
    assert torch.equal(dequantize(*quantize(x)), rounded(x))
    steps = x.abs().amax(dim=(2, 3), keepdim=True) / 127
    assert bool(((dequantize(*quantize(x)) - x).abs() <= 0.5001 * steps + 1e-38).all())
