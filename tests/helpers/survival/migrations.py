"""Sessions of every released schema, and what is left when a process dies while it upgrades one."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

from sqlite_utils import Database

from infllm_agent.storage.database import SESSION_SCHEMA
from infllm_agent.storage.session_store import Message, SessionStore
from survival import tracer
from survival.process import Progress

#: From the newest on: how a database looked before that migration.
UNDO = {
    "003_traces": ["DROP TABLE traces"],
    "002_tools": [
        "DROP INDEX messages_tools",
        "ALTER TABLE messages DROP COLUMN calls",
        "ALTER TABLE messages DROP COLUMN tools",
    ],
}


def released() -> list[str]:
    """Every migration, in order."""
    with closing(Database(memory=True)) as db:
        return [migration.name for migration in SESSION_SCHEMA.pending(db)]


class Upgrade:
    """A session as the version that knew migrations up to ``schema`` left it."""

    def __init__(self, folder: Path, schema: str) -> None:
        self.schema = schema
        self._base, self._root = folder / f"as-of-{schema}", folder / "upgraded"
        self._messages = [Message(i, "user", None, None, f"text {i}", 1.5e9 + i, 3 * i, 3 * i + 3) for i in range(5)]
        with SessionStore.create(self._base, "old", {"model": "tiny"}) as store:
            store.commit(
                messages=self._messages, token_ids=range(15), chunks=[(0, 15)], state={"x": 1}, bytes_on_disk=1
            )
            path = store.folder / "session.db"
        with closing(sqlite3.connect(path)) as db:
            for name in reversed(released()[released().index(schema) + 1 :]):
                for statement in UNDO[name]:
                    db.execute(statement)
                db.execute("DELETE FROM _sqlite_migrations WHERE name = ?", (name,))
            db.commit()

    def check(self, root: Path | None = None, *, readonly: bool = False) -> None:
        """It opens, as it was, and goes on."""
        if root is None:
            root = self._root
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(self._base, root)
        with SessionStore.open(root, "old", readonly=readonly) as store:
            assert store.messages() == self._messages
            assert (list(store.token_ids()), store.chunks(), store.state) == (list(range(15)), [(0, 15)], {"x": 1})
            assert [m.index for m in store.search("text")] == [4, 3, 2, 1, 0]
            store.verify()
            if not readonly:
                store.commit(messages=[], token_ids=[7], chunks=[], state={}, bytes_on_disk=1)

    def kill_at_every_call(self) -> Counter[str]:
        """Die at each call to the file system of opening, and so upgrading, in turn."""
        calls: list[tracer.Call] = []
        self._open(calls.append)
        for call in calls:
            if call.name in tracer.READS:
                continue
            killed, _ = self._open(lambda now, number=call.number: tracer.KILL if now.number == number else None)  # type: ignore[misc]
            assert killed, f"{call} never came"
            with SessionStore.open(self._root, "old", readonly=True) as store:
                assert store.messages() == self._messages
            self.check(self._root)
        return Counter({"kills inside a migration": sum(call.name not in tracer.READS for call in calls)})

    def _open(self, decide: tracer.Decide) -> tuple[bool, Progress]:
        shutil.rmtree(self._root, ignore_errors=True)
        shutil.copytree(self._base, self._root)

        def work(_: Progress) -> None:
            tracer.begin()
            SessionStore.open(self._root, "old").close()
            tracer.end()

        return tracer.traced(self._root, work, decide)
