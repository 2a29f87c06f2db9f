"""Retrieval of text: the chunks that share the most words with the question (BM25), read with full attention.

What most people would build first. It may put as many tokens before the model as the memory attends to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from infllm_agent.bench.retrieval.haystack import Question
from infllm_agent.bench.retrieval.readers import FullContext, Reader, last
from infllm_agent.errors import ConfigError
from infllm_agent.model.local_model import LocalModel

#: Tokens of a chunk at most. Chunks end where a sentence or a line ends, if there is such a place.
CHUNK = 128
_SENTENCE = re.compile(r"[^\n]*?(?:[.!?](?=\s)|\n+|\Z)")


def bm25() -> Any:
    """The library that ranks.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise ConfigError('method rag needs bm25s: pip install "infllm-agent[bench]"') from None
    return bm25s


class RagReader(Reader):
    """Keeps the text's chunks; each question is put after the head of the text and the chunks most like it.

    Args:
        budget: tokens that the model sees at most: chunks, earlier turns, question and answer.
    """

    def __init__(self, model: LocalModel, budget: int) -> None:
        super().__init__(model)
        self.budget = budget
        self.chunks: list[list[int]] = []
        self._texts: list[str] = []
        self._index: Any = None

    def read(self, text: str) -> None:
        chunks = self._split(text)
        self.chunks += chunks
        self._texts += self.model.tokenizer.batch_decode(chunks)
        self._index = None

    def ask(self, questions: Sequence[Question]) -> list[str]:
        answers: list[str] = []
        earlier: list[int] = []
        for question in questions:
            ids = earlier + self.encode(question.text)
            room = self.budget - len(ids) - question.answer_tokens
            context = FullContext(self.model)
            self._take_in(context, self.retrieve(question.text, room))
            written, _ = self._answer(context, ids, question.answer_tokens)
            answers.append(self.model.tokenizer.decode(written))
            earlier = ids + written
        return answers

    def retrieve(self, query: str, room: int) -> list[int]:
        """The head and the best chunks that fit into ``room`` tokens, in the order of the text."""
        gap = self.encode("\n")
        if sum(map(len, self.chunks)) <= room:
            return [token for chunk in self.chunks for token in chunk]
        room -= len(self.chunks[0])
        taken = [0]
        for place in self._ranked(query):
            cost = len(self.chunks[place]) + len(gap)
            if place and cost <= room:
                taken.append(place)
                room -= cost
        taken.sort()
        ids = list(self.chunks[0])
        for before, place in pairwise(taken):
            ids += self.chunks[place] if place == before + 1 else gap + self.chunks[place]
        return last(ids, len(ids) + min(0, room))  # only a head longer than the room is cut

    def _ranked(self, query: str) -> list[int]:
        """The chunks' numbers, best first; among equals the latest first."""
        library = bm25()
        if self._index is None:
            self._index = library.BM25()
            self._index.index(_words(library, self._texts), show_progress=False)
        words = _words(library, [query])[0]
        scores = self._index.get_scores(words) if words else np.zeros(len(self.chunks))
        ranked: list[int] = np.lexsort((-np.arange(len(scores)), -scores)).tolist()
        return ranked

    def _split(self, text: str) -> list[list[int]]:
        """Sentences and lines, packed into chunks of at most ``CHUNK`` tokens; longer ones are cut."""
        sentences = [found for found in _SENTENCE.findall(text) if found]
        encoded: list[list[int]] = []
        if sentences:
            encoded = self.model.tokenizer(sentences, add_special_tokens=False).input_ids
        chunks: list[list[int]] = []
        chunk = self._encode_text("")  # what a text begins with
        for ids in encoded:
            for start in range(0, len(ids), CHUNK):
                piece = ids[start : start + CHUNK]
                if chunk and len(chunk) + len(piece) > CHUNK:
                    chunks.append(chunk)
                    chunk = []
                chunk = chunk + piece
        return [*chunks, chunk] if chunk else chunks


def _words(library: Any, texts: list[str]) -> list[list[str]]:
    """Lower-case words and numbers without the commonest English ones."""
    words: list[list[str]] = library.tokenize(
        texts, token_pattern=r"(?u)\b\w+\b", stopwords="en", return_ids=False, show_progress=False
    )
    return words
