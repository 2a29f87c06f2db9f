"""Generated tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Collection

from tokenizers import Tokenizer

from infllm_agent.chat.call_reader import CallReader, CodedStream
from infllm_agent.tools import InvalidCall, ToolCall


class TextPieces:
    """Generated tokens to text, piece by piece: whole characters only, and nothing of a stop sequence or a call.

    Args:
        stop: texts that end the answer; inside a call they are part of it.
        reader: reads calls; None: there are none, whatever is written.
        names: of the tools that may be called.
        prefix: the text so far, which is no piece any more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        reader: CallReader | None = None,
        names: Collection[str] | None = None,
        prefix: str = "",
    ) -> None:
        self._stream = CodedStream(tokenizer, reader.codes if reader else {})
        self._stop = stop
        self._reader, self._names = reader, names
        self._held = ""  # could be the beginning of a stop sequence or a call, or is a call
        self._in_calls = False
        self.text = prefix
        self.stopped = False
        self.calls: tuple[ToolCall, ...] = ()
        self.invalid: tuple[InvalidCall, ...] = ()

    def add(self, token: int) -> str:
        """Take one more token, and give the text that is now certain; sets ``stopped`` when a stop sequence is
        complete."""
        self._held += self._stream.step(token)
        opened = self._opened()
        found = [place for place in (self._held.find(text) for text in self._stop) if place >= 0]
        if found and (opened is None or min(found) < opened):
            self.stopped = True
            return self._give(min(found), drop_rest=True)
        if opened is None:
            return self._give(self._certain())
        self._in_calls = True
        return self._give(len(self._held[:opened].rstrip()))

    def finish(self) -> str:
        """Give what was held back, now that no more tokens come, and find the calls."""
        if self._in_calls and self._reader is not None:
            parsed = self._reader.parse(self._held, self._names, behind_text=bool(self.text))
            self._in_calls, self._held = False, ""
            self.text += parsed.text
            self.calls, self.invalid = parsed.calls, parsed.invalid
            return parsed.text
        return "" if self.stopped else self._give(len(self._held))

    def _opened(self) -> int | None:
        """Find where in what is held the first call begins."""
        if self._in_calls:
            return 0
        if self._reader is None or (self.text and not self._reader.opener):
            return None
        return self._reader.opens_at(self._held)

    def _certain(self) -> int:
        """Measure how much of what is held can be given: it begins no stop sequence and no call, and is not white space
        that a call may follow."""
        markers = self._stop if self._reader is None else (*self._stop, self._reader.opener)
        longest = 0
        for text in markers:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        certain = self._held[: len(self._held) - longest]
        return len(certain if self._reader is None else certain.rstrip())

    def _give(self, length: int, *, drop_rest: bool = False) -> str:
        piece, rest = self._held[:length], self._held[length:]
        self._held = "" if drop_rest else rest
        if self._reader is not None:
            piece = self._reader.plain(piece)
        self.text += piece
        return piece
