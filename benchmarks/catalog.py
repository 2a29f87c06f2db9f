"""What finding a session among many costs: processor time of a look-up by name, of its family, and of a new name.

    python benchmarks/catalog.py --sessions 1000 10000

    python benchmarks/catalog.py --sessions 10000 --model smollm2   # and of a call of ChatInfLLM, and of the server

The sessions are empty. With an older version on ``PYTHONPATH`` and a root made by this one (``--root``), it prints what
that version costs.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from infllm_agent.errors import UnknownSession

try:
    from infllm_agent.storage.catalog import Catalog
    from infllm_agent.storage.session_store import SessionStore
except ImportError:  # as it was up to 0.1
    from infllm_agent.catalog import Catalog  # type: ignore[import-not-found,no-redef]
    from infllm_agent.store import SessionStore  # type: ignore[import-not-found,no-redef]

#: A folder that was changed just now is read each time; a moment later its time shows the next change.
QUIET_SECONDS = 0.2


def fill(root: Path, sessions: int) -> None:
    """Make sessions: one as it is made otherwise, and folders like it, each with a name of its own."""
    from infllm_agent.storage.database import SESSION_SCHEMA, connect, transaction
    from infllm_agent.storage.rows import SessionRow, write_session

    with SessionStore.create(root, "chat0", {"model": "none"}) as first:
        folder, row = first.folder, SessionRow("", '{"model": "none"}', first.created)
    for number in range(1, sessions):
        made = Path(shutil.copytree(folder, folder.with_name(uuid.uuid4().hex)))
        with closing(connect(made / "session.db", SESSION_SCHEMA, durable=False)) as db, transaction(db.conn):
            db.conn.execute("DELETE FROM session")
            name = f"chat{number // 2}" + (".b2" if number % 2 else "")
            write_session(db.conn, row._replace(name=name))


def cost(call: Callable[[], object], times: int) -> float:
    """The median of the processor time of a call, in milliseconds."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return 1000 * statistics.median(spent)


def family(root: Path, base: str) -> object:
    catalog = Catalog(root)
    if hasattr(catalog, "family"):
        return catalog.family(base)
    member = re.compile(rf"{re.escape(base)}(\.b[1-9][0-9]*)?")
    return [info for info in catalog.list() if member.fullmatch(info.name)]


def require(root: Path, name: str) -> None:
    with suppress(UnknownSession):
        Catalog(root).require(name)


def measure(root: Path, times: int) -> dict[str, float]:
    Catalog(root).list()
    time.sleep(QUIET_SECONDS)
    Catalog(root).find("chat1")
    found = {
        "find, there": cost(lambda: Catalog(root).find("chat100"), times),
        "find, not there": cost(lambda: Catalog(root).find("new"), times),
        "require, there": cost(lambda: require(root, "chat100"), times),
        "require, not there": cost(lambda: require(root, "new"), times),
        "family, there": cost(lambda: family(root, "chat100"), times),
        "family, not there": cost(lambda: family(root, "new"), times),
    }
    names = iter(f"added{number}-{time.time_ns()}" for number in range(times))
    found["add"] = cost(lambda: SessionStore.create(root, next(names), {"model": "none"}).close(), times)

    def find_after_change() -> None:
        os.utime(root / "sessions")
        Catalog(root).find("new")

    found["find, after something came or went"] = cost(find_after_change, times)
    return found


@contextmanager
def finding() -> Iterator[list[float]]:
    """Add up the processor time in which calls look for their sessions, in milliseconds."""
    from infllm_agent.integrations.server.auth import Namespace
    from infllm_agent.routing.session_pool import SessionPool

    spent, busy, undo = [0.0], [False], []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if busy[0]:
                return function(*arguments, **options)
            busy[0], began = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                busy[0] = False
                spent[0] += 1000 * (time.thread_time() - began)

        return call

    for kind, name in ((Catalog, "find"), (Catalog, "require"), (Namespace, "family"), (SessionPool, "_choose")):
        function = getattr(kind, name)
        undo.append(partial(setattr, kind, name, function))
        setattr(kind, name, timed(function))
    try:
        yield spent
    finally:
        for restore in undo:
            restore()


def calls(root: Path, model: str, times: int) -> dict[str, float]:
    """What a call of the chat model, and one of the server, spend on finding their sessions."""
    from fastapi.testclient import TestClient

    from infllm_agent import AgentRuntime
    from infllm_agent.integrations.langchain import ChatInfLLM
    from infllm_agent.integrations.server import create_app

    found = {}
    with AgentRuntime.open(root, model) as runtime:
        llm = ChatInfLLM(runtime=runtime, max_tokens=2, session_id=f"mine-{time.time_ns()}")
        history: list[tuple[str, str]] = []
        spent = []
        for number in range(times):
            history.append(("user", f"Question {number}?"))
            with finding() as total:
                history.append(("assistant", llm.invoke(history).text))
            spent.append(total[0])
        found["call of ChatInfLLM, session there"] = statistics.median(spent[1:])
        with TestClient(create_app(runtime)) as client:
            spent = []
            body: dict[str, Any] = {"model": runtime.model.name, "max_tokens": 2, "session_id": f"s-{time.time_ns()}"}
            messages: list[dict[str, Any]] = []
            for number in range(times):
                messages.append({"role": "user", "content": f"Question {number}?"})
                with finding() as total:
                    answer = client.post("/v1/chat/completions", json={**body, "messages": messages}).json()
                messages.append(answer["choices"][0]["message"])
                spent.append(total[0])
            found["call of the server, session there"] = statistics.median(spent[1:])
            new = []
            for number in range(times):
                with finding() as total:
                    one = {**body, "session_id": f"new-{number}-{time.time_ns()}", "messages": messages[:1]}
                    client.post("/v1/chat/completions", json=one).raise_for_status()
                new.append(total[0])
            found["call of the server, new session"] = statistics.median(new)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--times", type=int, default=21)
    parser.add_argument("--model", help="measure whole calls, too, on this model")
    parser.add_argument("--root", type=Path, help="keep the sessions there, and use those that are")
    options = parser.parse_args()
    for sessions in options.sessions:
        with tempfile.TemporaryDirectory() as temporary:
            root = (options.root or Path(temporary)) / str(sessions)
            if not root.exists():
                fill(root, sessions)
            print(f"{sessions:,} sessions: processor time in ms")
            found = measure(root, options.times)
            if options.model:
                found |= calls(root, options.model, options.times)
            for what, spent in found.items():
                print(f"  {what:36}{spent:10.2f}")


if __name__ == "__main__":
    main()
