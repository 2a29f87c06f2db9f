"""Constrained decoding: which tokens may come next.

The grammars are llguidance's. Of 21 kinds of schemas (nested, enums, anyOf and oneOf, recursion, unicode keys, formats,
bounds, lengths, patterns, ...) it held a writer to all; xgrammar 0.2.8 to 18 (not patternProperties, allOf, const), and
outlines-core 0.2.14 to 13. What it cannot hold to, it refuses. For a vocabulary of 49,000 (152,000) tokens a grammar
took 0.9 (1.1) ms at the median and 13 ms at most; xgrammar's 4 (1) and 127 ms, outlines-core's 44 (236) ms and 27 s. A
mask took 0.01 (0.03) ms, xgrammar's less still; both are nothing beside a forward. It brings no dependencies, xgrammar
brings apache-tvm-ffi and triton. And it has forced tokens, lazy markers and states that are copied in a microsecond.

A reply has a limit of tokens, and a small model may never close its string. So the shortest way to a complete answer
that was found is kept beside the grammar's state: mostly what was found before still fits, which is one cheap question;
else it is looked for anew by closing whatever is open. A picked token after which that way would not fit into what is
left is not taken; the first token of the way is. A forced answer is thus complete within its limit whenever the limit
allows the shortest answer found at the start; if it does not, the answer is cut and said to be.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from infllm_agent.chat.call_reader import CallReader
from infllm_agent.chat.format import ChatFormat
from infllm_agent.chat.tool_format import CALL_ID, ID_HOLE, CallForm
from infllm_agent.errors import ConfigError, InfLLMError, UnsupportedModel
from infllm_agent.generation.json_schema import grammar_of
from infllm_agent.platform.compute import compute_thread
from infllm_agent.tools import ToolSpec, dumps

#: Most tokens of a shortest way that is looked for.
_LONGEST_WAY = 2048
#: Compiled grammars kept for the next reply.
_KEPT = 32

# Looking for the end, these are tried in turn: in a string, behind a quotation mark, and elsewhere. What was used
# already comes after what was not, so that a pattern that wants an @ gets one.
_IN_STRING = "@.:/#T0123456789-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSUVWXYZ_+ ,;=?!$%&*()[]{}<>|^`'~\\"
_ELSEWHERE = '0123456789"ntf-.[{,: eE+'


class Grammars:
    """Makes constraints for one model's vocabulary and form of calls; what is costly is made once. Safe to share
    between threads."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat
        self.encoder = encoder = chat.encoder
        self.stop_ids = chat.stop_ids
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        letters = set(_IN_STRING + _ELSEWHERE + '}]"')
        #: Characters that are a token by themselves.
        self.letters = {text: ids[0] for text in letters if len(ids := encoder.encode_text(text)) == 1}

    @property
    def tokenizer(self) -> LLTokenizer:
        """Raises UnsupportedModel for a tokenizer of a kind that the library does not know."""
        with self._lock:
            if self._tokenizer is None:
                try:
                    backend = type(self.encoder.backend).from_str(self.encoder.backend.to_str())
                    backend.no_padding()
                    backend.no_truncation()
                    self._tokenizer = LLTokenizer(backend.to_str(), eos_token=sorted(self.stop_ids))
                except Exception as error:  # the library raises what its parts raise
                    raise UnsupportedModel(
                        f"the model's tokenizer cannot be used for schemas and forced calls: {error}"
                    ) from error
            return self._tokenizer

    def schema(self, schema: Any) -> Constraint:
        """Text that is JSON, valid under the schema. Raises UnsupportedSchema."""
        return self._constraint(f"start: {self._json(schema, 'the schema')}")

    def calls(self, tools: Sequence[ToolSpec], choice: str, *, parallel: bool = True) -> Constraint:
        """Calls of tools in the model's own form.

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
        writer = _CallGrammar(self, self.chat.tools.form, self.chat.reader, parallel=parallel)
        if choice == "none":
            return self._constraint(writer.text_only(), optional=True)
        if choice == "auto":
            return self._constraint(writer.voluntary(self._functions(tools)), optional=True)
        return self._constraint(writer.forced(self._functions(tools)))

    def calls_or_schema(self, tools: Sequence[ToolSpec], schema: Any, *, parallel: bool = True) -> Constraint:
        """Calls of tools, or text that is JSON, valid under the schema. Raises UnsupportedSchema."""
        writer = _CallGrammar(self, self.chat.tools.form, self.chat.reader, parallel=parallel)
        return self._constraint(writer.forced(self._functions(tools), instead=self._json(schema, "the schema")))

    def _functions(self, tools: Sequence[ToolSpec]) -> list[tuple[str, str]]:
        """Names, and the grammars of their arguments."""
        return [(tool.name, self._json(tool.parameters, f'tool "{tool.name}": its parameters')) for tool in tools]

    def error_of(self, grammar: str) -> str:
        """What is wrong with a grammar, or ""."""
        matcher = self._compile(grammar)
        return str(matcher.get_error()) if matcher.is_error() else ""

    def forced_tokens(self, matcher: LLMatcher) -> list[int]:
        """The tokens that must come next, perhaps not all of them.

        Where a forced text spells a control token, the library names that token, here and in its mask, and would not
        accept it.
        """
        tokens = matcher.compute_ff_tokens()
        if tokens and not (good := matcher.validate_tokens(tokens)):
            tokens = self.encoder.encode_text(matcher.compute_ff_bytes().decode("utf-8", "ignore"))[:-1]
            good = matcher.validate_tokens(tokens)
        return tokens[:good] if tokens else []

    def _json(self, schema: Any, what: str) -> str:
        return grammar_of(schema, what, self.error_of)

    def _constraint(self, grammar: str, *, optional: bool = False) -> Constraint:
        matcher = self._compile(grammar)
        if matcher.is_error():
            raise ConfigError(f"the grammar of the answer cannot be used: {matcher.get_error().splitlines()[0]}")
        return Constraint(self, matcher.deep_copy(), optional=optional)

    def _compile(self, grammar: str) -> LLMatcher:
        tokenizer = self.tokenizer
        with self._lock:
            matcher = self._compiled.pop(grammar, None)
            if matcher is None:
                matcher = LLMatcher(tokenizer, grammar, log_level=0)
            self._compiled[grammar] = matcher
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
            return matcher


class Constraint:
    """What holds for one reply: ``mask`` the logits, pick, and ``advance``, until ``complete``.

    ``optional``: the reply is free text with structure in it, perhaps; so it need not be completed, but what was
    opened is closed.
    """

    def __init__(self, grammars: Grammars, matcher: LLMatcher, *, optional: bool) -> None:
        self._grammars = grammars
        self._matcher = matcher
        self.optional = optional
        self._stop = min(grammars.stop_ids)
        self._ended = False
        self._way: list[int] | None = self._find_way(matcher)
        self._look_again = 0

    @property
    def complete(self) -> bool:
        """Nothing may follow but a stop token, or one has come."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def finished(self) -> bool:
        """The answer may end here: what is there is whole."""
        return self._ended or bool(self._matcher.is_accepting())

    @property
    def free(self) -> bool:
        """What comes next is free text, no part of a call or a schema."""
        return self.optional and bool(self._matcher.is_accepting())

    def start_with(self, prefix: Sequence[int]) -> bool:
        """Take tokens that stand there already; False if the answer cannot begin so."""
        if self._matcher.validate_tokens(list(prefix)) < len(prefix):
            return False
        self._matcher.consume_tokens(list(prefix))
        self._way = self._find_way(self._matcher)
        return True

    def begin(self, left: int) -> list[int]:
        """The tokens, at most ``left``, that the answer must begin with: none needs to be picked."""
        return self._forced(left)

    def mask(self, logits: Tensor) -> Tensor:
        """A copy of the logits (vocab,) with minus infinity for every token that is not allowed."""
        return compute_thread().run(lambda: self._masked(logits))

    def _masked(self, logits: Tensor) -> Tensor:
        allowed = _allowed(self._matcher)[: len(logits)]
        self._check()
        refused = torch.ones(len(logits), dtype=torch.bool)  # also what a model has beyond its vocabulary
        refused[: len(allowed)] = ~allowed
        return logits.masked_fill(refused.to(logits.device), -torch.inf)

    def advance(self, token: int, left: int) -> list[int]:
        """What follows from the pick of an allowed token, when ``left`` tokens may come, it included.

        Mostly the token and those that are forced after it; the one that leads to the end, if too few are left for
        the token picked; none, if the answer ends before it.
        """
        if token in self._grammars.stop_ids:
            self._ended = True
            return [token]
        trial = self._matcher.deep_copy()
        trial.consume_token(token)
        if trial.is_error():
            raise InfLLMError(f"the grammar failed: {trial.get_error().splitlines()[0]}")
        way = self._way_after(trial, token, left - 1)
        known = self._way is not None and len(self._way) <= left and not self.free
        if known and (len(way) > left - 1 if way is not None else left < 4 * len(self._way or ()) + 64):
            assert self._way is not None
            if not self._way:
                self._ended = True
                return []
            token, way = self._way[0], self._way[1:]
            trial = self._matcher.deep_copy()
            trial.consume_token(token)
        self._matcher, self._way = trial, way
        return [token, *self._forced(left - 1)]

    def _forced(self, left: int) -> list[int]:
        tokens: list[int] = []
        while left > len(tokens) and not self.complete:
            more = self._grammars.forced_tokens(self._matcher)[: left - len(tokens)]
            if not more:
                break
            self._matcher.consume_tokens(more)
            tokens += more
        self._check()
        if tokens:
            self._way = self._rest_of_way(self._matcher, tokens)
        return tokens

    def _way_after(self, matcher: LLMatcher, token: int, left: int) -> list[int] | None:
        """The shortest way found to a complete answer from a state one token further on."""
        if self._way is None and left > self._look_again:
            return None
        way = self._rest_of_way(matcher, [token])
        self._look_again = left // 2 if way is None else 0
        return way

    def _rest_of_way(self, matcher: LLMatcher, taken: list[int]) -> list[int] | None:
        if self._way is not None:
            ways = [self._way]
            if self._way[: len(taken)] == taken:
                ways.insert(0, self._way[len(taken) :])
            for way in ways:
                if matcher.validate_tokens([*way, self._stop]) == len(way) + 1:
                    return way
        return self._find_way(matcher)

    def _find_way(self, matcher: LLMatcher) -> list[int] | None:
        """Close what is open, as soon as can be. None if that does not lead to an end."""
        matcher = matcher.deep_copy()
        way: list[int] = []
        used: Counter[str] = Counter()
        while len(way) < _LONGEST_WAY:
            if matcher.is_accepting():
                return way
            tokens = self._grammars.forced_tokens(matcher) or self._closing_token(matcher, used)
            if not tokens or not matcher.consume_tokens(tokens):
                return None
            way += tokens
        return None

    def _closing_token(self, matcher: LLMatcher, used: Counter[str]) -> list[int]:
        letters = self._grammars.letters

        def allowed(letter: str) -> bool:
            return letter in letters and matcher.validate_tokens([letters[letter]]) == 1

        in_string = allowed("~") or not (allowed("}") or allowed("]"))
        first, others = ('"', _IN_STRING) if in_string else ("}]", _ELSEWHERE)
        others = others if allowed("~") else others + _ELSEWHERE
        for letter in [*first, *sorted(others, key=lambda letter: (letter in "[{", used[letter]))]:
            if allowed(letter):
                used[letter] += 1
                if letter == '"':
                    used.clear()
                return [letters[letter]]
        return [int(token) for token in _allowed(matcher).nonzero()[:1, 0]]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InfLLMError(f"the grammar failed: {self._matcher.get_error().splitlines()[0]}")


