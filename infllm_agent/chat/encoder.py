"""Text to token ids, such that text from outside can never become a control token.

A tokenizer's added tokens (``<|im_end|>``, ``<tool_call>``, ``<think>``, ...) give a conversation its structure. By
default a tokenizer reads them wherever they are spelled, so a tool that prints ``<|im_end|>`` would end its own turn.
Here two tokenizers are built from one: the first reads the template's own text with all added tokens, the second knows
none of them and reads everything else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from infllm_agent.errors import UnsupportedModel

PIECE_CHARS = 16_384  # most characters tokenised at once: bounds time and memory for text of any length and shape

# UTF-8: the first bytes of characters of two, three and four bytes, the bits that follow, and the lowest character.
_UTF8_LEADS = ((range(0xC2, 0xE0), 6, 0x80), (range(0xE0, 0xF0), 12, 0x800), (range(0xF0, 0xF5), 18, 0x10000))

_SURROGATE = re.compile("[\ud800-\udfff]")

# Everything up to the last place where words part: before a single space, or after a single newline, between two
# characters that are not white space. All common pre-tokenisers part words there too, so a cut changes no token.
_LAST_BREAK = re.compile(r"(?s:.*\S)(?:(?= \S)|\n(?=\S))")


def clean_text(text: str) -> str:
    """Replace every surrogate by U+FFFD: surrogates can be neither tokenised nor stored as UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


