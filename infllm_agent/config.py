"""Settings: frozen and validated, so that a combination that cannot work cannot be built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from infllm_agent.errors import ConfigError

BlockKey = Literal["representatives", "mean"]
Lookup = Literal["similarity", "votes"]
Positions = Literal["one_angle", "contiguous"]
BlockDtype = Literal["model", "int8"]

#: Of which tokens a session records what they attended to: none; those of the question, the first of the answer and
#: some later ones; all of the answer. No part of a session's fingerprint, because it changes no result.
TraceMode = Literal["off", "sampled", "on"]


def default_root() -> Path:
    """Where sessions are kept unless told otherwise: ``$INFLLM_ROOT``, else a folder of the user's."""
    return Path(os.environ.get("INFLLM_ROOT") or "~/.local/share/infllm-agent").expanduser()


class Settings(BaseModel):
    """Base of all settings: immutable, unknown names refused, mistakes reported in one line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(one_line(error, type(self).__name__)) from None


def one_line(error: ValidationError, owner: str) -> str:
    """The first problem of a validation error as one sentence that names the field and its value."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not field:
        return f"{owner}: {message}"
    return f"{owner}.{field} = {first['input']!r}: {message}"


class MemoryConfig(Settings):
    """The context memory's sizes, in tokens unless stated otherwise. Names follow the paper (arXiv 2402.04617).

    The defaults are for the small packaged model on a CPU; ``paper()`` has the authors' settings for a window of 8K.
    A larger model reads more at once with profit: raise ``n_local`` and ``topk`` as far as its window goes.

    A step attends to at most ``n_init + topk * block_size`` far keys (``question_topk`` if its chunk is short), the
    local window, and its own chunk, however long the session is.
    """

    n_init: int = Field(64, ge=0, description="attention sinks: the first tokens of the session, always attended")
    n_local: int = Field(512, ge=1, description="local window: the latest tokens, attended at true positions")
    block_size: int = Field(16, ge=1, description="consecutive evicted tokens that are stored and looked up together")
    block_key: BlockKey = Field(
        "mean",
        description="what the lookup knows of a block: the mean of all its keys, or of its representatives (the paper)",
    )
    repr_topk: int = Field(4, ge=1, description="representative tokens per block")
    lookup: Lookup = Field(
        "votes",
        description="votes: each query and head divides one vote among the blocks; similarity: all summed (the paper)",
    )
    max_votes: int = Field(32, ge=1, description="queries of a chunk that vote; neighbours are averaged to so many")
    flat_blocks: int | None = Field(
        4096,
        ge=1,
        description="most blocks of which the votes compare all keys; of more, cells of keys show which; None: of all",
    )
    candidates: int = Field(
        384, ge=0, description="blocks whose exact keys a second pass compares to choose topk of them; 0: no such pass"
    )
    candidate_tokens: int = Field(
        8,
        ge=1,
        description="decoded tokens that choose, each anew, among the same candidates; 1: each looks up its own",
    )
    topk: int = Field(64, ge=0, description="blocks looked up for each chunk, in each layer")
    chunk_size: int = Field(512, ge=1, description="execution chunk: most tokens that go through the model at once")
    question_chunk: int = Field(
        16, ge=1, description="execution chunk of the last tokens before an answer: so few, that each has its say"
    )
    question_tail: int = Field(64, ge=0, description="how many of the last tokens before an answer go in such chunks")
    question_topk: int | None = Field(
        None,
        ge=0,
        description="blocks looked up for a chunk of at most question_chunk tokens, a decoded one included, which "
        "leaves room for more than a long one; None: topk",
    )
    max_cached_block: int = Field(
        256, ge=0, description="blocks kept on the device per layer (LRU); on a GPU, at least as many as candidates"
    )
    block_dtype: BlockDtype = Field(
        "model",
        description="how blocks are stored below the device: as the model computes, or as int8, in half the bytes",
    )
    positions: Positions = Field(
        "contiguous",
        description="contiguous: sinks, looked-up blocks in their order and window as if nothing lay between them; "
        "one_angle: all far keys at the rotary distance n_local (the paper)",
    )

    @model_validator(mode="after")
    def _sizes_fit_together(self) -> MemoryConfig:
        if self.block_key == "representatives" and self.repr_topk > self.block_size:
            raise ValueError(f"repr_topk {self.repr_topk} is more than block_size {self.block_size} tokens")
        for name, topk in (("topk", self.topk), ("question_topk", self.question_topk or 0)):
            if topk > self.max_cached_block:
                raise ValueError(
                    f"{name} {topk} is more than the cache holds (max_cached_block {self.max_cached_block}); "
                    f"lower {name} or raise max_cached_block"
                )
            if self.candidates and self.candidates < topk:
                raise ValueError(
                    f"candidates {self.candidates} is fewer than {name} {topk}; raise it, or 0 for no second pass"
                )
        return self

    @classmethod
    def paper(cls, **sizes: int) -> MemoryConfig:
        """The paper's rules, at the sizes the authors ship for a model with a window of 8K tokens, or at others."""
        shipped = {"n_init": 128, "n_local": 4096, "block_size": 128, "topk": 16, "max_cached_block": 32}
        return cls(
            **{"repr_topk": 4, "chunk_size": 512, **shipped, **sizes},
            block_key="representatives",
            lookup="similarity",
            flat_blocks=None,
            candidates=0,
            candidate_tokens=1,
            question_tail=0,
            question_topk=None,
            positions="one_angle",
        )

    @classmethod
    def from_record(cls, stored: dict[str, Any]) -> MemoryConfig:
        """The configuration that a stored session was made with; rules that it does not name yet are the paper's."""
        before_there_was_a_choice = {
            "block_key": "representatives",
            "lookup": "similarity",
            "flat_blocks": None,
            "candidates": 0,
            "candidate_tokens": 1,
            "question_tail": 0,
            "question_topk": None,
            "block_dtype": "model",
        }
        return cls(**{**before_there_was_a_choice, **stored})

    def under_paper_rules(self) -> MemoryConfig:
        """The paper's rules at this configuration's budget: the same sinks and window, and as many looked-up keys in
        the 16 blocks that the authors ship (or more, of their 128 tokens)."""
        far = self.topk * self.block_size
        size = max(1, min(128, far // 16))
        return MemoryConfig.paper(
            n_init=self.n_init,
            n_local=self.n_local,
            block_size=size,
            repr_topk=min(4, size),
            topk=far // size,
            chunk_size=self.chunk_size,
            max_cached_block=max(far, self.max_cached_block * self.block_size) // size,
        )

    def changed(self, **fields: Any) -> MemoryConfig:
        """A copy with some fields changed, validated like any other."""
        return MemoryConfig(**{**self.model_dump(), **fields})

    def chunks(self, n: int, *, before_answer: bool = False) -> list[int]:
        """The sizes of the execution chunks in which ``n`` tokens go through the model.

        The mean of a long chunk's queries asks for what the whole chunk is about. Before an answer the last tokens,
        where the question stands, go in small chunks that look up on their own.
        """
        tail = min(n, self.question_tail) if before_answer else 0
        return [*_parts(n - tail, self.chunk_size), *_parts(tail, min(self.question_chunk, self.chunk_size))]

    def looks_up_anew(self, length: int, end: int) -> bool:
        """Whether the token behind a chunk of ``length`` tokens that ends at ``end`` has candidates of its own."""
        return length > 1 or end % self.candidate_tokens == 0

    def topk_for(self, n: int) -> int:
        """Blocks looked up for a chunk of ``n`` tokens."""
        return self.topk if self.question_topk is None or n > self.question_chunk else self.question_topk

    @property
    def most_topk(self) -> int:
        """Blocks looked up for any chunk."""
        return max(self.topk, self.question_topk or 0)

    @property
    def kept_candidates(self) -> int:
        """Most blocks whose keys a layer keeps on the device to choose among them."""
        return self.candidates if self.candidate_tokens > 1 else 0

    @property
    def window_capacity(self) -> int:
        """Most tokens at true positions at once: the window, a block (or the sinks) not yet evicted, and a chunk."""
        return self.n_local + max(self.block_size, self.n_init) + self.chunk_size

    @property
    def attended_keys(self) -> int:
        """Most keys any query attends to."""
        few = min(self.question_chunk, self.chunk_size)
        most = max(self.topk * self.block_size + self.chunk_size, self.topk_for(few) * self.block_size + few)
        return self.n_init + most + self.window_capacity - self.chunk_size


def _parts(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


class RuntimeConfig(Settings):
    """What an ``AgentRuntime`` allows its live sessions, in seconds, tokens and bytes (``2 << 30`` or ``"2GiB"``); what
    it records of all of them.

    A session opens under any of these settings, and but for ``batch`` none of them changes a result.
    """

    trace: TraceMode = Field(
        "sampled",
        description="of which tokens it is kept what they attended to: off; sampled, those of the question, the first "
        "16 of an answer and every 16th after them, in every second layer in turn; on, all of them",
    )
    device_budget: ByteSize | None = Field(
        None,
        description="ceiling for what all open sessions together take of the device: idle ones are closed to make "
        "room, others wait; None: no ceiling",
    )
    host_budget: ByteSize | None = Field(
        None,
        description="ceiling for blocks in host memory, of all open sessions together: the least recently used go, and "
        "are read from disk again; None: 1 GiB for these, no ceiling for what is not committed yet",
    )
    disk_budget: ByteSize | None = Field(
        None, description="ceiling for all that is under the root: a commit over it fails; None: no ceiling"
    )
    idle_s: float = Field(600.0, ge=0, description="a session that nothing happened to for so long is closed")
    kept_open: int = Field(
        8,
        ge=0,
        description="sessions that stay open with nothing to do; the least recently used are closed",
    )
    workers: int = Field(
        16, ge=1, description="most sessions that are worked on at once; they share the model in turns"
    )
    batch: int = Field(
        1,
        ge=1,
        description="most sessions whose next tokens are computed in one forward; above 1, who else answers meanwhile "
        "can change the last bits of an answer's logits",
    )
    slice_s: float = Field(
        10.0, ge=0, description="a session that only reads gives its place to others that wait after so long"
    )
    commit_s: float = Field(30.0, ge=0, description="a session that reads for long is committed so often")
    queued_chars: int = Field(
        100_000, ge=1, description="text queued for a session, in characters, from which on its writers wait"
    )
    waiting_tokens: int = Field(
        16_384,
        ge=1,
        description="tokens of a session waiting for the model, from which on its queue waits too",
    )
    metrics: bool = Field(
        False, description='count what all sessions do, for Prometheus: `pip install "infllm-agent[metrics]"`'
    )


class SamplingConfig(Settings):
    """How the next token is chosen. ``temperature=0`` is greedy."""

    max_tokens: int = Field(256, ge=1, description="most tokens of an answer")
    temperature: float = Field(0.0, ge=0.0, le=10.0, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="draw from the likeliest tokens of this total probability")
    top_k: int = Field(0, ge=0, description="draw from this many of the likeliest tokens; 0: from all")
    repetition_penalty: float = Field(1.0, gt=0.0, le=10.0, description="above 1: discourage what was just said")
    stop: tuple[str, ...] = Field((), description="an answer ends before this text")
    seed: int | None = Field(None, ge=0, description="makes drawing repeatable")

    @model_validator(mode="after")
    def _stop_is_text(self) -> SamplingConfig:
        if any(not text for text in self.stop):
            raise ValueError("a stop sequence may not be empty")
        return self
