"""``with_structured_output``: three ways to ask for an object, and the parser that makes it one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from operator import itemgetter
from typing import Any, Literal

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableMap, RunnablePassthrough
from langchain_core.utils.pydantic import is_basemodel_subclass

from infllm_agent.integrations.langchain.tools import json_schema, openai_tool

Method = Literal["json_schema", "function_calling", "json_mode"]


def structured(
    llm: BaseChatModel, schema: Any, *, method: Method, include_raw: bool, strict: bool | None, **kwargs: Any
) -> Runnable[Any, Any]:
    """Make a runnable that answers with an instance of ``schema``, if it is a pydantic class, else with a dict.

    In all three the grammar holds the answer to the schema; they differ in what the model is told.

    Args:
        method: ``json_schema``: the schema's keys appear in the answer, the history is left as it is.
            ``function_calling``: the schema is announced as a tool, with its descriptions. ``json_mode``: as
            ``json_schema``, and ``schema`` may be None: any object.

    Raises:
        ValueError: an invalid schema or method.
    """
    if method not in ("json_schema", "function_calling", "json_mode"):
        raise ValueError(f"invalid method {method!r}: use json_schema, function_calling or json_mode")
    if schema is None and method != "json_mode":
        raise ValueError(f"method {method} needs a schema: a pydantic class, a TypedDict, or a JSON schema")
    is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
    parser: BaseOutputParser[Any] | Runnable[Any, Any]
    if method == "function_calling":
        tool = openai_tool(schema, strict=strict)
        name = tool["function"]["name"]
        bound = llm.bind_tools(
            [schema],
            tool_choice=name,
            parallel_tool_calls=False,
            strict=strict,
            ls_structured_output_format={"kwargs": {"method": method, "strict": strict}, "schema": tool},
            **kwargs,
        )
        if is_class:
            parser = PydanticToolsParser(tools=[schema], first_tool_only=True)
        else:
            parser = JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)
    else:
        description = {"type": "object"} if schema is None else json_schema(schema)
        bound = llm.bind(
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": description}},
            ls_structured_output_format={"kwargs": {"method": method, "strict": strict}, "schema": description},
            **kwargs,
        )
        parser = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
    parser = RunnableGenerator(_whole, _awhole) | parser
    if not include_raw:
        return bound | parser
    # A parser that fails leaves the answer as it was, beside its error.
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _whole(chunks: Iterator[AIMessage]) -> Iterator[AIMessage]:
    for chunk in chunks:
        _refuse_cut(chunk)
        yield chunk


async def _awhole(chunks: AsyncIterator[AIMessage]) -> AsyncIterator[AIMessage]:
    async for chunk in chunks:
        _refuse_cut(chunk)
        yield chunk


def _refuse_cut(answer: AIMessage) -> None:
    """Refuse an answer that was cut: parsers would complete it, and make up what was never said."""
    if answer.response_metadata.get("finish_reason") == "length":
        raise OutputParserException("the answer does not fit into max_tokens: raise it", llm_output=answer.text)
