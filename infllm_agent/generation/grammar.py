"""Constrained decoding: the grammars of answers under a schema, or with calls of tools.

The grammars are llguidance's. Of 21 kinds of schemas (nested, enums, anyOf and oneOf, recursion, unicode keys, formats,
bounds, lengths, patterns, ...) it held a writer to all; xgrammar 0.2.8 to 18 (not patternProperties, allOf, const), and
outlines-core 0.2.14 to 13. What it cannot hold to, it refuses. For a vocabulary of 49,000 (152,000) tokens a grammar
took 0.9 (1.1) ms at the median and 13 ms at most; xgrammar's 4 (1) and 127 ms, outlines-core's 44 (236) ms and 27 s. A
mask took 0.01 (0.03) ms, xgrammar's less still; both are nothing beside a forward. It brings no dependencies, xgrammar
brings apache-tvm-ffi and triton. And it has forced tokens, lazy markers and states that are copied in a microsecond.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher

from infllm_agent.chat.format import ChatFormat
from infllm_agent.errors import ConfigError
from infllm_agent.generation.call_grammar import CallGrammar
from infllm_agent.generation.constraint import Constraint, Vocabulary
from infllm_agent.generation.json_schema import grammar_of
from infllm_agent.tools import ToolSpec

#: Compiled grammars kept for the next reply.
_KEPT = 32


class Grammars:
    """Makes constraints for one model's vocabulary and form of calls; what is costly is made once. Safe to share
    between threads."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self._vocabulary = Vocabulary(chat.encoder, chat.stop_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def schema(self, schema: Any) -> Constraint:
        """Constrain an answer to JSON, valid under the schema. Raises UnsupportedSchema."""
        return self._constraint(f"start: {self._json(schema, 'the schema')}")

    def calls(self, tools: Sequence[ToolSpec], choice: str, *, parallel: bool = True) -> Constraint:
        """Constrain an answer to calls of tools in the model's own form.

        Args:
            choice: ``any``: calls and nothing else; ``auto``: text in which calls may be opened, and no text that only
                looks like one; ``none``: text, in which none can be opened; or the name of the tool to be called.
            parallel: whether there may be several.

        Raises UnsupportedSchema for parameters, ConfigError for a choice that is no tool's name.
        """
        if choice not in ("any", "auto", "none"):
            tools = [tool for tool in tools if tool.name == choice]
        if not tools:
            raise ConfigError(f'tool_choice "{choice}": no such tool; use auto, none, any, or the name of a tool given')
        writer = CallGrammar(self.chat, parallel=parallel)
        if choice == "none":
            return self._constraint(writer.text_only(), optional=True)
        if choice == "auto":
            return self._constraint(writer.voluntary(self._functions(tools)), optional=True)
        return self._constraint(writer.forced(self._functions(tools)))

    def calls_or_schema(self, tools: Sequence[ToolSpec], schema: Any, *, parallel: bool = True) -> Constraint:
        """Constrain an answer to calls of tools, or to JSON, valid under the schema. Raises UnsupportedSchema."""
        writer = CallGrammar(self.chat, parallel=parallel)
        return self._constraint(writer.forced(self._functions(tools), instead=self._json(schema, "the schema")))

    def _functions(self, tools: Sequence[ToolSpec]) -> list[tuple[str, str]]:
        """List names, and the grammars of their arguments."""
        return [(tool.name, self._json(tool.parameters, f'tool "{tool.name}": its parameters')) for tool in tools]

    def error_of(self, grammar: str) -> str:
        """Tell what is wrong with a grammar; "" if nothing is."""
        matcher = self._compile(grammar)
        return str(matcher.get_error()) if matcher.is_error() else ""

    def _json(self, schema: Any, what: str) -> str:
        return grammar_of(schema, what, self.error_of)

    def _constraint(self, grammar: str, *, optional: bool = False) -> Constraint:
        matcher = self._compile(grammar)
        if matcher.is_error():
            raise ConfigError(f"the grammar of the answer cannot be used: {matcher.get_error().splitlines()[0]}")
        return Constraint(self._vocabulary, matcher.deep_copy(), optional=optional)

    def _compile(self, grammar: str) -> LLMatcher:
        tokenizer = self._vocabulary.tokenizer
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
            if matcher is None:
                matcher = LLMatcher(tokenizer, grammar, log_level=0)
            self._compiled[grammar] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return matcher
