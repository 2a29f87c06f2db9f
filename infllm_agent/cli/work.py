"""What commands that need the model work with: a session, its runtime, and requests to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infllm_agent.cli.input import Interrupts
from infllm_agent.cli.options import RuntimeOptions
from infllm_agent.cli.output import Interrupted, note
from infllm_agent.config import MemoryConfig, TraceMode
from infllm_agent.errors import Cancelled
from infllm_agent.platform.text import counted
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore

if TYPE_CHECKING:
    from infllm_agent.runtime import AgentRuntime
    from infllm_agent.session.session import Session


@dataclass
class Work:
    """What a command works with. A chat may change the session."""

    runtime: AgentRuntime
    session: Session
    interrupts: Interrupts


@contextmanager
def open_session(
    name: str,
    where: RuntimeOptions,
    settings: dict[str, Any],
    *,
    create: bool = True,
    trace: TraceMode = "sampled",
) -> Iterator[Work]:
    """A session with its model. However the work in it ends, what it has taken in is committed.

    Args:
        settings: memory settings that were given; the others are the session's own, or the model's defaults.
        create: whether to make the session if there is none.
        trace: of which tokens it is kept what they attended to.

    Raises:
        Interrupted: the user stopped the work.
    """
    allowed = where.allowed(trace=trace)
    stored = stored_memory(where.root, name, create=create)
    from infllm_agent.model.local_model import LocalModel
    from infllm_agent.runtime import AgentRuntime

    model = LocalModel.load(where.model, device=where.device, dtype=where.dtype, progress=note)
    config = None
    if settings:
        config = (MemoryConfig.from_record(stored) if stored else model.default_memory()).changed(**settings)
    with Interrupts() as interrupts, AgentRuntime(where.root, model, config, allowed) as runtime:
        work = Work(runtime, runtime.session(name), interrupts)
        work.session.cancelled = interrupts
        try:
            yield work
        except Cancelled:
            session = work.session
            with suppress(Cancelled):  # what waits need not go through the model now
                session.abandon_stream()
            session.commit()
            kept = f"{counted(session.message_count, 'message')}, {counted(session.token_count, 'token')}"
            raise Interrupted(f'interrupted: {kept} are committed in session "{session.name}"') from None


def stored_memory(root: Path, name: str, *, create: bool) -> dict[str, Any] | None:
    """The memory settings that a session was made with; None if it is still to be made.

    It is opened for writing, so that whatever stands in the way is told before the model is loaded.
    """
    if create and Catalog(root).find(name) is None:
        return None
    with SessionStore.open(root, name) as store:
        stored: dict[str, Any] = store.fingerprint["memory"]
        return stored
