"""Sessions pass between two pools over one folder, as between processes: locks are of open files, not of processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import Cancelled, SessionLocked
from infllm_agent.messages import Turn
from infllm_agent.model.local_model import LocalModel
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.routing.handover import Handover
from infllm_agent.routing.session_pool import SessionPool
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

MEMORY = MemoryConfig(
    n_init=4, n_local=16, block_size=4, topk=4, candidates=8, chunk_size=16, question_chunk=4, max_cached_block=8
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Replica:
    def __init__(self, root: Path, model: LocalModel, patience_s: float = 10.0) -> None:
        self.runtime = AgentRuntime(root, model, MEMORY)
        self.pool = SessionPool(self.runtime)
        self.handover = Handover(root, patience_s)
        self.pool.share(self.handover)

    def append(self, name: str, text: str) -> None:
        with self.pool.by_name(name, Cancellation()) as session:
            session.append_user(text)
            session.commit()

    def history(self, turns: list[Turn]) -> Session:
        with self.pool.by_history("main", turns, Cancellation()) as session:
            for turn in turns[session.message_count :]:
                session.append(turn.role, turn.text)
            session.commit()
            return session


@pytest.fixture
def pair(tmp_path: Path, tiny_model: LocalModel) -> Iterator[tuple[Replica, Replica]]:
    replicas = Replica(tmp_path, tiny_model), Replica(tmp_path, tiny_model)
    yield replicas
    for replica in replicas:
        replica.handover.close()
        replica.runtime.close()


def test_an_idle_session_is_given_to_who_asks(pair):
    for number in range(6):
        pair[number % 2].append("ops", f"line {number}")
    assert [message.text for message in pair[1].runtime.session("ops").messages()] == [f"line {n}" for n in range(6)]


def test_a_session_at_work_is_given_when_the_call_is_over(pair):
    first, second = pair
    order: list[str] = []
    with first.pool.by_name("ops", Cancellation()) as session:
        session.append_user("one")
        session.commit()
        thread = threading.Thread(target=lambda: (second.append("ops", "two"), order.append("second")))
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_who_waits_may_stop_waiting_or_run_out_of_patience(pair, tmp_path, tiny_model):
    first, second = pair
    with first.pool.by_name("ops", Cancellation()) as session:
        session.append_user("one")
        session.commit()
        cancelled = Cancellation()
        cancelled.cancel()
        with pytest.raises(Cancelled), second.pool.by_name("ops", cancelled):
            pass
        second.handover.patience_s = 0.3
        with pytest.raises(SessionLocked), second.pool.by_name("ops", Cancellation()):
            pass
    assert list((tmp_path / "wanted").iterdir()) == []


def test_a_history_goes_on_and_branches_wherever_it_comes(pair):
    """Nothing is read again that the other has read."""
    turns = [Turn("user", f"turn {number} " * 4) for number in range(4)]
    for count in (1, 2, 3, 4):
        assert pair[count % 2].history(turns[:count]).name == "main"
    branch = pair[1].history([*turns[:2], Turn("user", "another end")])
    assert (branch.name, branch.read_again) == ("main.b2", 0)
    assert [message.text for message in branch.messages()] == [turns[0].text, turns[1].text, "another end"]
