"""One session of a million tokens: an operations log with facts stated once, all asked about at the end.

    python benchmarks/million.py fill ROOT [--tokens 1000000]    # an hour; a stopped run goes on
    python benchmarks/million.py tile ROOT                       # instead, in minutes: 32K tokens are read, and their
                                                                 # blocks written again and again, keys with some noise
    python benchmarks/million.py ask ROOT                        # what it remembers
    python benchmarks/million.py measure ROOT                    # what it costs, beside the same session at 32K tokens
    python benchmarks/million.py resident ROOT                   # what memory a process with it takes

Each takes --host-budget BYTES (2 GiB) and --json OUT. ROOT needs 24 KB of disk for each token of SmolLM2.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from infllm_agent import AgentRuntime, MemoryConfig, Session
from infllm_agent.bench.oplog import OperationsLog, generate
from infllm_agent.cli.demo import ask
from infllm_agent.config import RuntimeConfig
from infllm_agent.memory import snapshot
from infllm_agent.messages import Message
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.tail import write_tail

PART = 25_000
SHORT = 32_768
SEED = 7
LONG_NAME, SHORT_NAME = "million", "short"


def anonymous_mb() -> int:
    """Resident memory of this process, without the pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) // 1024
    raise SystemExit("this script reads its memory from /proc: it needs Linux")


def peak_mb() -> int:
    """The most resident memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def log_of(runtime: AgentRuntime, tokens: int) -> OperationsLog:
    chat = runtime.chat
    return generate(SEED, tokens, lambda event: len(chat.render(event.role, event.text, name=event.name)))


def fill(runtime: AgentRuntime, options: argparse.Namespace) -> list[dict]:
    """Read the log, with a commit every ``PART`` tokens; at ``SHORT`` tokens a fork is left behind."""
    log, parts = log_of(runtime, options.tokens), []
    session = runtime.session(LONG_NAME)
    waiting = list(log.events[session.message_count :])
    while waiting:
        began, before = time.perf_counter(), session.token_count
        stop = min(before + PART, SHORT if before < SHORT else before + PART)
        while waiting and session.token_count < stop:
            event = waiting.pop(0)
            session.append(event.role, event.text, name=event.name)
        read_s = time.perf_counter() - began
        commit_s = timed(session.commit)
        if before < SHORT <= session.token_count:
            runtime.fork(LONG_NAME, SHORT_NAME)
            runtime.release(SHORT_NAME)
        part = {
            "tokens": session.token_count,
            "tok_s": round((session.token_count - before) / read_s, 1),
            "commit_s": round(commit_s, 2),
            "anonymous_mb": anonymous_mb(),
            "peak_mb": peak_mb(),
            "host_mb": runtime.tiers.host_bytes() // 1_000_000,
            "device_mb": runtime.tiers.device_bytes() // 1_000_000,
            "disk_gb": round(session.usage["bytes"]["disk"] / 1e9, 2),
        }
        parts.append(part)
        print(json.dumps(part), flush=True)
    return parts


def tile(runtime: AgentRuntime, options: argparse.Namespace) -> list[dict]:
    """A session as large as one that was read, from the blocks of one of 32K tokens."""
    parts = fill(runtime, argparse.Namespace(**{**vars(options), "tokens": SHORT}))
    runtime.release(LONG_NAME)
    runtime.delete(LONG_NAME)
    short, session = runtime.session(SHORT_NAME), runtime.session(LONG_NAME)
    source, target, config = short.memory, session.memory, session.config
    state = source.state()
    window = state.length - source.first_window_token
    blocks = (options.tokens - window - source.n_sinks) // config.block_size
    noise = torch.Generator().manual_seed(SEED)
    while target.store.count < blocks:
        begin = target.store.count % source.store.count
        chosen = range(begin, min(begin + 64, source.store.count, begin + blocks - target.store.count))
        first = target.store.add(len(chosen))
        for layer in range(target.store.shape.layers):
            k, v = source.store.keys(chosen, layer), source.store.values(chosen, layer)
            k = k + 0.1 * k.float().std() * torch.randn(k.shape, generator=noise)
            target.store.put(first, layer, k, v, k.mean(dim=2, dtype=torch.float32))
        target.store.write()
    length = config.n_init + blocks * config.block_size + window
    tensors, record = snapshot.pack(replace(state, length=length), config, target.store.files.marks)
    tail, crc = write_tail(session.store.folder, tensors)
    ids = short.store.token_ids()
    size = config.chunk_size
    session.store.commit(
        messages=[Message(0, "tool", "shell", None, "tiled", time.time(), 0, length)],
        token_ids=[*ids] * (length // len(ids)) + [*ids[: length % len(ids)]],
        chunks=[(start, min(size, length - start)) for start in range(0, length, size)],
        state={"memory": record, "tail": tail, "tail_crc": crc},
        bytes_on_disk=0,
        blocks=blocks,
    )
    session.close()
    return parts


def question(runtime: AgentRuntime, options: argparse.Namespace) -> list[dict]:
    """All facts of the log, asked in one fork."""
    session, answers = runtime.session(LONG_NAME), []
    log = log_of(runtime, options.tokens)
    if "asked" in {info.name for info in runtime.sessions()}:
        runtime.delete("asked")
    asked = runtime.fork(LONG_NAME, "asked")
    for fact in log.facts:
        answer = ask(asked, fact, session.message_count)
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
    return answers


def measure(runtime: AgentRuntime, options: argparse.Namespace) -> dict[str, object]:
    """Resuming, decoding, committing, forking: of both sessions in turn, in one process; medians of some rounds, after
    each of which the files' pages are dropped from the system's cache."""
    rows: dict[str, dict[str, list[float]]] = {name: {} for name in (SHORT_NAME, LONG_NAME)}
    for name in rows:  # the first use of anything costs more
        one_round(runtime, name, {}, cold=False)
    for number in range(options.rounds):
        for name, row in rows.items():
            one_round(runtime, name, row, cold=False)
            one_round(runtime, name, row, cold=True)
        print(f"round {number + 1} of {options.rounds}", flush=True)
    result: dict[str, object] = {
        "threads": torch.get_num_threads(),
        "disk": disk_speed(runtime),
        **{name: {what: round(statistics.median(each), 4) for what, each in row.items()} for name, row in rows.items()},
    }
    result["ratios"] = {
        what: round(statistics.median(rows[LONG_NAME][what]) / statistics.median(values), 3)
        for what, values in rows[SHORT_NAME].items()
    }
    result["anonymous_mb"], result["peak_mb"] = anonymous_mb(), peak_mb()
    print(json.dumps(result, indent=1), flush=True)
    return result


def resident(runtime: AgentRuntime, options: argparse.Namespace) -> dict[str, int]:
    """What a process takes that opens the session, has some turns of 500 tokens, and writes a long answer."""
    session = runtime.session(LONG_NAME)
    for _ in range(3):
        turn(session)
    session.reply(max_tokens=64)
    result = {
        "tokens": session.token_count,
        "peak_mb": peak_mb(),
        "anonymous_mb": anonymous_mb(),
        "device_mb": runtime.tiers.device_bytes() // 1_000_000,
        "host_mb": runtime.tiers.host_bytes() // 1_000_000,
        "host_budget_mb": options.host_budget // 1_000_000,
    }
    session.close()  # as it was
    print(json.dumps(result), flush=True)
    return result


def one_round(runtime: AgentRuntime, name: str, row: dict[str, list[float]], *, cold: bool) -> None:
    def note(what: str, value: float) -> None:
        row.setdefault(what, []).append(value)

    catalog = Catalog(runtime.root)
    folder = catalog.folder(catalog.require(name))
    if "trial" in {info.name for info in runtime.sessions()}:
        runtime.delete("trial")
    fork_s = timed(lambda: runtime.fork(name, "trial"))
    trial = runtime.session("trial")
    kind = "cold" if cold else "cached"  # what of the files is in the system's cache
    own = sum(path.stat().st_size for path in trial.store.folder.iterdir() if path.stat().st_nlink == 1)
    runtime.release(name)
    note("fork_s", fork_s)
    note("fork_own_share", own / sum(path.stat().st_size for path in folder.iterdir()))
    runtime.release("trial")
    if cold:
        drop_page_cache(folder)
        drop_page_cache(catalog.folder(catalog.require("trial")))
    began = time.perf_counter()
    session = runtime.session("trial")
    note(f"open_{kind}_s", time.perf_counter() - began)
    session.append_user("Which host had a disk alert?")
    answer = session.stream_reply(max_tokens=1 + DECODED)
    next(answer)
    note(f"resume_to_first_token_{kind}_s", time.perf_counter() - began)
    began = time.perf_counter()
    written = 1 + sum(1 for _ in answer)
    reply = session.last_reply
    assert reply is not None
    note(f"decode_{kind}_tok_s", max(written, reply.usage.output_tokens) / (time.perf_counter() - began))
    for _ in range(2):  # the second time all that it asks for is in host memory
        memory = session.memory.fork()
        began = time.perf_counter()
        for token in range(500, 500 + DECODED):
            runtime.model.forward([token], memory)
    note("decode_host_tok_s", DECODED / (time.perf_counter() - began))
    turn(session)
    session.commit()
    turn_s = timed(lambda: turn(session))
    commit_s = timed(session.commit)
    note("turn_s", turn_s)
    note("commit_s", commit_s)
    note("commit_share_of_turn", commit_s / turn_s)
    runtime.release("trial")


DECODED = 48


def turn(session: Session) -> None:
    """500 tokens of a tool's output, and a short answer."""
    text, before = [], session.token_count
    while len(text) < 400:
        text.append(f"{before} disk {len(text)} ok")
    encoded = session.model.tokenizer.encode(" ".join(text))[:500]
    session.append_tool_result("shell", session.model.tokenizer.decode(encoded))
    session.reply(max_tokens=8)


