"""What an answer attended to: recorded exactly, kept with the session, and carried by its forks."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny

from infllm_agent.config import MemoryConfig, RuntimeConfig
from infllm_agent.errors import ConfigError, CorruptSession
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.trace_recorder import FIRST_TOKENS, THEN_EVERY, TraceRecorder
from infllm_agent.messages import Message
from infllm_agent.model.local_model import LocalModel
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session
from infllm_agent.storage.fork import fork_stored
from infllm_agent.storage.session_store import SessionStore
from infllm_agent.trace import KEPT_BLOCKS, KEPT_LAYER_BLOCKS, SHARES, LayerTrace, Trace

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = MemoryConfig(n_init=4, n_local=24, block_size=8, topk=3, chunk_size=16, max_cached_block=6, candidates=0)
ROUNDED = 2 * float(np.finfo(SHARES).eps)


def same(one: Trace, other: Trace) -> bool:
    return one.pack() == other.pack()


def span(index: int, start: int, end: int) -> Message:
    return Message(index, "user", None, None, "", 0.0, start, end)


def dense(trace: Trace, rows: np.ndarray, length: int) -> np.ndarray:
    """What a trace keeps by block, by token."""
    tokens = np.zeros(length + trace.block_size)
    tokens[trace.tokens] = rows.ravel()
    return tokens[:length]


# -- what is recorded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["on", "sampled"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3", "granite"])
def test_is_full_attention_while_everything_fits(name: str, mode: Literal["on", "sampled"]) -> None:
    """The oracle: transformers' own eager attention over the whole text, at the queries that are traced."""
    model = tiny(name)
    ids = torch.randint(3, 97, (70,), generator=torch.Generator().manual_seed(2)).tolist()
    with torch.no_grad(), model.detached("eager") as plain:
        attentions = plain(input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True).attentions
    full = torch.stack([layer[0] for layer in attentions]).double().numpy()  # (layers, heads, n, n)

    memory = model.new_memory(SMALL.changed(n_local=100))
    recorder = TraceRecorder(list(memory.layers), block_size=8, mode=mode)
    model.forward(ids[:16], memory)
    memory.recorder = recorder
    queries, done = [], 16
    for size in (16, 13, 1, 1, 7, 1, 15):
        model.forward(ids[done : done + size], memory)
        done += size
        queries.append(done - 1)
    trace = recorder.trace(1, 0, 60, n_sinks=memory.n_sinks)

    seen = [(layer, q) for n, q in enumerate(queries) for layer in range(3) if mode == "on" or (layer - n) % 2 == 0]
    expected = np.mean([full[layer, :, q].mean(axis=0) for layer, q in seen], axis=0)
    focus = np.max([full[layer, :, q].max(axis=0) for layer, q in seen], axis=0)
    assert trace.queries == len(queries)
    assert np.allclose(dense(trace, trace.attention, 70), expected, rtol=ROUNDED, atol=1e-5)
    assert np.allclose(dense(trace, trace.focus, 70), focus, rtol=ROUNDED, atol=1e-5)
    assert (trace.sinks, trace.looked_up, trace.window) == pytest.approx((0, 0, 1))
    assert trace.own == pytest.approx(expected[60:].sum(), abs=1e-4)

    messages = [span(0, 0, 20), span(1, 20, 21), span(2, 21, 60)]
    found = {one.message: one for one in trace.by_message(messages)}
    before = expected[:60].sum()
    for message in messages:
        part = slice(message.start, message.end)
        assert found[message.index].share == pytest.approx(expected[part].sum() / before, rel=0.01)
        assert found[message.index].focus == pytest.approx(focus[part].max(), rel=0.01)


