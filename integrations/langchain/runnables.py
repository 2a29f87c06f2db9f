"""Events in, answers out: a Runnable over a session, for callers that keep no history themselves."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableSerializable

from infllm_agent.errors import InvalidName
from infllm_agent.integrations.langchain.chat_models import ChatInfLLM
from infllm_agent.integrations.langchain.chunks import chunks_of
from infllm_agent.integrations.langchain.config import with_session_id
from infllm_agent.integrations.langchain.messages import SessionInput, turns_of
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.platform.threads import from_thread
from infllm_agent.routing.calls import answer_events, never, time_limit
from infllm_agent.routing.families import session_name
from infllm_agent.routing.requests import Request
from infllm_agent.runtime import AgentRuntime
from infllm_agent.storage.catalog import Catalog


class SessionRunnable(RunnableSerializable[SessionInput, AIMessage]):
    """Events in, answers out: appends what it is given to a session, then replies.

        ops = SessionRunnable(llm=llm, session_id="ops")
        ops.invoke({"role": "observation", "name": "pager", "text": "disk full on db-3"}, reply=False)
        ops.invoke("Which machine has a problem?").text

    Input is a user's text, a message, an event (``role``, ``text``, and perhaps ``name`` and ``call_id``), a prompt,
    or a list of these. With ``reply=False``, here or as a keyword of a call, it only appends: the answer then is an
    empty message without usage. The session is named as in ``ChatInfLLM``, but there must be a name. Other
    keywords of a call (``max_tokens``, ``stop``, ...) are those of ``ChatInfLLM``.

    A call that fails or is cancelled takes back what it appended. ``batch`` runs its calls in no particular order.
    """

    llm: ChatInfLLM
    session_id: str | None = None
    reply: bool = True

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["infllm_agent", "integrations", "langchain"]

    def invoke(self, input: SessionInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return self._call_with_config(self._invoke, input, config, **kwargs)

    async def ainvoke(self, input: SessionInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return await self._acall_with_config(self._ainvoke, input, config, **kwargs)

    def stream(self, input: SessionInput, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[AIMessage]:
        return self._transform_stream_with_config(iter([input]), self._stream_all, config, **kwargs)

    async def astream(
        self, input: SessionInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessage]:
        async def inputs() -> AsyncIterator[SessionInput]:
            yield input

        chunks = self._atransform_stream_with_config(inputs(), self._astream_all, config, **kwargs)
        async with aclosing(cast(AsyncGenerator[AIMessage], chunks)):
            async for chunk in chunks:
                yield chunk

    def _invoke(
        self, input: SessionInput, run_manager: CallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> AIMessage:
        return _message_of(generate_from_stream(self._chunks(input, config, kwargs, never)))

    async def _ainvoke(
        self, input: SessionInput, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> AIMessage:
        async with aclosing(from_thread(partial(self._chunks, input, config, kwargs))) as chunks:
            return _message_of(await agenerate_from_stream(chunks))

    def _stream_all(
        self,
        inputs: Iterator[SessionInput],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[AIMessage]:
        for input in inputs:
            for chunk in self._chunks(input, config, kwargs, never):
                yield cast(AIMessage, chunk.message)

    async def _astream_all(
        self,
        inputs: AsyncIterator[SessionInput],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessage]:
        async for input in inputs:
            async with aclosing(from_thread(partial(self._chunks, input, config, kwargs))) as chunks:
                async for chunk in chunks:
                    yield cast(AIMessage, chunk.message)

    def _chunks(
        self, input: SessionInput, config: RunnableConfig, options: dict[str, Any], cancelled: Cancellation
    ) -> Iterator[ChatGenerationChunk]:
        turns = turns_of(input)
        options = dict(with_session_id(config, options))
        session_id = options.pop("session_id", None) or self.session_id or self.llm.session_id
        if not session_id:
            raise ValueError(
                "which session? give SessionRunnable a session_id, or put session_id or thread_id "
                "into the config's configurable"
            )
        reply = options.pop("reply", self.reply)
        timeout = options.get("timeout") or self.llm.timeout
        request = Request(turns, *self.llm.asked(options.pop("stop", None), options))
        runtime = self.llm.opened()
        with time_limit(timeout, cancelled) as stopped:
            name = _name_of(runtime, session_id)
            yield from chunks_of(answer_events(runtime, name, request, stopped, reply=reply))


def _name_of(runtime: AgentRuntime, session_id: str) -> str:
    """Name the session for an id: the one of that very name, if there is one, which may be a branch."""
    with suppress(InvalidName):
        if Catalog(runtime.root).find(session_id) is not None:
            return session_id
    return session_name(session_id)


def _message_of(result: ChatResult) -> AIMessage:
    return cast(AIMessage, result.generations[0].message)
