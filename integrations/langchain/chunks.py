"""What a call gives, as LangChain's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGenerationChunk

from infllm_agent import errors
from infllm_agent.reply import Usage
from infllm_agent.routing.events import Called, Events, Finished, Piece
from infllm_agent.tools import ToolCall, dumps


class SessionFull(errors.SessionFull, ContextOverflowError):
    """An error of the same name, which frameworks know as one of LangChain's."""


def chunks_of(events: Events) -> Iterator[ChatGenerationChunk]:
    """Make the chunks of an answer: pieces of text, calls of tools, then an empty one that says what it took.

    Raises:
        SessionFull: LangChain's form of that error.
    """
    calls = 0
    try:
        with closing(events):
            for event in events:
                if isinstance(event, Piece):
                    yield ChatGenerationChunk(message=AIMessageChunk(content=event.text))
                elif isinstance(event, Called):
                    calls += 1  # 0 is the text's, where content is made of blocks
                    yield _call_chunk(event.call, calls)
                else:
                    yield _last_chunk(event)
    except errors.SessionFull as error:
        raise SessionFull(str(error)) from error


def _call_chunk(call: ToolCall, index: int) -> ChatGenerationChunk:
    chunk = tool_call_chunk(name=call.name, args=dumps(call.arguments), id=call.id, index=index)
    return ChatGenerationChunk(message=AIMessageChunk(content="", tool_call_chunks=[chunk]))


def _last_chunk(event: Finished) -> ChatGenerationChunk:
    info = {"finish_reason": event.finish_reason} if event.finish_reason else {}
    metadata = {"model_name": event.model_name, "model_provider": "infllm", "session_id": event.session_id}
    message = AIMessageChunk(
        content="",
        usage_metadata=_usage(event.usage) if event.usage else None,
        response_metadata=metadata | info,
        chunk_position="last",
    )
    return ChatGenerationChunk(message=message, generation_info=info)


def _usage(usage: Usage) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        total_tokens=usage.input_tokens + usage.output_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.reused_tokens, cache_creation=usage.prefilled_tokens),
    )