@pytest.mark.parametrize("positions", ["contiguous", "one_angle"])
def test_shares_of_sinks_blocks_and_window_are_those_of_the_softmax(positions: str) -> None:
    """Past the window, the oracle is what attention gives: its output is the shares' sum of values."""
    model = tiny("llama")
    ids = torch.randint(3, 97, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    memory = model.new_memory(SMALL.changed(positions=positions))
    for start in range(0, 192, 16):
        model.forward(ids[start : start + 16], memory)
    shown: dict[int, tuple[list[int], int, torch.Tensor]] = {}
    outputs: dict[int, torch.Tensor] = {}

    class Shown(TraceRecorder):
        def record(self, layer, n_sinks, blocks, first_token, logits):
            shown[layer] = list(blocks), first_token, torch.cat(list(logits), -1).softmax(-1)
            super().record(layer, n_sinks, blocks, first_token, logits)

    attend = ContextMemory.attend

    def kept(self, layer, q, k, v, **options):
        outputs[layer] = attend(self, layer, q, k, v, **options)
        return outputs[layer]

    recorder = Shown(list(memory.layers), block_size=8, mode="on")
    memory.recorder = recorder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContextMemory, "attend", kept)
        model.forward(ids[192:193], memory)
    trace = recorder.trace(1, 0, 193, n_sinks=memory.n_sinks)

    for number, layer in memory.layers.items():
        blocks, first_token, shares = shown[layer.index]
        window = layer.window
        values = torch.cat([layer.far.v[:, : layer.far.n], window.v[:, window.start : window.stop]], dim=1)
        if values.shape[1] > shares.shape[1]:  # what has left the window since
            raise AssertionError("the step has sealed a block; choose another length")
        out = torch.einsum("hgm,hmd->hgd", shares.view(2, 2, -1), values.float()).flatten(0, 1)
        assert torch.allclose(out, outputs[number][:, 0], atol=1e-5)
        (kept_layer,) = [each for each in trace.layers if each.layer == number]
        far = shares.mean(0)[4 : layer.far.n].view(-1, 8).sum(1)
        expected = sorted(zip(far.tolist(), blocks, strict=True), reverse=True)
        assert kept_layer.blocks.tolist() == [block for _, block in expected]
        assert kept_layer.attention == pytest.approx([share for share, _ in expected], rel=0.01, abs=1e-5)
        assert kept_layer.sinks == pytest.approx(float(shares.mean(0)[:4].sum()), abs=1e-5)
        assert kept_layer.looked_up == pytest.approx(float(far.sum()), abs=1e-5)
        assert kept_layer.sinks + kept_layer.looked_up + kept_layer.window == pytest.approx(1)
        assert first_token == memory.first_window_token
    assert trace.sinks == pytest.approx(np.mean([layer.sinks for layer in trace.layers]))
    assert trace.sink_tokens.sum() == pytest.approx(trace.sinks, rel=0.01)
    assert trace.attention.sum() == pytest.approx(trace.looked_up + trace.window, rel=0.01)


def test_which_tokens_are_traced() -> None:
    sampled = TraceRecorder([0], block_size=8, mode="sampled")
    traced = [token for token in range(100) if sampled.traces(token)]
    assert traced == [*range(FIRST_TOKENS), *range(FIRST_TOKENS, 100, THEN_EVERY)]
    assert all(TraceRecorder([0], block_size=8, mode="on").traces(token) for token in range(100))
    assert not any(TraceRecorder([0], block_size=8, mode="off").traces(token) for token in range(100))


def test_a_planted_fact_comes_first() -> None:
    """A head that finds one token stands out, however many messages get more attention in sum."""
    recorder = TraceRecorder([0, 1], block_size=4, mode="on")
    blocks = [0, 2, 7]
    for layer in (0, 1):
        logits = torch.zeros(4, 2 + 12 + 6)  # 2 sinks, 3 blocks, 6 tokens of the window from number 40 on
        logits[:, 14:] = 2.0
        if layer == 1:
            logits[3, 2 + 4 + 1] = 6.0  # one head looks at the second token of block 2: token 2 + 8 + 1
        recorder.record(layer, 2, blocks, 40, [logits[:, :14], logits[:, 14:]])
    trace = recorder.trace(5, 4, 46, n_sinks=2)
    messages = [span(0, 0, 11), span(1, 11, 12), span(2, 12, 40), span(3, 40, 46)]
    first, *others = trace.by_message(messages)
    assert first.message == 1
    assert first.focus == pytest.approx(torch.softmax(logits[3], 0)[7].item(), rel=0.01)
    assert max(others, key=lambda one: one.share).message == 3
    assert sum(one.share for one in (first, *others)) == pytest.approx(1)
    assert trace.by_message(messages, 1) == [first]
    assert trace.by_message([]) == []
    assert [one.message for one in trace.by_message([span(0, 0, 2)])] == []  # sinks are left aside


