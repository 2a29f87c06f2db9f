"""Which characters of a message's text a token stands for."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infllm_agent.messages import Message
from infllm_agent.model.packaged import PACKAGED
from infllm_agent.model.resolve import HUB_ID, default_cache_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Range = tuple[int, int]

#: What stands for bytes that are no text. The decoder waits for more at each of them, so that a run of them takes a
#: time that grows with its square: texts with more of them than this are not decoded.
REPLACEMENT, MAX_REPLACEMENTS = "\ufffd", 256


def open_tokenizer(model: str) -> Tokenizer | None:
    """The tokenizer of a model that lies on this machine; nothing is fetched for it. None if there is none."""
    path = _tokenizer_file(model)
    if path is None or not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))
    except Exception:  # it raises plain Exception for a file that it cannot read; places are proportional then
        return None


def _tokenizer_file(model: str) -> Path | None:
    if model in PACKAGED:
        return default_cache_dir() / PACKAGED[model].folder_name / "tokenizer.json"
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / "tokenizer.json"
    if HUB_ID.fullmatch(model):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model, "tokenizer.json")
        return Path(found) if isinstance(found, str) else None
    return None


class Places:
    """Where tokens stand in the texts of messages.

    With the tokenizer a message's token ids are turned into text again: if the message's text is in it, the places are
    exact. If not, or without the tokenizer, a token's place is where it stands in the message's span in proportion,
    widened to whole words.

    Args:
        messages: all of the session.
        token_ids: gives the ids of a slice of the session's tokens.
    """

    def __init__(
        self, messages: Sequence[Message], token_ids: Callable[[int, int], Sequence[int]], tokenizer: Tokenizer | None
    ) -> None:
        self._messages, self._token_ids, self._tokenizer = messages, token_ids, tokenizer
        self._ends = lru_cache(maxsize=1024)(self._decode)

    def of(self, message: Message, tokens: Sequence[int]) -> tuple[list[Range], bool]:
        """The characters [start, end) of each of a message's tokens, and whether that is exact.

        A token outside the text, as of the message's frame, has an empty range.
        """
        length = len(message.text)
        ends = self._ends(message.index)
        if ends is not None:
            at = [(ends[token - message.start], ends[token - message.start + 1]) for token in tokens]
            # A token that ends within a character stands for that character.
            return [(_within(i, length), _within(max(j, i + 1), length)) for i, j in at], True
        words = [match.span() for match in re.finditer(r"\S+", message.text)]
        n = message.end - message.start
        return [self._words(words, (token - message.start) * length / n, length / n) for token in tokens], False

    def _words(self, words: Sequence[Range], at: float, width: float) -> Range:
        first = bisect_left(words, at, key=lambda word: word[1])
        last = max(first, bisect_left(words, at + width, key=lambda word: word[0]) - 1)
        return (words[first][0], words[min(last, len(words) - 1)][1]) if first < len(words) else (0, 0)

    def _decode(self, index: int) -> list[int] | None:
        """Where in the message's text each of its tokens ends, the first number being where the first begins; None if
        the tokens do not say the text. What stands before the text is negative."""
        message = self._messages[index]
        text = message.text
        if self._tokenizer is None or not text or text.count(REPLACEMENT) > MAX_REPLACEMENTS:
            return None
        from tokenizers.decoders import DecodeStream

        stream: Any = DecodeStream(skip_special_tokens=False)
        pieces, last_special = [], 0
        special = {number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        for place, id in enumerate(self._token_ids(message.start, message.end)):
            pieces.append(stream.step(self._tokenizer, id) or "")
            if id in special:
                last_special = place
        ends = [0, *accumulate(map(len, pieces))]
        # A short text may stand in the frame too: behind its last special token, or before the text, as the role does.
        found = "".join(pieces).rfind(text, 0, ends[last_special] if last_special > 0 else None)
        return [end - found for end in ends] if found >= 0 else None


def _within(place: int, length: int) -> int:
    return min(max(place, 0), length)
