"""One call: turns go into a session, and the events of an answer come out."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace

from infllm_agent.errors import BudgetExceeded, Cancelled, SessionFull, StorageError
from infllm_agent.messages import Turn
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.reply import Usage
from infllm_agent.routing.events import Called, Events, Finished, Piece
from infllm_agent.routing.requests import Request
from infllm_agent.routing.session_pool import OnDivergence, all_or_nothing, pool_of
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session.session import Session

#: Of a call that nobody cancels.
never = Cancellation()


def answer_history(
    runtime: AgentRuntime,
    base: str,
    request: Request,
    cancelled: Cancellation,
    *,
    on_divergence: OnDivergence = "branch",
    max_branches: int | None = None,
) -> Events:
    """Answer a whole history, in the session of the family ``base`` that it continues."""
    turns = [turn._replace(text=runtime.chat.encoder.clean(turn.text)) for turn in request.turns]
    with pool_of(runtime).by_history(
        base, turns, cancelled, on_divergence=on_divergence, max_branches=max_branches
    ) as session:
        yield from _answer(session, replace(request, turns=turns[session.message_count :]), cancelled)


def answer_events(
    runtime: AgentRuntime, name: str, request: Request, cancelled: Cancellation, *, reply: bool = True
) -> Events:
    """Append to a session as it stands, and answer, unless ``reply`` says no."""
    with pool_of(runtime).by_name(name, cancelled) as session:
        if reply:
            yield from _answer(session, request, cancelled)
        else:
            with all_or_nothing(session, cancelled):
                _append(session, request.turns)
            yield Finished(session.name, session.model.name)


def _answer(session: Session, request: Request, cancelled: Cancellation) -> Events:
    """Append messages and answer: pieces of text, calls of tools, then what it took."""
    with _told_when_full(session):
        yield from _written(session, request, cancelled)


def is_full(error: BaseException) -> bool:
    """Tell whether an error means that a budget or the disk is full."""
    cause = error.__cause__
    no_space = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return (
        isinstance(error, BudgetExceeded) or no_space or getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    )


@contextmanager
def _told_when_full(session: Session) -> Iterator[None]:
    try:
        yield
    except (BudgetExceeded, StorageError) as error:
        if not is_full(error):
            raise
        raise SessionFull(
            f'session "{session.name}" of {session.store.token_count} tokens cannot grow: {error}; make room, or '
            "delete sessions"
        ) from error


def _written(session: Session, request: Request, cancelled: Cancellation) -> Events:
    kept = session.memory.length - session.read_again
    session.read_again = 0
    form = request.form
    with all_or_nothing(session, cancelled):
        _append(session, request.turns)
        request.begins(session)
        answer = session.stream_reply(
            tools=form.tools or None,
            tool_choice=form.tool_choice,
            parallel_calls=form.parallel_calls,
            schema=form.schema,
            **request.sampling.model_dump(),
        )
        with closing(answer) as pieces:
            for piece in pieces:
                yield Piece(piece)
        reply = session.last_reply
        assert reply is not None
        if reply.finish_reason == "cancelled":
            raise Cancelled(f'session "{session.name}": stopped while answering')
    for call in reply.tool_calls:
        yield Called(call)
    asked, written = reply.usage.input_tokens, reply.usage.output_tokens
    # Not the reply's own counts: what was appended may have gone through the model already when it began.
    usage = Usage(asked, prefilled_tokens=asked - kept, reused_tokens=kept, output_tokens=written)
    yield Finished(session.name, session.model.name, reply.finish_reason, usage)


def _append(session: Session, turns: Sequence[Turn]) -> None:
    for turn in turns:
        session.add(turn)


@contextmanager
def time_limit(seconds: float | None, cancelled: Cancellation) -> Iterator[Cancellation]:
    """Give a cancellation that also says yes once the time is up, and turn the Cancelled that follows into a
    TimeoutError."""
    limited = Cancellation(cancelled, seconds=seconds)
    try:
        yield limited
    except Cancelled as error:
        if limited.timed_out and not cancelled():
            raise TimeoutError(f"no answer within timeout={seconds} s ({error})") from None
        raise
