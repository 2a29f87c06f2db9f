"""What it costs that decoded tokens share candidates: the same questions with and without, in forks of one memory.

    python benchmarks/shared_candidates.py MODEL [--tokens 8192] [--tasks kv,multikey,lines] [--questions 20]

There are few candidates for each length here, 128 of about 480 blocks at 8K, so that sharing them shows.
"""

import argparse

from infllm_agent.bench.retrieval import tasks
from infllm_agent.bench.retrieval.haystack import is_right
from infllm_agent.bench.retrieval.readers import MemoryContext
from infllm_agent.config import MemoryConfig
from infllm_agent.model.local_model import LocalModel

SIZES = {"topk": 64, "candidates": 128}
PERIODS = (1, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tasks", default="kv,multikey,lines")
    parser.add_argument("--questions", type=int, default=20)
    options = parser.parse_args()
    model, configs = LocalModel.load(options.model), [MemoryConfig(**SIZES, candidate_tokens=n) for n in PERIODS]

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    print(f"{'task':10}" + "".join(f"{n:>8}" for n in PERIODS) + "   tokens that share candidates; right answers")
    for task in options.tasks.split(","):
        drawn = tasks.draw(task, [options.tokens], 1, options.questions, 0, lambda text: len(encode(text)))
        for stretch in drawn[0].stretches:
            context = MemoryContext.empty(model, configs[0])
            context.feed(encode(stretch.text))
            right = [0] * len(configs)
            for question, *_ in stretch.rounds:
                written = []
                for i, config in enumerate(configs):
                    fork = context.memory.fork()
                    fork.config = config
                    for layer in fork.layers.values():
                        layer.config = config
                    written.append(decode(MemoryContext(model, fork), encode(question.text), question.answer_tokens))
                    right[i] += is_right(question, written[-1])
            print(f"{task:10}" + "".join(f"{n:8}" for n in right) + f"   of {len(stretch.rounds)}", flush=True)


def decode(context: MemoryContext, ids: list[int], count: int) -> str:
    logits = context.feed(ids, question=True)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(logits.argmax()))
        if len(tokens) < count:
            logits = context.feed(tokens[-1:])
    text: str = context.model.tokenizer.decode(tokens)
    return text


if __name__ == "__main__":
    main()
