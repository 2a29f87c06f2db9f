"""A live runtime under load, by the clock.

    python benchmarks/live.py streamed|mixed|many [--json OUT]

streamed  A long tool output that comes whole at the end, one that is streamed while its tool runs, and short ones
          behind it: seconds from the tool's end to the first token of the answer.
mixed     Eight sessions: four read long tool outputs without pause, four are asked short questions now and then.
          Seconds to the first token, beside those of an idle runtime; anonymous memory over time.
many      Hundreds of sessions under a ceiling of bytes: each is told a fact, later each is asked for its own.
"""

import argparse
import json
import random
import re
import statistics
import tempfile
import threading
import time
from pathlib import Path

from infllm_agent import AgentRuntime, RuntimeConfig
from infllm_agent.live.live_session import LiveSession

HOSTS = ("db-1", "db-2", "web-1", "web-2", "queue-1")
COLOURS = ("amber", "black", "blue", "brown", "green", "orange", "pink", "purple", "red", "silver", "white")
ANIMALS = ("bear", "bird", "cat", "deer", "dog", "eagle", "fish", "fox", "goat", "horse", "lion", "mouse", "owl")


def log_lines(rng: random.Random, count: int) -> list[str]:
    return [
        f"{rng.randrange(24):02}:{rng.randrange(60):02} {rng.choice(HOSTS)} request {rng.randrange(10**6)} took "
        f"{rng.randrange(2000)} ms, status {rng.choice((200, 200, 404, 503))}\n"
        for _ in range(count)
    ]


def tokens_of(runtime: AgentRuntime, text: str) -> int:
    return len(runtime.chat.encoder.encode_text(text))


def first_token(live: LiveSession, max_tokens: int) -> float:
    """Seconds from now to the first piece of the answer; the rest is read too."""
    began = time.perf_counter()
    pieces = live.stream_reply(max_tokens=max_tokens)
    seconds = 0.0
    for _ in pieces:
        seconds = seconds or time.perf_counter() - began
    return seconds or time.perf_counter() - began