# -- how it is kept ------------------------------------------------------------------------------------------------

shares = st.floats(0, 1, width=16)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    n_sinks, size = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    count = draw(st.integers(0, 6))

    def array(*shape: int) -> np.ndarray:
        n = int(np.prod(shape))
        return np.array(draw(st.lists(shares, min_size=n, max_size=n)), np.float64).reshape(shape)

    def ids(n: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=n, max_size=n)), np.int64)

    layers = [
        LayerTrace(number, draw(shares), draw(shares), draw(shares), ids(n), array(n))
        for number, n in enumerate(draw(st.lists(st.integers(0, 3), max_size=3)))
    ]
    return Trace(
        answer=draw(st.integers(0, 2**40)),
        question=draw(st.none() | st.integers(0, 2**40)),
        queries=draw(st.integers(0, 9)),
        n_sinks=n_sinks,
        block_size=size,
        sinks=draw(st.floats(0, 1)),
        looked_up=draw(shares),
        window=draw(shares),
        own=draw(shares),
        hits=draw(st.integers(0, 9)),
        misses=draw(st.integers(0, 9)),
        sink_tokens=array(n_sinks),
        blocks=ids(count),
        attention=array(count, size),
        focus=array(count, size),
        layers=tuple(layers),
    )


@settings(deadline=None, max_examples=60)
@given(traces())
def test_packing_keeps_everything(trace: Trace) -> None:
    again = Trace.unpack(*trace.pack())
    assert same(again, trace)
    for name, value in vars(trace).items():
        if name != "layers":
            assert np.array_equal(getattr(again, name), value), name
    for one, other in zip(again.layers, trace.layers, strict=True):
        assert (one.layer, one.sinks, one.looked_up, one.window) == (
            other.layer,
            other.sinks,
            other.looked_up,
            other.window,
        )
        assert np.array_equal(one.blocks, other.blocks)
        assert np.array_equal(one.attention, other.attention)


def test_a_trace_is_bounded() -> None:
    layers, n_blocks = 30, 3000
    recorder = TraceRecorder(range(layers), block_size=16, mode="on")
    rng = torch.Generator().manual_seed(5)
    for _ in range(12):
        for layer in range(layers):
            blocks = torch.randperm(n_blocks, generator=rng)[:64].sort().values.tolist()
            logits = 3 * torch.randn(2, 64 + 64 * 16 + 500, generator=rng)
            recorder.record(layer, 64, blocks, 64 + n_blocks * 16, [logits])
    trace = recorder.trace(1, 0, 50_000, n_sinks=64)
    assert len(trace.blocks) <= KEPT_BLOCKS
    assert all(len(layer.blocks) == KEPT_LAYER_BLOCKS for layer in trace.layers)
    assert sum(map(len, trace.pack())) < 32_000


def said(session: Session, *texts: str) -> None:
    for text in texts:
        session.append_observation(text)


def ask(session: Session, question: str = "what failed?") -> Trace:
    session.append_user(question)
    return session.reply(max_tokens=4).trace


