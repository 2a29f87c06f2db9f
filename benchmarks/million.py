"""One session of a million tokens: an operations log with facts stated once, all asked about at the end.

    python benchmarks/million.py ROOT [--tokens 1000000] [--model smollm2] [--json OUT]

The session is committed and reopened every 50,000 tokens, so that its blocks lie in files and host memory holds no more
than the operating system cares to keep. ROOT needs 24 KB of disk for each token of SmolLM2. A stopped run goes on.
"""

import argparse
import json
import time
from pathlib import Path

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.bench.oplog import generate
from infllm_agent.demo import ask

PART = 50_000
SEED = 7


def resident_mb() -> int:
    """Resident memory of this process, without the pages of mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024
    raise SystemExit("this script reads its memory from /proc: it needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = []
    with AgentRuntime.open(options.root, options.model, MemoryConfig()) as runtime:
        chat = runtime.chat
        log = generate(SEED, options.tokens, lambda event: len(chat.render(event.role, event.text, name=event.name)))
        session = runtime.session("million")
        waiting = list(log.events[session.message_count :])
        while waiting:
            began, before = time.perf_counter(), session.token_count
            while waiting and session.token_count < before + PART:
                event = waiting.pop(0)
                session.append(event.role, event.text, name=event.name)
            read_s = time.perf_counter() - began
            session.commit()
            committed = time.perf_counter()
            session.close()
            session = runtime.session("million")
            part = {
                "tokens": session.token_count,
                "tok_s": round((session.token_count - before) / read_s, 1),
                "commit_s": round(committed - began - read_s, 2),
                "reopen_s": round(time.perf_counter() - committed, 2),
                "anonymous_rss_mb": resident_mb(),
                "device_mb": round((session.memory.device_bytes() + session.memory.index_bytes()) / 1e6, 1),
                "disk_gb": round(session.usage["bytes"]["disk"] / 1e9, 2),
            }
            parts.append(part)
            print(json.dumps(part), flush=True)
        answers = []
        for fact in log.facts:
            answer = ask(session, fact, len(log.events))
            row = {
                "question": fact.question,
                "place": fact.place,
                "expected": fact.answer,
                "said": answer.text,
                "right": answer.correct,
                "first_token_s": answer.first_token_s,
                "seconds": answer.seconds,
            }
            answers.append(row)
            print(json.dumps(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps({"parts": parts, "answers": answers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
