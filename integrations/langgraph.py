"""InfLLM sessions beside LangGraph's threads.

A ``ChatInfLLM`` in a graph keeps one session for each thread by itself: the thread's id is the session's. Here is what
a thread's owner wants beyond that: that the session goes when the thread does, and that an agent can look up, word
for word, what was said long ago.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

try:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
    from langchain_core.runnables import RunnableConfig
    from langchain_core.runnables.config import run_in_executor
    from langchain_core.tools import BaseTool, StructuredTool, ToolException
except ImportError as error:
    raise ImportError('integrations.langgraph needs langchain-core: pip install "infllm-agent[langchain]"') from error
from pydantic import ConfigDict, Field

from infllm_agent.integrations.langchain import ChatInfLLM
from infllm_agent.integrations.langchain.config import with_session_id
from infllm_agent.messages import Message
from infllm_agent.tools import calls_json

__all__ = ["SessionRetriever", "history_tool", "tie_sessions"]

Checkpointer = TypeVar("Checkpointer")


def tie_sessions(checkpointer: Checkpointer, llm: ChatInfLLM) -> Checkpointer:
    """Make a checkpointer's ``delete_thread`` and ``adelete_thread`` delete the thread's sessions too.

        graph = create_agent(llm, tools, checkpointer=tie_sessions(SqliteSaver(conn), llm))

    Returns:
        The same checkpointer.
    """
    saver: Any = checkpointer
    in_async: ContextVar[bool] = ContextVar("in_async", default=False)
    delete_thread: Callable[[str], None] = saver.delete_thread
    adelete_thread: Callable[[str], Any] = saver.adelete_thread

    def delete_both(thread_id: str) -> None:
        delete_thread(thread_id)
        if thread_id and not in_async.get():
            llm.delete_session(str(thread_id))

    async def adelete_both(thread_id: str) -> None:
        token = in_async.set(True)  # some checkpointers call delete_thread for this, in the event loop
        try:
            await adelete_thread(thread_id)
        finally:
            in_async.reset(token)
        if thread_id:
            await llm.adelete_session(str(thread_id))

    saver.delete_thread, saver.adelete_thread = delete_both, adelete_both
    return checkpointer


class SessionRetriever(BaseRetriever):
    """Finds messages of a session's history, word for word, the newest first, by SQLite's full-text search.

    All words of the query must be in the message. Nothing is computed, and the model is not loaded. A document's
    metadata has ``session``, ``message`` (its number), ``role``, ``name`` and ``time`` (ISO 8601, UTC).
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    llm: ChatInfLLM
    session_id: str | None = None
    """None: the one that the config names (``session_id`` or ``thread_id``), else the chat model's."""
    k: int = Field(5, ge=1)
    """Most documents."""
    max_chars: int = Field(2000, ge=1)
    """Most characters of a document; of a longer message, those around the first word that was found."""
    leave_out: tuple[str, ...] = ()
    """Names of tools whose results are not history: searches of it."""

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        return super().invoke(input, config, **with_session_id(config, kwargs))

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:
        return await super().ainvoke(input, config, **with_session_id(config, kwargs))

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        session_id: str | None = None,
        after: datetime | None = None,
        before: datetime | None = None,
        earlier_turns_only: bool = False,
    ) -> list[Document]:
        """Find messages.

        Args:
            after, before: bounds of a message's time, the first included, the second not.
            earlier_turns_only: leave out the latest user's message and what followed it.
        """
        name = self.llm.latest_line(self.session_id or session_id)
        if name is None:
            return []
        with self.llm.read_session(name) as store:
            end = store.message_count
            if earlier_turns_only:
                end = max((m.index for m in store.messages(-64) if m.role == "user"), default=end)
            found = store.search(query, limit=4 * self.k, after=after, before=before, stop=end, not_from=self.leave_out)
        # Nor is a call of a search part of what it looks for.
        found = [message for message in found if not message.calls or not self._only_searches(message)]
        return [_document(name, message, query, self.max_chars) for message in found[: self.k]]

    def _only_searches(self, message: Message) -> bool:
        return not message.text and all(call.name in self.leave_out for call in message.calls)

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        found = partial(self._get_relevant_documents, run_manager=run_manager.get_sync(), **kwargs)
        return await run_in_executor(None, found, query)


def history_tool(
    llm: ChatInfLLM, *, name: str = "search_history", k: int = 5, max_chars: int = 2000, session_id: str | None = None
) -> BaseTool:
    """Make a tool with which an agent searches its own history, word for word, with times.

    It searches the session of the thread that the agent runs in, without the turn that is under way.
    """
    retriever = SessionRetriever(
        llm=llm, k=k, max_chars=max_chars, session_id=session_id, leave_out=(name,), tags=["infllm-history"]
    )

    def search(query: str, config: RunnableConfig, after: str | None = None, before: str | None = None) -> str:
        documents = retriever.invoke(
            query, config, after=_time(after, "after"), before=_time(before, "before"), earlier_turns_only=True
        )
        if not documents:
            return f"No earlier message has all the words of {query!r}."
        return "\n\n".join(_shown(document) for document in documents)

    return StructuredTool.from_function(
        search,
        name=name,
        description=(
            "Search the earlier messages of this conversation, tool results included, word for word. Give the few "
            "words that must all be in the message. after and before bound the time, as in 2026-03-01T12:00 (UTC)."
        ),
        handle_tool_error=True,
    )


def _document(session: str, message: Message, query: str, max_chars: int) -> Document:
    time = datetime.fromtimestamp(message.time, UTC).isoformat(timespec="seconds")
    where = {"session": session, "message": message.index, "role": message.role, "name": message.name, "time": time}
    text = message.text or calls_json(message.calls)
    return Document(_around(text, query, max_chars), id=f"{session}/{message.index}", metadata=where)


def _around(text: str, query: str, max_chars: int) -> str:
    """Cut a long text to what is around the first word of the query that is in it."""
    if len(text) <= max_chars:
        return text
    lower = text.lower()
    places = [place for word in query.lower().split() if (place := lower.find(word)) >= 0]
    start = max(0, min(min(places, default=0) - max_chars // 4, len(text) - max_chars))
    stop = start + max_chars
    return ("... " if start else "") + text[start:stop] + (" ..." if stop < len(text) else "")


def _shown(document: Document) -> str:
    where = document.metadata
    source = f"{where['role']} {where['name']}" if where["name"] else where["role"]
    return f"[{where['time']}, {source}]\n{document.page_content}"


def _time(text: str | None, what: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ToolException(f"{what}: {text!r} is no time; write it as 2026-03-01 or 2026-03-01T12:00") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
