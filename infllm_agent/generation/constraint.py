"""Constrained decoding: which tokens may come next, and the way to the end.

A reply has a limit of tokens, and a small model may never close its string. So the shortest way to a complete answer
that was found is kept beside the grammar's state: mostly what was found before still fits, which is one cheap question;
else it is looked for anew by closing whatever is open. A picked token after which that way would not fit into what is
left is not taken; the first token of the way is. A forced answer is thus complete within its limit whenever the limit
allows the shortest answer found at the start; if it does not, the answer is cut and said to be.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from infllm_agent.chat.encoder import TextEncoder
from infllm_agent.errors import InfLLMError, UnsupportedModel
from infllm_agent.platform.compute import compute_thread

#: Most tokens of a shortest way that is looked for.
_LONGEST_WAY = 2048

# Looking for the end, these are tried in turn: in a string, behind a quotation mark, and elsewhere. What was used
# already comes after what was not, so that a pattern that wants an @ gets one.
_IN_STRING = "@.:/#T0123456789-abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSUVWXYZ_+ ,;=?!$%&*()[]{}<>|^`'~\\"
_ELSEWHERE = '0123456789"ntf-.[{,: eE+'


class Vocabulary:
    """One model's vocabulary as constraints use it. Safe to share between threads."""

    def __init__(self, encoder: TextEncoder, stop_ids: frozenset[int]) -> None:
        self.encoder = encoder
        self.stop_ids = stop_ids
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        letters = set(_IN_STRING + _ELSEWHERE + '}]"')
        #: Characters that are a token by themselves.
        self.letters = {text: ids[0] for text in letters if len(ids := encoder.encode_text(text)) == 1}

    @property
    def tokenizer(self) -> LLTokenizer:
        """The vocabulary in the library's form. Raises UnsupportedModel for a kind of tokenizer that the library
        lacks."""
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

    def forced_tokens(self, matcher: LLMatcher) -> list[int]:
        """Find the tokens that must come next, perhaps not all of them.

        Where a forced text spells a control token, the library names that token, here and in its mask, and would not
        accept it.
        """
        tokens = matcher.compute_ff_tokens()
        if tokens and not (good := matcher.validate_tokens(tokens)):
            tokens = self.encoder.encode_text(matcher.compute_ff_bytes().decode("utf-8", "ignore"))[:-1]
            good = matcher.validate_tokens(tokens)
        return tokens[:good] if tokens else []


class Constraint:
    """What holds for one reply: ``mask`` the logits, pick, and ``advance``, until ``complete``.

    ``optional``: the reply is free text with structure in it, perhaps; so it need not be completed, but what was
    opened is closed.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, *, optional: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self.optional = optional
        self._stop = min(vocabulary.stop_ids)
        self._ended = False
        self._way: list[int] | None = self._find_way(matcher)
        self._look_again = 0

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop token may follow, or one has come."""
        return self._ended or bool(self._matcher.is_stopped())

    @property
    def finished(self) -> bool:
        """Whether the answer may end here: what is there is whole."""
        return self._ended or bool(self._matcher.is_accepting())

    @property
    def free(self) -> bool:
        """Whether what comes next is free text, no part of a call or a schema."""
        return self.optional and bool(self._matcher.is_accepting())

    def start_with(self, prefix: Sequence[int]) -> bool:
        """Take tokens that stand there already; False if the answer cannot begin so."""
        if self._matcher.validate_tokens(list(prefix)) < len(prefix):
            return False
        self._matcher.consume_tokens(list(prefix))
        self._way = self._find_way(self._matcher)
        return True

    def begin(self, left: int) -> list[int]:
        """Take the tokens, at most ``left``, that the answer must begin with: none needs to be picked."""
        return self._forced(left)

    def mask(self, logits: Tensor) -> Tensor:
        """Copy the logits (vocab,), with minus infinity for every token that is not allowed."""
        return compute_thread().run(lambda: self._masked(logits))

    def _masked(self, logits: Tensor) -> Tensor:
        allowed = _allowed(self._matcher)[: len(logits)]
        self._check()
        refused = torch.ones(len(logits), dtype=torch.bool)  # also what a model has beyond its vocabulary
        refused[: len(allowed)] = ~allowed
        return logits.masked_fill(refused.to(logits.device), -torch.inf)

    def advance(self, token: int, left: int) -> list[int]:
        """Take an allowed token that was picked, when ``left`` tokens may come, it included; returns what comes.

        Mostly the token and those that are forced after it; the one that leads to the end, if too few are left for
        the token picked; none, if the answer ends before it.
        """
        if token in self._vocabulary.stop_ids:
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
            more = self._vocabulary.forced_tokens(self._matcher)[: left - len(tokens)]
            if not more:
                break
            self._matcher.consume_tokens(more)
            tokens += more
        self._check()
        if tokens:
            self._way = self._rest_of_way(self._matcher, tokens)
        return tokens

    def _way_after(self, matcher: LLMatcher, token: int, left: int) -> list[int] | None:
        """Find the shortest way to a complete answer from a state one token further on."""
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
        """Close what is open, as soon as can be; None if that does not lead to an end."""
        matcher = matcher.deep_copy()
        way: list[int] = []
        used: Counter[str] = Counter()
        while len(way) < _LONGEST_WAY:
            if matcher.is_accepting():
                return way
            tokens = self._vocabulary.forced_tokens(matcher) or self._closing_token(matcher, used)
            if not tokens or not matcher.consume_tokens(tokens):
                return None
            way += tokens
        return None

    def _closing_token(self, matcher: LLMatcher, used: Counter[str]) -> list[int]:
        letters = self._vocabulary.letters

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
    """Give one bool for each token of the vocabulary."""
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    return (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).bool().flatten()