def anonymous_mb() -> float:
    """Memory of this process that is not a map of files."""
    (kilobytes,) = re.findall(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    return int(kilobytes) / 1000


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def streamed(runtime: AgentRuntime, options: argparse.Namespace) -> dict:
    rng = random.Random(0)
    sample = log_lines(rng, 400)
    each = tokens_of(runtime, "".join(sample)) / len(sample)
    times: dict[str, list[float]] = {}

    def ask_after(kind: str, live: LiveSession, tokens: int, pace: float = 0.0) -> float:
        live.append_user("Read the log, then say how it looks.")
        live.flush()
        lines = log_lines(rng, int(tokens / each))
        if kind == "streamed":
            with live.stream_tool_result("sh") as sink:
                start = time.perf_counter()
                for number, line in enumerate(lines):
                    sink.write(line)
                    time.sleep(max(0.0, start + number * pace / len(lines) - time.perf_counter()))
        else:
            live.append_tool_result("sh", "".join(lines))
        seconds = first_token(live, 8)
        times.setdefault(f"{kind} {tokens}", []).append(round(seconds, 2))
        print(f"{kind:9} {tokens:6} tokens: first token after {seconds:.2f} s", flush=True)
        return seconds

    ask_after("whole", runtime.live("warm"), 2000)
    reading = ask_after("whole", runtime.live("whole"), options.tokens)
    for n in range(options.rounds):
        live = runtime.live(f"streamed{n}")
        ask_after("streamed", live, options.tokens, pace=reading)  # the tool takes as long as the reading
        for _ in range(5):  # in the same session: its history costs what it costs for either
            ask_after("whole", live, 500)
    report: dict = {"output_tokens": options.tokens, "seconds_to_first_token": times}
    medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
    report["streamed_over_short"] = round(medians[f"streamed {options.tokens}"] / medians["whole 500"], 2)
    report["whole_over_short"] = round(medians[f"whole {options.tokens}"] / medians["whole 500"], 2)
    return report


def mixed(runtime: AgentRuntime, options: argparse.Namespace) -> dict:
    talkers = [runtime.live(f"talk{n}") for n in range(4)]
    readers = [runtime.live(f"read{n}") for n in range(4)]
    failures: list[str] = []

    def question(live: LiveSession, number: int) -> float:
        live.append_user(f"Question {number}: which colour has the sky by day? One word.")
        return first_token(live, 8)

    for live in talkers:
        live.append_system("You answer in one word.")
        question(live, 0)
    idle = [question(live, n) for n in range(1, 6) for live in talkers]
    print(f"idle: p50 {quantile(idle, 0.5):.2f} s, p95 {quantile(idle, 0.95):.2f} s", flush=True)
    stop = time.monotonic() + options.seconds
    busy: list[float] = []
    half: list[int] = []  # how many of them in the first half
    memory: list[tuple[float, float, float]] = []

    def guarded(work, *arguments) -> None:
        try:
            work(*arguments)
        except Exception as error:
            failures.append(repr(error))

    def read(live: LiveSession, rng: random.Random) -> None:
        while time.monotonic() < stop:
            with live.stream_tool_result("sh") as sink:
                for line in log_lines(rng, rng.choice((60, 200, 600))):
                    sink.write(line)
                    if time.monotonic() > stop:
                        return

    def talk(live: LiveSession, rng: random.Random) -> None:
        number = 100
        while time.monotonic() < stop:
            time.sleep(rng.uniform(0, 2 * options.pause))
            busy.append(question(live, number))
            number += 1

    threads = [
        threading.Thread(target=guarded, args=(work, live, random.Random(live.name)))
        for work, lives in ((read, readers), (talk, talkers))
        for live in lives
    ]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(5)
        index = sum(s.memory.index_bytes() for s in list(runtime._sessions.values())) / 1e6
        if not half and time.monotonic() - began > options.seconds / 2:
            half.append(len(busy))
        memory.append((round(time.monotonic() - began), round(anonymous_mb()), round(index)))
        if len(memory) % 12 == 0:
            print(f"{memory[-1]}, {len(busy)} answers, p95 {quantile(busy, 0.95):.2f} s", flush=True)
    tokens = {info.name: info.tokens for info in runtime.sessions()}
    third = max(1, len(memory) // 3)
    besides = [anonymous - index for _, anonymous, index in memory]
    return {
        "seconds": options.seconds,
        "failures": failures,
        "answers": len(busy),
        "tokens": tokens,
        "idle_first_token_s": {"p50": round(quantile(idle, 0.5), 2), "p95": round(quantile(idle, 0.95), 2)},
        "busy_first_token_s": {"p50": round(quantile(busy, 0.5), 2), "p95": round(quantile(busy, 0.95), 2)},
        "busy_p95_by_half_s": [round(quantile(part, 0.95), 2) for part in (busy[: half[0]], busy[half[0] :])],
        "p95_over_idle_p95": round(quantile(busy, 0.95) / quantile(idle, 0.95), 2),
        "p95_over_idle_p50": round(quantile(busy, 0.95) / quantile(idle, 0.5), 2),
        "anonymous_mb_without_index": {
            "second_third": round(statistics.mean(besides[third : 2 * third])),
            "last_third": round(statistics.mean(besides[-third:])),
        },
        "anonymous_and_index_mb_over_time": memory[:: max(1, len(memory) // 20)],
    }


def many(runtime: AgentRuntime, options: argparse.Namespace) -> dict:
    rng = random.Random(0)
    words = {n: f"{rng.choice(COLOURS)} {rng.choice(ANIMALS)}" for n in range(options.sessions)}
    peak = before = anonymous_mb()
    began = time.monotonic()
    receipts = []
    for n, word in words.items():
        live = runtime.live(f"room{n}")
        live.append_system("You know the passwords of rooms.")
        before_it, after_it = "".join(log_lines(rng, 3)), "".join(log_lines(rng, 1))
        live.append_observation(f'{before_it}The password of room {n} is "{word}".\n{after_it}')
        receipts.append(live.append_user("Thank you, I will ask for it later."))
        peak = max(peak, anonymous_mb())
    for receipt in receipts:
        receipt.result()
    told = time.monotonic() - began
    open_then = sum(runtime.is_open(f"room{n}") for n in words)
    right, times, wrong = 0, [], []
    for n, word in words.items():
        live = runtime.live(f"room{n}")
        live.append_user(f"What is the password of room {n}?")
        start = time.perf_counter()
        text = live.reply(max_tokens=12, prefix=f'The password of room {n} is "').text
        times.append(time.perf_counter() - start)
        right += word in text
        if word not in text:
            wrong.append({"room": n, "password": word, "text": text})
        peak = max(peak, anonymous_mb())
        if n % 50 == 49:
            print(f"{n + 1} asked, {right} right, {peak:.0f} MB at most", flush=True)
    return {
        "sessions": len(words),
        "right": right,
        "wrong": wrong,
        "device_budget": runtime.config.device_budget,
        "largest_open_bytes": sum(runtime.open_sizes().values()),
        "open_after_telling": open_then,
        "anonymous_mb": {"before": round(before), "peak": round(peak)},
        "told_s": round(told),
        "answer_s": {"p50": round(quantile(times, 0.5), 2), "p95": round(quantile(times, 0.95), 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["streamed", "mixed", "many"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=50_000, help="of the long tool output")
    parser.add_argument("--rounds", type=int, default=3, help="long outputs that are streamed")
    parser.add_argument("--seconds", type=float, default=600, help="of the mixed load")
    parser.add_argument("--pause", type=float, default=15, help="mean seconds between a session's questions")
    parser.add_argument("--sessions", type=int, default=300)
    parser.add_argument("--device-budget", type=int, default=2 << 30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    config = RuntimeConfig(device_budget=options.device_budget if options.what == "many" else None)
    with tempfile.TemporaryDirectory() as root, AgentRuntime.open(root, options.model, config=config) as runtime:
        report = {"what": options.what, "model": options.model, **globals()[options.what](runtime, options)}
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
