"""∞-Bench's passkey and number: one number in repeated filler, a new context for every length and depth."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from infllm_agent.bench.retrieval.haystack import Count, Haystack, Question, Stretch
from infllm_agent.bench.retrieval.tasks.words import FILLER
from infllm_agent.errors import ConfigError

_HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
# Ends so that the small packaged model, with full attention, begins with a digit: "What is the pass key? The pass
# key is" leaves it undecided between the number and "a magical key ..." (0.37 against 0.73 for the first digit).
_QUESTION = "\nQuestion: which number is the pass key?\nAnswer: The pass key is"
#: A tokenizer may join the end of one sentence and the begin of the next: the filler's size is that of many.
_MANY = 64


@dataclass(frozen=True)
class Hidden:
    """A task of one question on each context; ``questions`` does not matter to it."""

    name: str
    about: str
    digits: int

    def draw(self, lengths: Sequence[int], contexts: int, questions: int, seed: int, count: Count) -> list[Haystack]:
        filler = count(f"{FILLER} " * _MANY)
        haystacks: list[Haystack] = []
        for tokens in sorted(set(lengths)):
            rng = random.Random(f"{self.name}/{tokens}/{seed}")
            haystacks += [
                self._haystack(tokens, number, (number + 0.5) / contexts, rng, count, filler)
                for number in range(contexts)
            ]
        return haystacks

    def _haystack(
        self, tokens: int, number: int, depth: float, rng: random.Random, count: Count, filler: int
    ) -> Haystack:
        key = str(rng.randint(10 ** (self.digits - 1), 10**self.digits - 1))
        needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
        answer_tokens = 2 * self.digits
        needed = count(_HEAD + needle) + count(_QUESTION) + answer_tokens + 1  # one for the fraction of the filler
        repeats = (tokens - needed) * _MANY // filler
        if repeats < 1:
            raise ConfigError(f"{tokens} tokens are too few for {self.name}: without filler it needs {needed}")
        before = round(depth * repeats)
        text = _HEAD + f"{FILLER} " * before + needle + f"{FILLER} " * (repeats - before)
        question = Question(_QUESTION, key, depth, answer_tokens)
        return Haystack(self.name, number, (Stretch(tokens, text.rstrip() + "\n", ((question,),)),))


PASSKEY = Hidden("passkey", "five digits in repeated filler (∞-Bench R.PassKey)", 5)
NUMBER = Hidden("number", "ten digits in repeated filler (∞-Bench R.Number)", 10)
