"""InfLLM sessions for LangChain: a chat model for whole histories, and a Runnable for single events.

``ChatInfLLM`` has LangChain's interface: each call brings the full list of messages. Of the sessions that belong to
the call's ``session_id``, the one whose history is the longest beginning of that list goes on, so that only what is
new goes through the model. A list that continues none of them (an edit, a fork) begins a branch, a session of its own
named ``ID.b2``, ``ID.b3``, ... So an answer depends on the messages alone, and what is kept is a cache.

``SessionRunnable`` appends what it is given to a session and replies: for a caller that keeps no history itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from langchain_core.callbacks import (
    AsyncCallbackManagerForChainRun,
    AsyncCallbackManagerForLLMRun,
    CallbackManagerForChainRun,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator

from infllm_agent.catalog import check_name
from infllm_agent.chat import ROLES
from infllm_agent.config import MemoryConfig, SamplingConfig, default_root
from infllm_agent.errors import Cancelled, SessionBusy
from infllm_agent.records import Message
from infllm_agent.runtime import AgentRuntime
from infllm_agent.session import Session
from infllm_agent.store import SessionStore

__all__ = ["ChatInfLLM", "SessionInput", "SessionRunnable"]

T = TypeVar("T")

#: What ``SessionRunnable`` takes: a user's text, a message, an event, a prompt, or a list of them.
SessionInput = (
    str | PromptValue | BaseMessage | Mapping[str, Any] | Sequence[str | PromptValue | BaseMessage | Mapping[str, Any]]
)

#: Asked between chunks and tokens whether to stop.
CancelCheck = Callable[[], bool]


def _never() -> bool:
    return False


# -- messages ----------------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """A message as a session stores it."""

    role: str
    text: str
    name: str | None = None
    call_id: str | None = None


_ROLE_OF: list[tuple[type[BaseMessage], str]] = [
    (SystemMessage, "system"),
    (HumanMessage, "user"),
    (AIMessage, "assistant"),
    (ToolMessage, "tool"),
]
#: The model sees names in these messages only. Elsewhere they are labels of the caller's (agent frameworks put the
#: agent's name on answers afterwards) and must not make a history another one.
_NAMED_ROLES = ("tool", "observation")
#: Content blocks that repeat what ``AIMessage.tool_calls`` says.
_CALL_BLOCKS = ("tool_use", "tool_call")


def _turn(message: BaseMessage) -> _Turn:
    """A LangChain message as a session stores it. Raises ValueError for what cannot be given to a text model."""
    role = next((role for kind, role in _ROLE_OF if isinstance(message, kind)), None)
    if isinstance(message, ChatMessage) and message.role in ROLES:
        role = message.role
    if role is None:
        what = f"role {message.role!r}" if isinstance(message, ChatMessage) else f"type {type(message).__name__}"
        raise ValueError(
            f"a message of {what} has no place in a session; use System-, Human-, AI- or ToolMessage, "
            f"or ChatMessage with a role of {', '.join(ROLES)}"
        )
    text = _text(message)
    if isinstance(message, AIMessage):
        calls = [_tool_call(call["name"], call["args"]) for call in message.tool_calls]
        calls += [_tool_call(call["name"], call["args"]) for call in message.invalid_tool_calls]
        text = "\n".join([text, *calls] if text else calls)
    call_id = message.tool_call_id if isinstance(message, ToolMessage) else None
    return _Turn(role, text, message.name if role in _NAMED_ROLES else None, call_id)


def _tool_call(name: str | None, arguments: Any) -> str:
    """A tool call in the form that most open models were trained on (Hermes)."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _text(message: BaseMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    texts = []
    for block in message.content:
        if isinstance(block, str):
            texts.append(block)
        elif block.get("type") == "text":
            texts.append(str(block.get("text", "")))
        elif not (isinstance(message, AIMessage) and block.get("type") in _CALL_BLOCKS):
            raise ValueError(
                f"a content block of type {block.get('type')!r} in a {type(message).__name__}: "
                "the model reads text only"
            )
    return "".join(texts)


_EVENT_KEYS = {"role", "text", "content", "name", "call_id", "tool_call_id"}