class TextEncoder:
    """Encodes control text (the template's own) and untrusted text (everything else) with one vocabulary.

    Neither adds a beginning-of-sequence token, nor the space that SentencePiece tokenizers put before a text, so the
    ids of consecutive pieces may simply be joined. Immutable, and safe to share between threads.

    ``control_ids``: the added tokens, special or not. White space that some vocabularies list among their added tokens
    is no control token unless declared special: Gemma has no other way to write a line's end. ``digest``: SHA-256 over
    vocabulary, merges and added tokens, all that gives an id its meaning.

    Raises UnsupportedModel for a tokenizer without a fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedModel(
                f"{type(tokenizer).__name__} is not a fast tokenizer; use a model folder that has a tokenizer.json"
            )
        self.backend: Tokenizer = backend
        spec: dict[str, Any] = json.loads(backend.to_str())
        added: list[dict[str, Any]] = spec["added_tokens"]
        declared = {int(token["id"]) for token in added if token["special"] or not _is_blank(token["content"])}
        self.control_ids: frozenset[int] = frozenset(declared.union(tokenizer.all_special_ids))
        # Longest first, so that a pattern made of them prefers <a><b> over <a>.
        self.control_texts: tuple[str, ...] = tuple(
            sorted((t["content"] for t in added if t["id"] in self.control_ids), key=len, reverse=True)
        )
        meaning = [spec["model"].get("vocab"), spec["model"].get("merges")]
        meaning.append([[token["id"], token["content"], token["special"]] for token in added])
        self.digest: str = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()
        self._unspellable = _unspellable(spec)
        spec.update(truncation=None, padding=None, post_processor=None)
        spec["normalizer"] = _as_written(spec["normalizer"])
        spec["pre_tokenizer"] = _as_written(spec["pre_tokenizer"])
        self._control = Tokenizer.from_str(json.dumps(spec))
        if any(self._control.token_to_id(token["content"]) != token["id"] for token in added):
            raise UnsupportedModel("the tokenizer's added tokens do not keep their ids; save and load it again")
        # All of them go: what is left alone would be numbered anew, from the end of the model's vocabulary.
        spec["added_tokens"] = []
        self._text = Tokenizer.from_str(json.dumps(spec))

    def encode_control(self, text: str) -> list[int]:
        """Encode the template's own text: added tokens are recognised. Never give it text from outside."""
        return list(self._control.encode(text, add_special_tokens=False).ids)

    def clean(self, text: str) -> str:
        """Replace by U+FFFD what ``encode_text`` cannot keep: surrogates, and what the vocabulary cannot spell."""
        text = clean_text(text)
        return self._unspellable.sub("\ufffd", text) if self._unspellable else text

    def encode_text(self, text: str) -> list[int]:
        """Encode any text from outside; none of ``control_ids`` is among the ids.

        Decoding the ids gives ``clean(text)``, exactly so for byte-level vocabularies. A character that another kind
        of vocabulary can only write as its unknown token is left out. Time and memory are linear in the length.
        """
        return [token for piece in _pieces(self.clean(text)) for token in self._encode(piece)]

    def _encode(self, piece: str) -> list[int]:
        encoding = self._text.encode(piece, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self.control_ids.isdisjoint(ids):
            return ids
        # The model's own vocabulary holds a control token and spelled it. Its parts, encoded apart, cannot.
        cuts = {0, len(piece)}
        for token, (start, end) in zip(ids, encoding.offsets, strict=True):
            if token in self.control_ids:
                cuts |= {start, (start + end) // 2, end}
        if len(cuts) == 2:
            return [token for token in ids if token not in self.control_ids]
        bounds = sorted(cuts)
        return [token for start, end in pairwise(bounds) for token in self._encode(piece[start:end])]


class TextStream:
    """Encodes one text that arrives in parts, such as the output of a tool that still runs.

    However the text is cut, the ids together decode to the whole text and hold no control id; with a pre-tokenizer
    that parts words at spaces they are the ids of ``encode_text`` on the whole. At most ``PIECE_CHARS`` + 1 characters
    are held back.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._held = ""  # has no place where words part
        self._closed = False

    def write(self, text: str) -> list[int]:
        """Take the next part; return the ids that no later part can change. Raises ValueError after ``close``."""
        if self._closed:
            raise ValueError("write to a closed TextStream")
        seen = len(self._held)
        *ready, rest = _pieces(self._held + self._encoder.clean(text))
        # A place that was not there before ends with a new character: many small writes need not search it all again.
        found = _LAST_BREAK.match(rest, 0 if ready else max(0, seen - 2))
        if found:
            ready.append(rest[: found.end()])
            rest = rest[found.end() :]
        self._held = rest
        return [token for piece in ready for token in self._encoder._encode(piece)]

    @property
    def held(self) -> str:
        """What is held back."""
        return self._held

    def close(self) -> list[int]:
        """Return the ids of what was held back; closing again returns nothing."""
        self._closed = True
        rest, self._held = self._held, ""
        return self._encoder._encode(rest) if rest else []


def _pieces(text: str) -> Iterator[str]:
    """Cut a text where words part, as late as possible within PIECE_CHARS, or there if they never do."""
    start = 0
    while len(text) - start > PIECE_CHARS + 1:
        found = _LAST_BREAK.match(text, start, start + PIECE_CHARS + 2)
        end = found.end() if found else start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _unspellable(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Match the characters that a byte-level vocabulary cannot spell; None if it can spell all.

    Vocabularies trained without the whole byte alphabet exist (SmolLM2 lacks U+0004, U+001D and the planes 4 to 11).
    Such a tokenizer drops the byte without a word, and may leave the rest of a character behind.
    """
    if "ByteLevel" not in json.dumps([spec["pre_tokenizer"], spec["decoder"]]):
        return None
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in visible]
    # GPT-2's alphabet: a visible Latin-1 character stands for its own byte, U+0100 and on for the others in order.
    letter = {**{byte: chr(byte) for byte in visible}, **{byte: chr(0x100 + i) for i, byte in enumerate(others)}}
    ranges = ""
    for byte in (byte for byte, spelled in letter.items() if spelled not in spec["model"]["vocab"]):
        if byte < 0x80:
            ranges += re.escape(chr(byte))
        for leads, bits, lowest in _UTF8_LEADS:
            if byte in leads:
                first = (byte & 0x1F if bits == 6 else byte & 0x0F) << bits
                ranges += f"{chr(max(first, lowest))}-{chr(min(first + (1 << bits) - 1, 0x10FFFF))}"
    return re.compile(f"[{ranges}]") if ranges else None


def _is_blank(token: str) -> bool:
    return token.replace("\u2581", " ").isspace()  # SentencePiece writes a space as U+2581


def _as_written(part: Any) -> Any:
    """Change a normalizer or pre-tokenizer of a tokenizer.json so that it leaves a text as it came.

    A space put before each text would be read back as part of it, and composing characters (NFC) would change, say, a
    file name that a tool has printed and that the agent has to give back.
    """
    if part is None or part["type"] in ("Prepend", "NFC"):
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return {**part, key: [kept for step in part[key] if (kept := _as_written(step)) is not None]}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part
