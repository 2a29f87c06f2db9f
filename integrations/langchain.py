"""InfLLM sessions for LangChain: a chat model for whole histories, and a Runnable for single events.

``ChatInfLLM`` has LangChain's interface: each call brings the full list of messages. Of the sessions that belong to
the call's ``session_id``, the one whose history is the longest beginning of that list goes on, so that only what is
new goes through the model. A list that continues none of them (an edit, a fork) begins a branch, a session of its own
named ``ID.b2``, ``ID.b3``, ... So an answer depends on the messages alone, and what is kept is a cache.

``SessionRunnable`` appends what it is given to a session and replies: for a caller that keeps no history itself.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForChainRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from infllm_agent.catalog import check_name
from infllm_agent.config import MemoryConfig, SamplingConfig, default_root
from infllm_agent.integrations.calls import answer_events, answer_history, from_thread, never, time_limit
from infllm_agent.integrations.desk import CancelCheck
from infllm_agent.integrations.turns import SessionInput, turn_of, turns_of
from infllm_agent.runtime import AgentRuntime

__all__ = ["ChatInfLLM", "SessionInput", "SessionRunnable"]

_NO_TOOLS = (
    "ChatInfLLM does not call tools or follow schemas yet: describe the tools and the form of the answer in the "
    "system message, and parse the text of the answer"
)
_TOOL_ARGUMENTS = ("tools", "tool_choice", "functions", "function_call", "response_format")
#: What hosted models take and a local one has no use for: dropped, so that models can be exchanged.
_HOSTED_ONLY = ("api_key", "base_url", "max_retries")
#: Fields that a runtime already decided.
_OF_RUNTIME = ("model", "root", "memory", "device", "dtype")

_runtimes: WeakValueDictionary[tuple[str, str, MemoryConfig | None, str, str], AgentRuntime] = WeakValueDictionary()
_opening = threading.Lock()  # held long: opening loads the model


class ChatInfLLM(BaseChatModel):
    """A local model whose sessions have no length limit: no message is ever dropped or summarised.

        llm = ChatInfLLM(model="smollm2", session_id="ops")
        answer = llm.invoke([SystemMessage("Be brief."), HumanMessage("What is a pager?")])

    Calls take the full list of messages, as with any chat model; only what the session does not hold yet is computed
    (``usage_metadata["input_token_details"]``: ``cache_read`` tokens were there, ``cache_creation`` are new). The
    session a call belongs to is named by its ``session_id`` keyword, else by ``session_id`` or ``thread_id`` in the
    config's ``configurable``, else by the constructor; else it is one of this object's own. It lasts: another process
    with the same root goes on with it. Calls on one session queue. A failed or cancelled call leaves it as it was.

    The model is loaded at first use; objects that agree on model, root, memory, device and dtype share it.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "smollm2"
    """A packaged alias, a local folder, or a hub id."""
    root: str = Field(default_factory=lambda: str(default_root()))
    """The folder that holds the sessions; by default ``$INFLLM_ROOT`` or ``~/.local/share/infllm-agent``."""
    session_id: str | None = None
    memory: MemoryConfig | None = None
    """For new sessions, and required of old ones. None: the model's default, and what each old session has."""
    device: str = "auto"
    dtype: str = "auto"
    runtime: AgentRuntime | None = Field(default=None, exclude=True, repr=False)
    """A runtime to share; it decides model, root, memory, device and dtype, and its owner closes it."""
    temperature: float = 0.0
    max_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    """Texts that end an answer; those given with a call replace them."""
    timeout: float | None = None
    """Seconds after which a call fails with TimeoutError."""
    streaming: bool = False

    _own_id: str = PrivateAttr(default_factory=lambda: f"chat-{uuid.uuid4().hex[:16]}")
    _opened: AgentRuntime | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _accept_hosted_arguments(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key not in _HOSTED_ONLY}
            if values.get("runtime") is not None and (both := [name for name in _OF_RUNTIME if name in values]):
                raise ValueError(f"runtime already decides {', '.join(both)}: give one or the other")
        return values

    @field_validator("root", mode="before")
    @classmethod
    def _root_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> ChatInfLLM:
        self._sampling(None, {})
        if self.runtime is not None:
            self.model, self.root = self.runtime.model.name, os.fspath(self.runtime.root)
            self.memory = self.runtime.memory
            self.device = str(self.runtime.model.device)
            self.dtype = str(self.runtime.model.dtype).removeprefix("torch.")
        return self

    def close(self) -> None:
        """Commit and close the sessions, so that another process can open them; a later call opens them again.

        A ``runtime`` that was given stays open.
        """
        if self._opened is not None:
            self._opened.close()

    # -- LangChain's interface -----------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "infllm"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        memory = self.memory and self.memory.model_dump()
        return {"model": self.model, "root": self.root, "memory": memory, **self._sampling(None, {}).model_dump()}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "infllm"
        return params

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return True

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return {"memory": self.memory.model_dump()} if self.memory else {}

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text by the model's own tokenizer; loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self._runtime().chat.encoder.encode_text(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The tokens that the messages are for the model, its template's and the request to answer included."""
        if tools:
            raise NotImplementedError(_NO_TOOLS)
        chat = self._runtime().chat
        turns = enumerate(map(turn_of, messages))
        count = sum(len(chat.render(turn.role, turn.text, name=turn.name, first=n == 0)) for n, turn in turns)
        return count + len(chat.generation_prompt(first=not messages))

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_TOOLS)

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_TOOLS)

    # The config's ``configurable`` never reaches ``_generate`` by itself.

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return super().invoke(input, config, **_with_session_id(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **_with_session_id(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, **_with_session_id(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, **_with_session_id(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **_with_session_id(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **_with_session_id(config, kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._chunks(messages, stop, kwargs, never))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with aclosing(from_thread(partial(self._chunks, messages, stop, kwargs))) as chunks:
            return await agenerate_from_stream(chunks)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._chunks(messages, stop, kwargs, never):
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async with aclosing(from_thread(partial(self._chunks, messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    # -- how -----------------------------------------------------------------------------------------------------------

    def _chunks(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any], cancelled: CancelCheck
    ) -> Iterator[ChatGenerationChunk]:
        if not messages:
            raise ValueError("the list of messages is empty: give at least one message to answer")
        options = dict(options)
        base = check_name(options.pop("session_id", None) or self.session_id or self._own_id)
        sampling = self._sampling(stop, options)
        turns = [turn_of(message) for message in messages]
        runtime = self._runtime()
        with time_limit(self.timeout, cancelled) as stopped:
            yield from answer_history(runtime, base, turns, sampling, stopped)

    def _sampling(self, stop: list[str] | None, options: Mapping[str, Any]) -> SamplingConfig:
        """How to choose tokens: the call's settings over the object's. Raises for what is not served."""
        given = {key: value for key, value in options.items() if key not in ("stream", *_HOSTED_ONLY)}
        if any(given.pop(name, None) for name in _TOOL_ARGUMENTS):
            raise NotImplementedError(_NO_TOOLS)
        if given.pop("model", self.model) != self.model:
            raise ValueError(f'this ChatInfLLM runs "{self.model}"; make another one for another model')
        if stop is not None:
            given["stop"] = stop
        values = {name: getattr(self, name) for name in SamplingConfig.model_fields} | given
        return SamplingConfig(**{**values, "stop": tuple(values["stop"] or ())})

    def _runtime(self) -> AgentRuntime:
        if self.runtime is not None:
            return self.runtime
        with _opening:
            if self._opened is None:
                key = (os.path.realpath(self.root), self.model, self.memory, self.device, self.dtype)
                if (runtime := _runtimes.get(key)) is None:
                    runtime = AgentRuntime.open(
                        self.root, self.model, self.memory, device=self.device, dtype=self.dtype
                    )
                self._opened = _runtimes[key] = runtime
            return self._opened


def _with_session_id(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords with the session that the config names, unless they name one themselves.

    Inside a node of a graph the config need not be given: LangChain keeps it in a context variable.
    """
    if kwargs.get("session_id") is None:
        configurable = ensure_config(config).get("configurable", {})
        named = configurable.get("session_id") or configurable.get("thread_id")
        if named is not None:
            kwargs = {**kwargs, "session_id": str(named)}
    return kwargs


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
        self, input: SessionInput, config: RunnableConfig, options: dict[str, Any], cancelled: CancelCheck
    ) -> Iterator[ChatGenerationChunk]:
        turns = turns_of(input)
        options = dict(_with_session_id(config, options))
        name = options.pop("session_id", None) or self.session_id or self.llm.session_id
        if not name:
            raise ValueError(
                "which session? give SessionRunnable a session_id, or put session_id or thread_id "
                "into the config's configurable"
            )
        reply = options.pop("reply", self.reply)
        sampling = self.llm._sampling(options.pop("stop", None), options)
        runtime = self.llm._runtime()
        with time_limit(self.llm.timeout, cancelled) as stopped:
            yield from answer_events(runtime, name, turns, sampling if reply else None, stopped)


def _message_of(result: ChatResult) -> AIMessage:
    return cast(AIMessage, result.generations[0].message)