def _event(event: Mapping[str, Any]) -> _Turn:
    """An event such as ``{"role": "observation", "name": "pager", "text": "disk full"}``."""
    unknown = event.keys() - _EVENT_KEYS
    if unknown or event.get("role") not in ROLES or ("text" in event) == ("content" in event):
        raise ValueError(
            f"an event needs 'role' ({', '.join(ROLES)}) and 'text' or 'content', and may have 'name' and 'call_id'; "
            f"got {dict(event)!r:.200}"
        )
    text = event["text"] if "text" in event else event["content"]
    if not isinstance(text, str):
        raise ValueError(f"an event's text must be a string, not {type(text).__name__}")
    return _Turn(event["role"], text, event.get("name"), event.get("call_id", event.get("tool_call_id")))


def _events(given: SessionInput) -> list[_Turn]:
    if isinstance(given, str):
        return [_Turn("user", given)]
    if isinstance(given, BaseMessage):
        return [_turn(given)]
    if isinstance(given, PromptValue):
        return [_turn(message) for message in given.to_messages()]
    if isinstance(given, Mapping):
        return [_event(given)]
    if isinstance(given, Sequence):
        return [turn for item in given for turn in _events(item)]
    raise ValueError(f"an event must be a string, a message, a mapping or a list of these, not {type(given).__name__}")


_BEGINNING = b""


def _chain(turns: Sequence[_Turn]) -> list[bytes]:
    """The digests of all beginnings of a history: entry n stands for its first n messages."""
    chain = [_BEGINNING]
    for turn in turns:
        chain.append(_link(chain[-1], turn))
    return chain


def _link(before: bytes, turn: _Turn | Message) -> bytes:
    name = turn.name if turn.role in _NAMED_ROLES else None
    return hashlib.sha256(before + json.dumps([turn.role, turn.text, name, turn.call_id]).encode()).digest()


# -- which session -----------------------------------------------------------------------------------------------------


class _CallLock:
    """Held by the call that works on a session; other calls queue."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()  # not re-entrant, and a generator may be closed by another thread
        self._owner: int | None = None

    @property
    def held(self) -> bool:
        return self._lock.locked()

    @property
    def held_here(self) -> bool:
        """Held by this thread, which would wait for itself."""
        return self._owner == threading.get_ident()

    def take_if_free(self) -> bool:
        taken = self._lock.acquire(blocking=False)
        if taken:
            self._owner = threading.get_ident()
        return taken

    def take(self, cancelled: CancelCheck) -> None:
        while not self.take_if_free():
            if self.held_here:
                raise SessionBusy(
                    f'session "{self.name}": this thread still has a stream open on it; finish or close it first'
                )
            if cancelled():
                raise Cancelled(f'session "{self.name}": stopped while waiting for another call')
            time.sleep(0.01)

    def release(self) -> None:
        self._owner = None
        self._lock.release()


class _Desk:
    """Knows which sessions of a runtime are in use by calls, and what their histories are.

    One per runtime, so that all who share a runtime queue for its sessions.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._locks: dict[str, _CallLock] = {}
        self._digests: dict[str, tuple[int, bytes]] = {}  # session id -> generation, digest of the history in it

    @contextmanager
    def by_name(self, runtime: AgentRuntime, name: str, cancelled: CancelCheck) -> Iterator[Session]:
        """The session of that name, for one call."""
        lock = self._lock_of(name)
        lock.take(cancelled)
        try:
            yield _settled(runtime, name)
        finally:
            lock.release()

    @contextmanager
    def by_history(
        self, runtime: AgentRuntime, base: str, chain: Sequence[bytes], cancelled: CancelCheck
    ) -> Iterator[Session]:
        """For one call, the session of the family ``base`` whose history is the longest beginning of ``chain``."""
        others: set[str] = set()
        while True:
            with self._mutex:
                lock = self._lock_of(self._choose(runtime, base, chain, others))
                taken = lock.take_if_free()
            if not taken:
                lock.take(cancelled)
            try:
                session = _settled(runtime, lock.name)
                # The call that was waited for may have gone on with it, or the catalogue be behind.
                count = session.message_count
                digest = self._digest(session.store.id, session.store.generation, session.messages)
                if count < len(chain) and digest == chain[count]:
                    yield session
                    return
                others.add(lock.name)  # histories only grow: it will not be ours again
            finally:
                lock.release()

    def remember(self, session: Session, digest: bytes) -> None:
        """Note the digest of a session just committed, which saves reading all of it."""
        with self._mutex:
            self._digests[session.store.id] = (session.store.generation, digest)

    def _lock_of(self, name: str) -> _CallLock:
        with self._mutex:
            return self._locks.setdefault(name, _CallLock(name))

    def _choose(self, runtime: AgentRuntime, base: str, chain: Sequence[bytes], others: set[str]) -> str:
        """The name of the session to go on with, or of one to make; none of ``others``."""
        branch = re.compile(re.escape(base) + r"(\.b[1-9][0-9]*)?")
        family = {info.name: info for info in runtime.sessions() if branch.fullmatch(info.name)}
        best, longest = None, -1
        for name, info in family.items():
            lock = self._lock_of(name)
            if lock.held and (info.messages == 0 or lock.held_here):
                continue  # a history that another call has just begun will not be ours
            if name in others or not longest < info.messages < len(chain):
                continue

            def stored(name: str = name, count: int = info.messages) -> list[Message]:
                with SessionStore.open(runtime.root, name, readonly=True) as store:
                    return store.messages(0, count)

            if self._digest(info.id, info.generation, stored) == chain[info.messages]:
                best, longest = name, info.messages
        number = 1
        while best is None:
            name = base if number == 1 else f"{base}.b{number}"
            if name not in family and name not in others and not self._lock_of(name).held:
                best = name
            number += 1
        return best

    def _digest(self, id: str, generation: int, read: Callable[[], Sequence[Message]]) -> bytes:
        with self._mutex:
            known = self._digests.get(id)
            if known is None or known[0] != generation:
                digest = _BEGINNING
                for message in read():
                    digest = _link(digest, message)
                known = self._digests[id] = (generation, digest)
            return known[1]


