"""A LangChain chat model for histories without end.

Each call brings the full list of messages. Of the sessions that belong to the call's ``session_id``, the one that the
list continues goes on, so that only what is new goes through the model. A list that leaves a session midway (an edit,
a fork, another try) begins a branch: a session named ``ID.b2``, ``ID.b3``, ..., which shares what it has in common
with the first. So an answer depends on the messages alone, and what is kept is a cache.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput, ModelProfile
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from infllm_agent.config import MemoryConfig, SamplingConfig, default_root
from infllm_agent.integrations.langchain.chunks import chunks_of
from infllm_agent.integrations.langchain.config import with_session_id
from infllm_agent.integrations.langchain.messages import history_of
from infllm_agent.integrations.langchain.structured_output import Method, structured
from infllm_agent.integrations.langchain.tools import form_of, openai_tool
from infllm_agent.messages import Turn
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.platform.threads import from_thread
from infllm_agent.routing.calls import answer_history, never, time_limit
from infllm_agent.routing.families import family, session_name
from infllm_agent.routing.requests import Form, Request
from infllm_agent.routing.requests import tool_choice as choose_tool
from infllm_agent.routing.session_pool import OnDivergence, delete_stored, pool_of, prune_stored
from infllm_agent.runtime import AgentRuntime
from infllm_agent.storage.session_store import SessionStore

__all__ = ["ChatInfLLM"]

#: What hosted models take and a local one has no use for: dropped, so that models can be exchanged.
_HOSTED_ONLY = ("api_key", "base_url", "max_retries")
#: Keywords of a call that do not say how tokens are chosen.
_NOT_SAMPLING = ("stream", "timeout", *_HOSTED_ONLY)
#: Tokens of the longest history that frameworks may count on: agents summarise when they come near it. There is no
#: limit but the disk.
_INPUT_TOKENS = 100_000_000

_runtimes: WeakValueDictionary[tuple[str, str, MemoryConfig | None, str, str], AgentRuntime] = WeakValueDictionary()
#: The one used last: kept for objects that live for one call only, as configurable fields make them.
_latest: list[AgentRuntime] = []
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
    on_divergence: OnDivergence = "branch"
    """What happens to a list of messages that leaves its session midway: ``branch`` silently, ``warn`` (in the log,
    and branch), or ``error`` (DivergedHistory)."""
    max_branches: int | None = 16
    """Most branches of a session; beyond that, the one that was used longest ago is deleted."""

    anonymous_id: str = Field(default_factory=lambda: f"chat-{uuid.uuid4().hex[:16]}", exclude=True, repr=False)
    """The session of calls that name none; ``close`` deletes it."""

    _opened: AgentRuntime | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _accept_hosted_arguments(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key not in _HOSTED_ONLY}
            if isinstance(runtime := values.get("runtime"), AgentRuntime):
                decided = _decided_by(runtime)
                if both := [name for name in decided if name in values and values[name] != decided[name]]:
                    raise ValueError(f"runtime already decides {', '.join(both)}: give one or the other")
                values |= decided
        return values

    @field_validator("root", mode="before")
    @classmethod
    def _root_as_text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> ChatInfLLM:
        self._sampling(None, {})
        return self

    def close(self) -> None:
        """Commit and close the sessions, so that another process can open them; a later call opens them again.

        Calls that are under way, of all objects that share them, end first. The session of calls that named none is
        deleted: nobody could find it again. A ``runtime`` that was given stays open.
        """
        if (runtime := self.runtime or self._opened) is not None:
            pool_of(runtime).delete(self.anonymous_id, never)
            if self.runtime is None:
                pool_of(runtime).close(never)
                runtime.close()
                with _opening:
                    _latest[:] = [other for other in _latest if other is not runtime]

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**(state["__pydantic_private__"] or {}), "_opened": None}}

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatInfLLM:
        return self.model_copy()

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

    @classmethod
    def get_lc_namespace(cls) -> list[str]:
        return ["infllm_agent", "integrations", "langchain"]

    @property
    def lc_attributes(self) -> dict[str, Any]:
        return {"memory": self.memory.model_dump()} if self.memory else {}

    def get_token_ids(self, text: str) -> list[int]:
        """Encode a text with the model's own tokenizer; loads the model."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.opened().chat.encoder.encode_text(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens that the model would read: the messages in its template, the announcement of the tools, and
        the request to answer."""
        chat = self.opened().chat
        turns = self._history(messages, form_of({"tools": tools})) if messages else []
        count = 0
        for turn in turns:
            render = partial(chat.render, turn.role, turn.text, first=turn is turns[0])
            count += len(render(name=turn.name, call_id=turn.call_id, calls=turn.calls, tools=turn.tools))
        return count + len(chat.generation_prompt(first=not messages))

    def _resolve_model_profile(self) -> ModelProfile | None:
        return ModelProfile(
            name=self.model,
            max_input_tokens=_INPUT_TOKENS,
            text_inputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            text_outputs=True,
            reasoning_output=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
            temperature=True,
        )

    def bind_tools(
        self,
        tools: Sequence[Any],
        *,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Give the model tools that it may call; the grammar holds every call to its tool's schema.

        Args:
            tools: functions, LangChain tools, pydantic classes, or dicts in OpenAI's, Anthropic's or LangChain's form.
            tool_choice: ``auto`` (also None): free text or calls. ``any``, ``required`` or True: at least one call.
                ``none``: none. A tool's name, or OpenAI's or Anthropic's dict for it: that tool.
            parallel_tool_calls: whether an answer may have several calls; by default, where the model calls by itself.
            strict: noted in the tools; calls are held to the schema in any case.

        Raises:
            ValueError: an invalid tool or choice.
        """
        formatted = [openai_tool(tool, strict=strict) for tool in tools]
        choice = choose_tool(tool_choice, [tool["function"]["name"] for tool in formatted])
        more = {"tool_choice": choice, "parallel_tool_calls": parallel_tool_calls}
        given = {name: value for name, value in more.items() if value is not None}
        return self.bind(tools=formatted, **given, **kwargs)

    def with_structured_output(
        self,
        schema: Any = None,
        *,
        include_raw: bool = False,
        method: Method = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a runnable whose answers are instances of ``schema`` (a pydantic class), or dicts that satisfy it.

        The grammar holds the answer to the schema whatever the model would rather say. By default the history stays
        as it is, so that a question about a long session costs no more than any other; the model sees the schema's
        keys as it writes them. With ``method="function_calling"`` it is shown the whole schema as a tool, which begins
        another history. ``include_raw``: a dict with ``raw``, ``parsed`` and ``parsing_error`` instead.

        Raises:
            ValueError: an invalid schema or method.
        """
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict, **kwargs)

    # The config's ``configurable`` never reaches ``_generate`` by itself.

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return super().invoke(input, config, **with_session_id(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **with_session_id(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, **with_session_id(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, **with_session_id(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **with_session_id(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **with_session_id(config, kwargs))

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

    # -- sessions ------------------------------------------------------------------------------------------------------

    # None of these loads the model.

    def latest_line(self, session_id: str | None = None) -> str | None:
        """Name the session, or the branch of it, that was used last; None if there is no session yet."""
        lines = family(self.root, self._base(session_id))
        return max(lines, key=lambda info: info.updated).name if lines else None

    def read_session(self, name: str) -> SessionStore:
        """Open what is stored of a session, to be read and then closed."""
        return SessionStore.open(self.root, name, readonly=True)

    def prune(self, session_id: str | None = None, *, keep: int = 0) -> list[str]:
        """Delete a session's branches but the ``keep`` used last, and return their names; the session itself stays."""
        base = self._base(session_id)
        if (runtime := self._loaded()) is None:
            return prune_stored(self.root, base, keep)
        return pool_of(runtime).prune(base, keep)

    def delete_session(self, session_id: str | None = None) -> list[str]:
        """Delete a session and its branches, with all that belongs to them, and return their names.

        It is not an error if there is no such session.

        Raises:
            SessionLocked: another process has it open.
        """
        base = self._base(session_id)
        if (runtime := self._loaded()) is None:
            return delete_stored(self.root, base)
        return pool_of(runtime).delete(base, never)

    async def adelete_session(self, session_id: str | None = None) -> list[str]:
        return await run_in_executor(None, self.delete_session, session_id)

    def _loaded(self) -> AgentRuntime | None:
        """The runtime that this object would work on, if there is one already."""
        with _opening:
            return self.runtime or self._opened or _runtimes.get(self._key())

    # -- how -----------------------------------------------------------------------------------------------------------

    def _chunks(
        self, messages: Sequence[BaseMessage], stop: list[str] | None, options: dict[str, Any], cancelled: Cancellation
    ) -> Iterator[ChatGenerationChunk]:
        base = self._base(options.get("session_id"))
        without_id = {name: value for name, value in options.items() if name != "session_id"}
        sampling, form = self.asked(stop, without_id)
        request = Request(self._history(messages, form), sampling, form)
        with time_limit(options.get("timeout") or self.timeout, cancelled) as stopped:
            yield from chunks_of(
                answer_history(
                    self.opened(),
                    base,
                    request,
                    stopped,
                    on_divergence=self.on_divergence,
                    max_branches=self.max_branches,
                )
            )

    def _base(self, session_id: str | None) -> str:
        return session_name(session_id or self.session_id or self.anonymous_id)

    def asked(self, stop: list[str] | None, options: Mapping[str, Any]) -> tuple[SamplingConfig, Form]:
        """Decide how tokens are chosen and what form the answer has: keywords of the call, else this object's settings.

        Raises:
            ValueError: an invalid keyword or value.
        """
        given = {key: value for key, value in options.items() if key not in _NOT_SAMPLING and value is not None}
        form = form_of(given)
        if given.pop("model", self.model) != self.model:
            raise ValueError(f'this ChatInfLLM runs "{self.model}"; make another one for another model')
        return self._sampling(stop, given), form

    def _history(self, messages: Sequence[BaseMessage], form: Form) -> list[Turn]:
        return history_of(messages, form.tools, lambda: self.opened().chat.default_system)

    def _sampling(self, stop: list[str] | None, given: Mapping[str, Any]) -> SamplingConfig:
        """Decide how tokens are chosen: the call's settings come before the object's."""
        values = {name: getattr(self, name) for name in SamplingConfig.model_fields} | dict(given)
        if stop is not None:
            values["stop"] = stop
        return SamplingConfig(**{**values, "stop": tuple(values["stop"] or ())})

    def opened(self) -> AgentRuntime:
        """Open the runtime that this object works on, or return it; loads the model at first use."""
        if self.runtime is not None:
            return self.runtime
        with _opening:
            if self._opened is None:
                key = self._key()
                if (runtime := _runtimes.get(key)) is None:
                    runtime = AgentRuntime.open(
                        self.root, self.model, self.memory, device=self.device, dtype=self.dtype
                    )
                self._opened = _runtimes[key] = runtime
            _latest[:] = [self._opened]
            return self._opened

    def _key(self) -> tuple[str, str, MemoryConfig | None, str, str]:
        return os.path.realpath(self.root), self.model, self.memory, self.device, self.dtype


def _decided_by(runtime: AgentRuntime) -> dict[str, Any]:
    """Read the fields of a chat model that its runtime decides."""
    return {
        "model": runtime.model.name,
        "root": os.fspath(runtime.root),
        "memory": runtime.memory,
        "device": str(runtime.model.device),
        "dtype": str(runtime.model.dtype).removeprefix("torch."),
    }