def disk_speed(runtime: AgentRuntime) -> dict[str, float]:
    """What the disk gives: planes of blocks here and there, eight at once; and one file after the other."""
    catalog = Catalog(runtime.root)
    folder = catalog.folder(catalog.require(LONG_NAME))
    drop_page_cache(folder)
    paths = sorted(folder.glob("segment-*.kv"))
    files = [os.open(path, os.O_RDONLY) for path in paths]
    places = [(file, place << 20) for place in range(0, 40, 5) for file in files[::8]]
    for file in files:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        read = sum(len(part) for part in pool.map(lambda place: os.pread(place[0], 6148, place[1]), places))
    random_s = time.perf_counter() - began
    for file in files:
        os.close(file)
    began = time.perf_counter()
    in_order = sum(len(path.read_bytes()) for path in paths[1:9])
    in_order_s = time.perf_counter() - began
    return {"planes_s": round(read / 6148 / random_s), "sequential_mb_s": round(in_order / in_order_s / 1e6)}


def drop_page_cache(folder: Path) -> None:
    """So that what is read next comes from the disk. Of files that are on it; others stay."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["fill", "tile", "ask", "measure", "resident"])
    parser.add_argument("root", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--host-budget", type=int, default=2 << 30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = RuntimeConfig(host_budget=options.host_budget, trace="off" if options.what == "measure" else "sampled")
    with AgentRuntime.open(options.root, options.model, MemoryConfig(), config) as runtime:
        work = {"fill": fill, "tile": tile, "ask": question, "measure": measure, "resident": resident}[options.what]
        result = work(runtime, options)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
