"""A session that takes in tool output for as long as it is let, with an eye on memory and open files."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.config import RuntimeConfig
from infllm_agent.model.local_model import LocalModel
from survival.script import WORDS

SETTINGS = MemoryConfig(
    n_init=16, n_local=128, block_size=64, topk=2, candidates=4, chunk_size=512, max_cached_block=8, question_tail=16
)
HOST_BUDGET = 16 << 20  # less than the blocks of 100,000 tokens
WARM_UP = 0.25  # of the tokens, and at most WARM_UP_TOKENS
WARM_UP_TOKENS = 500_000
GROWTH = 24 << 20  # bytes that Python and the allocators may take later: they level off slowly


@dataclass(frozen=True)
class Sample:
    """What a process holds after a commit; bytes."""

    tokens: int
    anonymous: int
    resident: int
    files: int
    device: int
    index: int
    host: int


class Soak:
    """One session, grown turn by turn: tool output, a question, an answer, a commit."""

    def __init__(self, model: LocalModel, root: Path, seed: int) -> None:
        self._dice = random.Random(seed)
        self._root = root
        self._runtime = AgentRuntime(root, model, SETTINGS, RuntimeConfig(host_budget=HOST_BUDGET))
        self._session = self._runtime.session("soak")
        self._highest_host = 0
        self.samples: list[Sample] = []

    def run(
        self, tokens: int, *, until: float | None = None, told: Callable[[Sample], None] | None = None
    ) -> Counter[str]:
        """Take in so many tokens, or until a time of ``time.monotonic``.

        Raises AssertionError as soon as memory or open files grow after the warm-up.
        """
        session, turns = self._session, 0
        while session.token_count < tokens and (until is None or time.monotonic() < until):
            with session.stream_tool_result("shell") as sink:
                for _ in range(40):
                    sink.write(" ".join(self._dice.choices(WORDS, k=20)) + "\n")
                    self._highest_host = max(self._highest_host, self._runtime.tiers.host_bytes())
            session.append_user("what of it?")
            session.reply(max_tokens=2)
            session.commit()
            turns += 1
            self.samples.append(self._sample())
            self._check(min(WARM_UP * tokens, WARM_UP_TOKENS))
            if told:
                told(self.samples[-1])
        return Counter({"tokens": session.token_count, "turns": turns, "blocks": session.usage["blocks"]})

    def _sample(self) -> Sample:
        with open("/proc/self/status") as status:
            sizes = {line.split(":")[0]: line.split()[1] for line in status if line.startswith(("Rss", "VmRSS"))}
        memory = self._session.memory
        highest, self._highest_host = self._highest_host, 0
        return Sample(
            tokens=self._session.token_count,
            anonymous=int(sizes["RssAnon"]) << 10,
            resident=int(sizes["VmRSS"]) << 10,
            files=len(os.listdir("/proc/self/fd")),
            device=memory.device_bytes(),
            index=memory.index_bytes(),
            host=highest,
        )

    def _check(self, warm: float) -> None:
        now = self.samples[-1]
        before = [sample for sample in self.samples if sample.tokens <= warm]
        assert now.device == self.samples[0].device, "the device's part of the memory grows"
        chunk = SETTINGS.chunk_size // SETTINGS.block_size * self._session.memory.store.shape.stride
        assert now.host <= HOST_BUDGET + chunk, f"host memory takes {now.host:,} bytes"
        if not before or now.tokens <= warm:
            return
        base = before[-1]
        assert now.files <= max(sample.files for sample in before), f"open files grow: {now.files}"
        # The index doubles: while it does, both are there.
        allowed = max(sample.anonymous for sample in before) + 2 * (now.index - base.index) + GROWTH
        assert now.anonymous <= allowed, f"memory grows: {now.anonymous:,} of {allowed:,} bytes"

    def report(self) -> dict[str, object]:
        """First and last sample."""
        return {"first": asdict(self.samples[0]), "last": asdict(self.samples[-1])}

    def close(self) -> None:
        self._session.store.verify()
        self._runtime.close()
        shutil.rmtree(self._root)
