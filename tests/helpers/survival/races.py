"""Two processes that want one session; eight threads at one session and at eight."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from infllm_agent import AgentRuntime, Session
from infllm_agent.errors import SessionLocked
from infllm_agent.model.local_model import LocalModel
from infllm_agent.storage.session_store import SessionStore
from survival.process import Progress, fork, wait
from survival.script import SETTINGS, WORDS

LATEST = 1.0  # seconds until the loser must know
THREADS = 8
STUCK = 60.0


def race(root: Path, seed: int) -> Counter[str]:
    """Two processes open one session at the same time: one wins, the other is told at once. The winner is killed, and
    the session is free."""
    SessionStore.open_or_create(root, "raced", {"model": "tiny"}).close()
    dice = random.Random(seed)
    gate, open_gate = os.pipe()
    early = [dice.uniform(0, 0.002) for _ in range(2)]

    def attempt(number: int) -> Callable[[Progress], None]:
        def work(progress: Progress) -> None:
            os.close(open_gate)
            os.read(gate, 1)  # until the parent lets both go
            time.sleep(early[number])
            began = time.monotonic()
            try:
                store = SessionStore.open(root, "raced")
            except SessionLocked:
                progress.words = "locked" if time.monotonic() - began < LATEST else "locked, but told late"
                return
            progress.words = "won"
            time.sleep(60)
            store.close()

        return work

    children = [fork(attempt(number)) for number in range(2)]
    os.close(gate)
    os.close(open_gate)
    try:
        end = time.monotonic() + 20
        while not all(progress.words for _, progress in children) and time.monotonic() < end:
            time.sleep(0.001)
        outcomes = sorted(progress.words for _, progress in children)
        assert outcomes == ["locked", "won"], outcomes
    finally:
        for pid, progress in children:
            if progress.words != "locked":
                os.kill(pid, signal.SIGKILL)
            wait(pid, progress)
    SessionStore.open(root, "raced").close()
    return Counter({"races": 1})


def threads(model: LocalModel, root: Path, seed: int, ops: int, *, sessions: int) -> Counter[str]:
    """Eight threads, so many operations each, on one session or on eight that others look into as well."""
    done: list[Counter[str]] = []
    failures: list[str] = []
    operations = [0] * THREADS
    names = [f"threads-{seed}-{sessions}-{number}" for number in range(sessions)]
    with AgentRuntime(root, model, SETTINGS) as runtime:

        def work(number: int) -> None:
            dice, counted = random.Random(f"{seed}/{number}"), Counter[str]()
            own = names[number % sessions]
            try:
                for op in range(ops):
                    name = own if dice.random() < 0.8 else dice.choice(names)
                    counted[_operate(runtime.session(name), dice, f"thread-{number}", op)] += 1
                    operations[number] += 1
                    if failures:
                        return
            except BaseException:
                failures.append(traceback.format_exc())
            done.append(counted)

        workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(THREADS)]
        for worker in workers:
            worker.start()
        moved, before = time.monotonic(), 0
        while alive := [worker for worker in workers if worker.is_alive()]:
            alive[0].join(1.0)
            if sum(operations) > before:
                moved, before = time.monotonic(), sum(operations)
            assert time.monotonic() - moved < STUCK, f"threads are stuck for {STUCK} s, after {before} operations"
        assert not failures, failures[0]
        total = sum(done, Counter[str]())
        appended = 0
        for name in names:
            session = runtime.session(name)
            session.commit()
            appended += _check(session)
            session.rollback()
            _check(session)
        assert appended == total["append"], "messages are lost or doubled"
    return Counter({"thread operations": total.total(), **total})


def _operate(session: Session, dice: random.Random, who: str, op: int) -> str:
    session.eager = False  # what is tested is who may do what when, and not the model
    what = dice.choices(
        ["append", "messages", "search", "usage", "token_ids", "commit", "ingest"], [9, 4, 4, 3, 2, 1, 1]
    )
    if what[0] == "append":
        session.append_observation(f"{op} " + " ".join(dice.choices(WORDS, k=4)), who)
    elif what[0] == "messages":
        tail = session.messages(-5)
        assert all(a.end == b.start and a.index + 1 == b.index for a, b in pairwise(tail))
    elif what[0] == "search":
        session.store.search(dice.choice(WORDS), 3)
    elif what[0] == "usage":
        assert session.usage["tokens"] >= 0
    elif what[0] == "token_ids":
        stored = session.store.token_count
        assert len(session.token_ids()) >= stored
    elif what[0] == "commit":
        session.commit()
    else:
        session.ingest(1)
    return what[0]


def _check(session: Session) -> int:
    """Nothing is lost, doubled or out of order; the number of messages."""
    session.store.verify()
    messages, last = session.messages(), dict[str | None, int]()
    assert all(a.end == b.start for a, b in pairwise(messages))
    assert not messages or messages[-1].end == session.token_count == len(session.token_ids())
    for message in messages:
        op = int(message.text.split()[0])
        assert op > last.get(message.name, -1), f"{message.name}: {op} after {last.get(message.name)}"
        last[message.name] = op
    fed = sum(length for _, length in session.chunks())
    assert fed + session.pending_tokens == session.token_count
    return len(messages)
