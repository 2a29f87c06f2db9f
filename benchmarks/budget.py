"""What limits the answers: how many blocks are looked up while a context is read, or while a question is asked.

    python benchmarks/budget.py MODEL --task lines --tokens 8192 --read 160,all --ask 160,190,288,all

A context is read once for each number in --read, then asked the same questions with each number in --ask, in forks of
that memory. With all blocks looked up it is full attention. Printed: which questions were answered rightly, in order.
"""

from __future__ import annotations

import argparse

from infllm_agent.bench.retrieval import tasks
from infllm_agent.bench.retrieval.haystack import Haystack, is_right
from infllm_agent.bench.retrieval.readers import MemoryContext, WholeReader
from infllm_agent.config import MemoryConfig
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel


def looking_up(blocks: int, there: int) -> MemoryConfig:
    """The default rules with so many blocks, and six times as many candidates but where all are looked up."""
    if blocks >= there:
        return MemoryConfig(topk=there, candidates=0, max_cached_block=there, flat_blocks=None)
    return MemoryConfig(topk=blocks, candidates=6 * blocks, max_cached_block=3 * blocks)


def under(config: MemoryConfig, memory: ContextMemory) -> None:
    """Forks of the memory look up by these rules."""
    memory.config = config
    for layer in memory.layers.values():
        layer.config = config


def compare(model: LocalModel, haystack: Haystack, read: list[int], ask: list[int], there: int) -> None:
    (stretch,) = haystack.stretches
    for reading in read:
        reader = WholeReader(model, MemoryContext.empty(model, looking_up(reading, there)))
        reader.read(stretch.text)
        assert isinstance(reader.context, MemoryContext)
        for asking in ask:
            under(looking_up(asking, there), reader.context.memory)
            right = [is_right(one[-1], reader.ask(one)[-1]) for one in stretch.rounds]
            marks = "".join(".x"[answer] for answer in right)
            print(
                f"{haystack.task}, context {haystack.number}: read with {min(reading, there)} blocks, "
                f"asked with {min(asking, there)}: {sum(right)} of {len(right)} {marks}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--task", default="lines")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--contexts", type=int, default=1)
    parser.add_argument("--read", default="160,all", help="blocks, with commas")
    parser.add_argument("--ask", default="160,190,288,all")
    options = parser.parse_args()

    model = LocalModel.load(options.model)
    there = options.tokens // MemoryConfig().block_size

    def numbers(listed: str) -> list[int]:
        return [there if one == "all" else int(one) for one in listed.split(",")]

    def count(text: str) -> int:
        return len(model.tokenizer(text, add_special_tokens=False).input_ids)

    for haystack in tasks.draw(options.task, [options.tokens], options.contexts, options.questions, 0, count):
        compare(model, haystack, numbers(options.read), numbers(options.ask), there)


if __name__ == "__main__":
    main()