def _settled(runtime: AgentRuntime, name: str) -> Session:
    """The session, with what others appended to it committed: a failing call takes back its own part only."""
    session = runtime.session(name)
    session.commit()
    return session


@contextmanager
def _all_or_nothing(session: Session, cancelled: CancelCheck) -> Iterator[None]:
    """Commit what the block did to the session, or, if it fails, take it back."""
    others = session.cancelled
    session.cancelled = lambda: cancelled() or others()
    try:
        yield
        session.commit()
    except BaseException:
        session.rollback()
        raise
    finally:
        session.cancelled = others


_desks: WeakKeyDictionary[AgentRuntime, _Desk] = WeakKeyDictionary()
_runtimes: WeakValueDictionary[tuple[str, ...], AgentRuntime] = WeakValueDictionary()
_desks_mutex, _opening = threading.Lock(), threading.Lock()  # opening takes long: it loads the model


def _desk(runtime: AgentRuntime) -> _Desk:
    with _desks_mutex:
        return _desks.setdefault(runtime, _Desk())


# -- threads -----------------------------------------------------------------------------------------------------------


async def _from_thread(produce: Callable[[CancelCheck], Iterator[T]]) -> AsyncGenerator[T, None]:
    """What ``produce`` yields in a thread of its own.

    Closed early, or cancelled, it tells ``produce`` to stop and waits until it has.
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[tuple[T] | None] = asyncio.Queue()  # None: the end
    left = threading.Event()
    failure: BaseException | None = None

    def hand_over(item: tuple[T] | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody waits any more
            left.set()

    def work() -> None:
        nonlocal failure
        try:
            for item in produce(left.is_set):
                hand_over((item,))
        except BaseException as error:
            failure = error
        hand_over(None)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), name="infllm-agent-reply").start()
    item: tuple[T] | None = None
    ended = False
    try:
        while (item := await arrived.get()) is not None:
            yield item[0]
        ended = True
    finally:
        left.set()
        while not ended:
            ended = await arrived.get() is None
    if failure is not None:
        raise failure


# -- the chat model ----------------------------------------------------------------------------------------------------

_NO_TOOLS = (
    "ChatInfLLM does not call tools or follow schemas yet: describe the tools and the form of the answer in the "
    "system message, and parse the text of the answer"
)
_TOOL_ARGUMENTS = ("tools", "tool_choice", "functions", "function_call", "response_format")
#: What hosted models take and a local one has no use for: dropped, so that models can be exchanged.
_HOSTED_ONLY = ("api_key", "base_url", "max_retries")
#: Fields that a runtime already decided.
_OF_RUNTIME = ("model", "root", "memory", "device", "dtype")


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
        turns = enumerate(map(_turn, messages))
        count = sum(len(chat.render(turn.role, turn.text, name=turn.name, first=n == 0)) for n, turn in turns)
        return count + len(chat.generation_prompt(first=not messages))

    def bind_tools(self, tools: Sequence[Any], *, tool_choice: str | None = None, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_TOOLS)

    def with_structured_output(self, schema: Any, *, include_raw: bool = False, **kwargs: Any) -> Any:
        raise NotImplementedError(_NO_TOOLS)

    # The config's ``configurable`` never reaches ``_generate`` by itself.

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **_with_session_id(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **_with_session_id(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **_with_session_id(config, kwargs))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, stop=stop, **_with_session_id(config, kwargs))

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
        return generate_from_stream(self._continue(messages, stop, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        async with aclosing(_from_thread(partial(self._continue, messages, stop, kwargs))) as chunks:
            return await agenerate_from_stream(chunks)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._continue(messages, stop, kwargs):
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
        async with aclosing(_from_thread(partial(self._continue, messages, stop, kwargs))) as chunks:
            async for chunk in chunks:
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    # -- how -----------------------------------------------------------------------------------------------------------

    def _continue(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: dict[str, Any],
        cancelled: CancelCheck = _never,
    ) -> Iterator[ChatGenerationChunk]:
        """Answer a whole history, in the session that holds most of it."""
        if not messages:
            raise ValueError("the list of messages is empty: give at least one message to answer")
        options = dict(options)
        base = options.pop("session_id", None) or self.session_id or self._own_id
        sampling = self._sampling(stop, options)
        runtime = self._runtime()
        turns = [turn._replace(text=runtime.chat.encoder.clean(turn.text)) for turn in map(_turn, messages)]
        chain = _chain(turns)
        desk = _desk(runtime)
        with self._time_limit(cancelled) as stopped:
            with desk.by_history(runtime, check_name(base), chain, stopped) as session:
                yield from self._answer(session, turns[session.message_count :], sampling, stopped)
                assert session.last_reply is not None
                desk.remember(session, _link(chain[-1], session.last_reply.message))

    def _take_in(
        self,
        turns: Sequence[_Turn],
        session_id: str | None,
        reply: bool,
        stop: list[str] | None,
        options: dict[str, Any],
        cancelled: CancelCheck = _never,
    ) -> Iterator[ChatGenerationChunk]:
        """Append to a session as it stands, and answer if ``reply``."""
        name = session_id or self.session_id
        if not name:
            raise ValueError(
                "which session? give SessionRunnable a session_id, or put session_id or thread_id "
                "into the config's configurable"
            )
        sampling = self._sampling(stop, options)
        runtime = self._runtime()
        with self._time_limit(cancelled) as stopped:
            with _desk(runtime).by_name(runtime, name, stopped) as session:
                if reply:
                    yield from self._answer(session, turns, sampling, stopped)
                else:
                    with _all_or_nothing(session, stopped):
                        _append(session, turns)
                    yield _last_chunk(self.model, session)

    def _answer(
        self, session: Session, turns: Sequence[_Turn], sampling: SamplingConfig, cancelled: CancelCheck
    ) -> Iterator[ChatGenerationChunk]:
        """Append messages and answer: pieces of text, then a chunk without text that says what it took."""
        kept = session.memory.length
        with _all_or_nothing(session, cancelled):
            _append(session, turns)
            with closing(cast(Generator[str], session.stream_reply(**sampling.model_dump()))) as pieces:
                for piece in pieces:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
            reply = session.last_reply
            assert reply is not None
            if reply.finish_reason == "cancelled":
                raise Cancelled(f'session "{session.name}": stopped while answering')
        usage = UsageMetadata(
            input_tokens=reply.usage.input_tokens,
            output_tokens=reply.usage.output_tokens,
            total_tokens=reply.usage.input_tokens + reply.usage.output_tokens,
            input_token_details=InputTokenDetails(
                cache_read=kept,
                # More than the reply's own count: what was appended may have gone through the model already then.
                cache_creation=reply.usage.input_tokens - kept,
            ),
        )
        yield _last_chunk(self.model, session, finish_reason=reply.finish_reason, usage=usage)

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

    @contextmanager
    def _time_limit(self, cancelled: CancelCheck) -> Iterator[CancelCheck]:
        """A check that also says yes when the time is up, which then is a TimeoutError."""
        end = None if self.timeout is None else time.monotonic() + self.timeout

        def is_over() -> bool:
            return end is not None and time.monotonic() > end

        try:
            yield lambda: cancelled() or is_over()
        except Cancelled as error:
            if is_over() and not cancelled():
                raise TimeoutError(f"no answer within timeout={self.timeout} s ({error})") from None
            raise

    def _runtime(self) -> AgentRuntime:
        if self.runtime is not None:
            return self.runtime
        with _opening:
            if self._opened is None:
                memory = self.memory.model_dump_json() if self.memory else ""
                key = (os.path.realpath(self.root), self.model, memory, self.device, self.dtype)
                runtime = _runtimes.get(key)
                if runtime is None:
                    runtime = _runtimes[key] = AgentRuntime.open(
                        self.root, self.model, self.memory, device=self.device, dtype=self.dtype
                    )
                self._opened = runtime
            return self._opened


def _append(session: Session, turns: Sequence[_Turn]) -> None:
    for turn in turns:
        session.append(turn.role, turn.text, name=turn.name, call_id=turn.call_id)


def _last_chunk(
    model: str, session: Session, *, finish_reason: str | None = None, usage: UsageMetadata | None = None
) -> ChatGenerationChunk:
    info = {"finish_reason": finish_reason} if finish_reason else {}
    metadata = {"model_name": model, "session_id": session.name}
    message = AIMessageChunk(content="", usage_metadata=usage, response_metadata=metadata | info, chunk_position="last")
    return ChatGenerationChunk(message=message, generation_info=info)


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


# -- the runnable ------------------------------------------------------------------------------------------------------


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
        return _message_of(generate_from_stream(self._chunks(input, config, kwargs)))

    async def _ainvoke(
        self, input: SessionInput, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig, **kwargs: Any
    ) -> AIMessage:
        async with aclosing(_from_thread(partial(self._chunks, input, config, kwargs))) as chunks:
            return _message_of(await agenerate_from_stream(chunks))

    def _stream_all(
        self,
        inputs: Iterator[SessionInput],
        run_manager: CallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> Iterator[AIMessage]:
        for input in inputs:
            for chunk in self._chunks(input, config, kwargs):
                yield cast(AIMessage, chunk.message)

    async def _astream_all(
        self,
        inputs: AsyncIterator[SessionInput],
        run_manager: AsyncCallbackManagerForChainRun,
        config: RunnableConfig,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessage]:
        async for input in inputs:
            async with aclosing(_from_thread(partial(self._chunks, input, config, kwargs))) as chunks:
                async for chunk in chunks:
                    yield cast(AIMessage, chunk.message)

    def _chunks(
        self, input: SessionInput, config: RunnableConfig, options: dict[str, Any], cancelled: CancelCheck = _never
    ) -> Iterator[ChatGenerationChunk]:
        options = _with_session_id(config, options)
        session_id = options.pop("session_id", None) or self.session_id
        reply = options.pop("reply", self.reply)
        stop = options.pop("stop", None)
        return self.llm._take_in(_events(input), session_id, reply, stop, options, cancelled)


def _message_of(result: ChatResult) -> AIMessage:
    return cast(AIMessage, result.generations[0].message)