def test_traces_last_with_their_answers(tmp_path: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(tmp_path, tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        said(session, "the tool printed a line", "error 404 at 12:30")
        first = ask(session)
        assert (first.question, first.answer, first.layers != ()) == (2, 3, True)
        assert first.misses > 0
        session.commit()
        second = ask(session)
        assert session.store.traced() == [3]
        session.rollback()
        assert session.store.traced() == [3]
        assert session.message_count == 4
        again = ask(session, "and then?")
        assert again.answer == second.answer == 5
        session.commit()
        third = ask(session)
        # Forks carry the traces of the messages they take over, committed or not.
        for kept, expected in ((8, [3, 5, 7]), (6, [3, 5]), (5, [3]), (0, [])):
            with session.fork(f"fork-{kept}", kept) as fork:
                assert fork.store.traced() == expected
        session.commit()
        assert not same(second, again)
    with SessionStore.open(tmp_path, "ops", readonly=True) as store:
        assert [same(*pair) for pair in zip(store.traces(), (first, again, third), strict=True)] == [True] * 3
        assert [trace.answer for trace in store.traces(4, 6)] == [5]
        store.verify()
    fork_stored(tmp_path, "ops", "stored", 6)
    with SessionStore.open(tmp_path, "stored") as store:
        assert store.traced() == [3, 5]
        assert same(store.traces()[1], again)


def test_recording_changes_no_result(tmp_path: Path, tiny_model: LocalModel) -> None:
    texts, stored = {}, {}
    for mode in ("off", "sampled", "on"):
        with AgentRuntime(tmp_path / mode, tiny_model, SMALL, RuntimeConfig(trace=mode)) as runtime:
            session = runtime.session("ops")
            said(session, *["the tool printed error 404 and retried"] * 6)
            session.append_user("what failed?")
            reply = session.reply(max_tokens=40)
            texts[mode] = session.token_ids(), session.chunks()
            session.commit()
            stored[mode] = session.store.traced()
            if mode == "off":
                assert (reply.trace.queries, reply.trace.by_message(session.messages())) == (0, [])
            assert session.fork("fork").trace == mode
    assert texts["off"] == texts["sampled"] == texts["on"]
    assert stored == {"off": [], "sampled": [7], "on": [7]}
    with pytest.raises(ConfigError, match=r"RuntimeConfig.trace = 'all'"):
        RuntimeConfig(trace="all")


def test_an_answer_that_fails_or_is_left_has_its_trace_or_none(tmp_path: Path, tiny_model: LocalModel) -> None:
    with AgentRuntime(tmp_path, tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        session.append_user("what failed?")
        pieces = session.stream_reply(prefix="It", max_tokens=9)
        next(pieces)
        pieces.close()
        session.commit()
        assert session.store.traced() == [1]
        assert session.memory.recorder is None


# -- what is found on disk -----------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, tiny_model: LocalModel) -> Path:
    """The database of a session with one answer."""
    with AgentRuntime(tmp_path, tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        ask(session)
        session.commit()
        return session.store.folder / "session.db"


def test_sessions_from_before_there_were_traces(tmp_path: Path, stored: Path, tiny_model: LocalModel) -> None:
    with closing(sqlite3.connect(stored)) as db:
        db.execute("DROP TABLE traces")
        db.execute("DELETE FROM _sqlite_migrations WHERE name = '003_traces'")
        db.commit()
    with SessionStore.open(tmp_path, "ops", readonly=True) as store:
        assert (store.traces(), store.traced(), store.message_count) == ([], [], 2)
        store.verify()
    with AgentRuntime(tmp_path, tiny_model, SMALL) as runtime:
        session = runtime.session("ops")
        ask(session)
        session.commit()
        assert session.store.traced() == [3]


@pytest.mark.parametrize("column", ["head", "arrays"])
def test_damage_is_noticed(tmp_path: Path, stored: Path, column: str) -> None:
    with closing(sqlite3.connect(stored)) as db:
        db.execute(f"UPDATE traces SET {column} = substr({column}, 2)")
        db.commit()
    with SessionStore.open(tmp_path, "ops", readonly=True) as store:
        assert store.traced() == [1]
        with pytest.raises(CorruptSession, match=r"the trace of answer 1"):
            store.traces()


def test_a_trace_belongs_to_a_message_of_its_commit(tmp_path: Path) -> None:
    with SessionStore.create(tmp_path, "ops", {"model": "m", "memory": {}}) as store:
        with pytest.raises(ValueError, match="a trace of message 1"):
            store.commit(
                messages=[span(0, 0, 1)],
                token_ids=[5],
                chunks=[],
                state={},
                bytes_on_disk=0,
                traces=[Trace(answer=1)],
            )
        assert store.message_count == 0