def _allowed(matcher: LLMatcher) -> Tensor:
    """One bool for each token of the vocabulary."""
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).bool().flatten()


class _CallGrammar:
    """Lark grammars of answers with calls in one form."""

    def __init__(self, grammars: Grammars, form: CallForm, reader: CallReader, *, parallel: bool) -> None:
        self._encoder = grammars.encoder
        self._form, self._reader = form, reader
        self._parallel = parallel
        self._control = re.compile("|".join(map(re.escape, self._encoder.control_texts)) or "(?!)")
        # Further control tokens in free text, such as those of a think block, stay what they are.
        free = sorted(self._encoder.control_ids - grammars.stop_ids - reader.codes.keys())
        self._free = f"<[{_ranges(free)}]>" if free else ""
        # A form without a marker, or with one that is no token: the text itself tells.
        self._spelled = not form.opener or self._control.fullmatch(form.opener) is None

    def forced(self, functions: Sequence[tuple[str, str]], instead: str = "") -> str:
        """Calls, or what the expression ``instead`` describes."""
        form = self._form
        more = f"({self._text(form.between)} call)*" if self._parallel and form.between is not None else ""
        start = f"start: {self._text(form.alone)} call {more} {self._text(form.end)}"
        start += f" | {instead}" if instead else ""
        return "\n".join([start, self._call(functions)])

    def text_only(self) -> str:
        return "\n".join(["start: text", self._free_text()])

    def voluntary(self, functions: Sequence[tuple[str, str]]) -> str:
        form, opener = self._form, self._form.opener
        rest = form.alone.partition(opener)[2] if opener else form.alone
        block = f"{self._text(rest)} call {self._text(form.end)}"
        if form.closer or not opener:  # otherwise a block holds all calls, and nothing follows it
            many, after = "*" if self._parallel else "?", "text"
        else:
            more = f"({self._text(form.between)} call)*" if self._parallel and form.between is not None else ""
            block = f"{self._text(rest)} call {more} {self._text(form.end)}"
            many, after = "?", ""
        if not opener:
            tag = [f"<[{token}]>?" for token in self._reader.codes]
            lines = [f"start: text | {' '.join(tag)} {block}"]
        elif self._spelled:
            before = f"( FREE? {self._free} )*" if self._free else ""
            lines = [
                f"start: ( {before} opened {block} ){many} text",
                f"opened[lazy]: /(?s:.*){_regex(opener)}/",
                f"FREE: {self._without_opener()}",
            ]
        elif after:
            lines = [f"start: text ( {self._text(opener)} {block} text ){many}"]
        else:
            lines = [f"start: text ( {self._text(opener)} {block} )?"]
        return "\n".join([*lines, self._free_text(), self._call(functions)])

    def _call(self, functions: Sequence[tuple[str, str]]) -> str:
        middle = self._text(self._form.middle)
        names = (json.dumps(dumps(name)[1:-1] if self._form.quotes_name else name) for name, _ in functions)
        return "call: " + " | ".join(
            f"{name} {middle} {schema}" for name, (_, schema) in zip(names, functions, strict=True)
        )

    def _free_text(self) -> str:
        more = f"( {self._free} TEXT? )*" if self._free else ""
        return f"text: TEXT? {more}\nTEXT: {self._without_opener()}"

    def _without_opener(self) -> str:
        if not self._form.opener:
            return '/(?s:.+)/ & ~/\\s*\\{\\s*"name"(?s:.*)/'
        return f"/(?s:.+)/ & ~/(?s:.*){_regex(self._form.opener)}(?s:.*)/" if self._spelled else "/(?s:.+)/"

    def _text(self, control_text: str | None) -> str:
        """Control text as a sequence of tokens and literals."""
        items: list[str] = []
        place = 0
        text = control_text or ""
        for found in self._control.finditer(text):
            items += self._literals(text[place : found.start()])
            items += [f"<[{token}]>" for token in self._encoder.encode_control(found[0])]
            place = found.end()
        return " ".join([*items, *self._literals(text[place:])])

    def _literals(self, text: str) -> list[str]:
        holes = re.split(f"({ID_HOLE})", text)
        return [f"/{CALL_ID.pattern}/" if part == ID_HOLE else json.dumps(part) for part in holes if part]


def _regex(text: str) -> str:
    """The text as a regular expression between slashes."""
    return re.sub(r"[^A-Za-z0-9_ ]", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _ranges(ids: Sequence[int]) -> str:
    """Sorted ids as "3-10,12"."""
    ranges: list[list[int]] = []
    for token in ids:
        if ranges and ranges[-1][1] == token - 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
