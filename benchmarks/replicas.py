"""Mixed load on a server with replicas, one of which may be killed in the middle.

    infllm-agent serve --replicas 2 --root /tmp/sessions &
    python benchmarks/replicas.py --sessions 20 --seconds 600 --kill-after 300

Each session is a client of its own: it sends its whole history with its name, streams the answer, waits a little, goes
on. Printed: affinity (how often a session's request went where the one before went), time to first token, failures,
and whether everything that was acknowledged is there afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Asked:
    """One request: when, until its first token and its end, by which replica, and what came of it."""

    at: float
    first_s: float
    seconds: float
    replica: str
    ok: bool
    new_tokens: int


class Killer:
    """Kills, once it is armed, the replica of the stream that gives its first token next."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.armed = threading.Event()
        self.killed_s: float | None = None
        self._mutex = threading.Lock()

    def first_token(self, replica: str) -> None:
        with self._mutex:
            if self.armed.is_set() and self.killed_s is None:
                self.killed_s = time.monotonic() - self.began
                os.kill(int(replica.rpartition(":")[2]), signal.SIGKILL)


@dataclass
class Client:
    """A session, and what it was told."""

    name: str
    killer: Killer
    history: list[dict[str, Any]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def work(self, http: httpx.Client, model: str, began: float, seconds: float, pause_s: float, tokens: int) -> None:
        random_ = random.Random(self.name)
        time.sleep(random_.random() * pause_s)
        while time.monotonic() - began < seconds:
            question = {
                "role": "user",
                "content": f"{len(self.history)}: {random_.choice(['error 404', 'disk full'])}?",
            }
            answer, asked = self._ask(http, model, [*self.history, question], began, tokens)
            self.asked.append(asked)
            if asked.ok:
                self.history += [question, {"role": "assistant", "content": answer}]
            time.sleep(random_.expovariate(1 / pause_s))

    def _ask(
        self, http: httpx.Client, model: str, messages: list[dict[str, Any]], began: float, tokens: int
    ) -> tuple[str, Asked]:
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, first_s, whole, new, replica = "", 0.0, False, 0, ""
        sent = time.monotonic()
        try:
            with http.stream("POST", "/chat/completions", json=body, headers={"X-Session-Id": self.name}) as response:
                replica = response.headers.get("x-replica", "")
                for line in response.iter_lines():
                    if line == "data: [DONE]":
                        whole = True
                    elif response.status_code == 200 and line.startswith("data: "):
                        if not first_s:
                            first_s = time.monotonic() - sent
                            self.killer.first_token(replica)
                        event = json.loads(line[6:])
                        for choice in event.get("choices", ()):
                            text += choice["delta"].get("content") or ""
                        if usage := event.get("usage"):
                            new = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        except httpx.HTTPError:
            pass
        return text, Asked(sent - began, first_s, time.monotonic() - sent, replica, whole, new)

    def lost(self, http: httpx.Client) -> int:
        """Messages that were acknowledged and are not there."""
        if not self.history:
            return 0
        known = http.get(f"/sessions/{self.name}/messages", params={"limit": 1000}).json().get("data", [])
        stored = {(message["role"], message["text"]) for message in known}
        return sum((message["role"], message["content"]) not in stored for message in self.history)


def summary(asked: list[Asked], clients: list[Client], killed_s: float | None) -> dict[str, Any]:
    """What the requests came to; ``killed_s`` is when a replica was killed."""

    def first(requests: list[Asked]) -> dict[str, float]:
        times = sorted(request.first_s for request in requests if request.ok)
        if len(times) < 2:
            return {}
        return {"p50_s": round(statistics.median(times), 3), "p95_s": round(times[int(0.95 * (len(times) - 1))], 3)}

    pairs = [(a.replica, b.replica) for client in clients for a, b in zip(client.asked, client.asked[1:], strict=False)]
    found: dict[str, Any] = {
        "requests": len(asked),
        "failed": sum(not request.ok for request in asked),
        "failed_after_s": [round(request.seconds, 1) for request in asked if not request.ok],
        "affinity": round(sum(a == b for a, b in pairs) / max(1, len(pairs)), 4),
        "first_token": first(asked),
        "requests_s": round(len(asked) / max(request.at + request.seconds for request in asked), 2),
        "new_tokens_p95": sorted(request.new_tokens for request in asked if request.ok)[
            int(0.95 * (sum(request.ok for request in asked) - 1))
        ],
    }
    if killed_s is not None:
        found["killed_s"] = round(killed_s, 1)
        found["before"] = first([request for request in asked if request.at + request.seconds < killed_s])
        for start in (0, 20, 40, 60):
            part = [request for request in asked if killed_s + start <= request.at < killed_s + start + 20]
            found[f"after_{start}_s"] = first(part) | {"failed": sum(not request.ok for request in part)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--pause", type=float, default=5, help="mean seconds between an answer and the next question")
    parser.add_argument("--tokens", type=int, default=16, help="of each answer, at most")
    parser.add_argument(
        "--kill-after", type=float, help="seconds after which a replica is killed, in the middle of a stream"
    )
    given = parser.parse_args()
    with httpx.Client(base_url=given.url, timeout=120, limits=httpx.Limits(max_connections=None)) as http:
        model = http.get("/models").json()["data"][0]["id"]
        began = time.monotonic()
        killer = Killer(began)
        clients = [Client(f"load-{os.getpid()}-{number}", killer) for number in range(given.sessions)]
        threads = [
            threading.Thread(target=c.work, args=(http, model, began, given.seconds, given.pause, given.tokens))
            for c in clients
        ]
        for thread in threads:
            thread.start()
        if given.kill_after is not None:
            time.sleep(given.kill_after)
            killer.armed.set()
        for thread in threads:
            thread.join()
        asked = sorted((one for client in clients for one in client.asked), key=lambda one: one.at)
        lost = sum(client.lost(http) for client in clients)
    print(json.dumps(summary(asked, clients, killer.killed_s) | {"lost_messages": lost}, indent=2))


if __name__ == "__main__":
    main()
