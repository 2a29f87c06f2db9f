"""A small case of many look-alikes: 12 questions about a JSON object of UUID pairs, 3,000 tokens, 1,024 looked-up keys.

    python benchmarks/pilot_kv.py MODEL

Right means the first eight characters of the value, greedily decoded. The memory has a window of 512 tokens; full
attention is the memory with a window that holds everything.
"""

import random
import sys
import uuid

from infllm_agent.bench.retrieval.readers import MemoryContext
from infllm_agent.config import MemoryConfig
from infllm_agent.model.local_model import LocalModel

TOKENS, QUESTIONS = 3000, 12
DEFAULT = MemoryConfig(n_local=512, block_size=16, topk=64)
ROWS = {
    "full attention": DEFAULT.changed(n_local=8192),
    "the paper's rules": DEFAULT.under_paper_rules(),
    "the paper's rules, contiguous positions": DEFAULT.under_paper_rules().changed(positions="contiguous"),
    "default": DEFAULT,
    "default without the exact pass": DEFAULT.changed(candidates=0),
    "default without the question's small chunks": DEFAULT.changed(question_tail=0),
    "default at one angle": DEFAULT.changed(positions="one_angle"),
}


def main(name: str) -> None:
    model = LocalModel.load(name)

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    head = "Below is a JSON object of key-value pairs. Remember all of them.\n{\n"
    rng, ids, pairs = random.Random(1), encode(head), []
    while True:
        key, value = (str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
        line = encode(f'"{key}": "{value}",\n')
        if len(ids) + len(line) > TOKENS:
            break
        ids += line
        pairs.append((key, value))
    asked = [pairs[int((place + 0.5) / QUESTIONS * len(pairs))] for place in range(QUESTIONS)]
    for label, config in ROWS.items():
        context = MemoryContext.empty(model, config)
        context.feed(ids)
        marks = ""
        for key, value in asked:
            question = f'}}\n\nQuestion: what is the value of the key "{key}" in the JSON object above?\n'
            question += f'Answer: The value of the key "{key}" is "'
            with context.branch() as fork:
                logits = fork.feed(encode(question), question=True)
                written: list[int] = []
                while len(model.tokenizer.decode(written)) < 8:
                    written.append(int(logits.argmax()))
                    logits = fork.feed(written[-1:])
            marks += "x" if model.tokenizer.decode(written).startswith(value[:8]) else "."
        print(f"{label:45s} {marks.count('x'):2d} of {QUESTIONS}  {marks}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
