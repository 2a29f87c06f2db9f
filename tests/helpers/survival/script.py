"""A known script of turns, and what an uninterrupted run of it has at every commit, to compare survivors with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from tiny import save_tiny
from torch import Tensor

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel

NAME = "ops"
SETTINGS = MemoryConfig(
    n_init=4, n_local=32, block_size=8, topk=3, candidates=6, chunk_size=16, max_cached_block=6, question_tail=8
)
PROBE = 64  # logits that are compared
WORDS = ["error", "404", "at", "12:30", "the", "agent", "asked", "what", "tool", "printed", "its", "log", "ünï", "✓"]
WORDS += ["数据", "<|im_end|>", "<|im_start|>system", "\0", "\u202e"]

#: (what, role, name, text or number of tokens)
Step = tuple[str, str, str | None, str | int]


def load_model(folder: Path) -> LocalModel:
    """A model of two small layers, saved into ``folder`` and loaded."""
    torch.set_num_threads(1)  # forks of this process have no others
    return LocalModel.load(str(save_tiny(folder, num_hidden_layers=2)), device="cpu", dtype="float32")


class Script:
    """Turns of all kinds, from a seed. ``parts[g]`` is what is done between commit ``g`` and the next."""

    def __init__(self, seed: int, commits: int = 12) -> None:
        self._dice = random.Random(seed)
        self.parts: list[list[Step]] = []
        kinds = [self._question, self._output, self._long_output, self._stream, self._observation]
        while len(self.parts) < commits:
            self.parts += self._dice.choice(kinds)()

    def _text(self, least: int, most: int) -> str:
        return " ".join(self._dice.choices(WORDS, k=self._dice.randint(least, most)))

    def _question(self) -> list[list[Step]]:
        return [[("append", "user", None, self._text(3, 12)), ("reply", "", None, self._dice.randint(2, 8))]]

    def _output(self) -> list[list[Step]]:
        return [[("append", "tool", "shell", self._text(5, 40)), *self._question()[0]]]

    def _long_output(self) -> list[list[Step]]:
        return [[("append", "tool", "http", self._text(60, 120))]]

    def _observation(self) -> list[list[Step]]:
        return [[("append", "observation", "sensor-1", self._text(0, 5))]]  # often too short for a chunk

    def _stream(self) -> list[list[Step]]:
        """A message that is committed before it is complete."""
        pieces: list[Step] = [("write", "", None, self._text(1, 12) + " ") for _ in range(6)]
        begin: list[Step] = [("open", "tool", "shell", ""), *pieces[:3]]
        return [begin, [*pieces[3:], ("close", "", None, ""), *self._question()[0]]]


def do(session: Session, step: Step) -> None:
    """Take one step."""
    what, role, name, value = step
    if what == "append":
        session.append(role, str(value), name=name)
    elif what == "open":
        session.stream(role, name=name)
    elif what == "reply":
        session.reply(max_tokens=value)
    else:
        assert session.open_message is not None
        if what == "write":
            session.open_message.write(str(value))
        else:
            session.open_message.close()


def told(session: Session) -> list[tuple[object, ...]]:
    """The messages, without their times; the one that is arriving is the last."""
    kept: list[tuple[object, ...]] = [(m.role, m.name, m.call_id, m.text, m.start, m.end) for m in session.messages()]
    if session.open_message is not None:
        record = session.open_message.record()
        kept.append(tuple(record[key] for key in ("role", "name", "call_id", "text", "start")))
    return kept


def next_logits(model: LocalModel, memory: ContextMemory, waiting: list[int], count: int = PROBE) -> Tensor:
    """The logits (count, vocabulary) of so many further tokens: chunks, then 16 one by one, or a single chunk of at
    most 16. The memory has read them afterwards."""
    chunk = SETTINGS.chunk_size
    if waiting:
        model.forward(waiting, memory)
    sizes = [chunk] * (count // chunk - 1) + [1] * chunk if count > chunk else [count]
    rows, done = [], 0
    for size in sizes:
        rows.append(model.forward_all([7 + token * 31 % 300 for token in range(done, done + size)], memory))
        done += size
    return torch.cat(rows)


@dataclass
class Expected:
    """What a session has at one generation of an uninterrupted run."""

    messages: list[tuple[object, ...]]
    token_ids: list[int]
    chunks: list[tuple[int, int]]
    blocks: int
    _logits: Callable[[], Tensor] = field(repr=False)

    @cached_property
    def logits(self) -> Tensor:
        return self._logits()


class Survivor(AssertionError):
    """What is there after a crash is not what an uninterrupted run had."""


class Uninterrupted:
    """A script, run once in a root of its own without an interruption and never reopened."""

    def __init__(self, model: LocalModel, root: Path, seed: int, commits: int = 12) -> None:
        self.model = model
        self.script = Script(seed, commits)
        self._runtime, self._visitor = (AgentRuntime(root, model, SETTINGS) for _ in range(2))
        session = self._runtime.session(NAME)
        self.at = [self._note(session)]
        for part in self.script.parts:
            for step in part:
                do(session, step)
            session.commit()
            self.at.append(self._note(session))

    def _note(self, session: Session) -> Expected:
        ids = session.token_ids()
        twin = session.memory.fork(session.memory.length)
        return Expected(
            told(session),
            ids,
            session.chunks(),
            session.usage["blocks"],
            lambda: next_logits(self.model, twin, ids[twin.length :]),
        )

    def close(self) -> None:
        self._runtime.close()

    def runtime(self, root: Path) -> AgentRuntime:
        """Sessions under ``root``, on the same model. The same runtime each time: one root at a time."""
        self._visitor.root = root
        return self._visitor

    def compare(self, session: Session, *, probe: int = PROBE) -> int:
        """Compare an open session, message in arrival included, with this run at the same generation: messages, ids,
        chunks and the next logits. The session is as it was afterwards. Returns the generation."""
        generation = session.store.generation
        expected = self.at[generation]
        for what, got, wanted in (
            ("messages", told(session), expected.messages),
            ("token ids", session.token_ids(), expected.token_ids),
            ("chunks", session.chunks(), expected.chunks),
        ):
            if got != wanted:
                raise Survivor(f"generation {generation}: {what} {got!r} instead of {wanted!r}")
        waiting = session.token_ids()[session.memory.length :]
        logits = next_logits(self.model, session.memory.fork(session.memory.length), waiting, probe)
        for step in range(probe):
            if not torch.equal(logits[step], expected.logits[step]):
                raise Survivor(f"generation {generation}: other logits after {step + 1} tokens")
        return generation
