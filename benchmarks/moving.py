"""What it costs to move a long session from one replica to another.

    python benchmarks/million.py tile ROOT --tokens 100000      # a session of 100K tokens, in a minute or two
    python benchmarks/moving.py ROOT --session million

Two servers share ROOT; with --bucket URL each has a folder of its own, and blocks come from the bucket. The first
answers and has the session open; then the second is asked: it has the first one commit and close (or fetches what that
one has published), opens the session, and answers. Printed, for each answer: seconds to the first token, bytes that the
server read from files for it, and beside them what the session has on disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from infllm_agent.maintenance.bucket import Bucket
from infllm_agent.storage.catalog import Catalog


def start(root: Path, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "infllm_agent", "serve", "--shared", "--root", str(root), "--port", "0"]
    server = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if " at http" in line:
            return server, line.rpartition(" ")[2].strip()
    raise SystemExit(f"the server ended with code {server.wait()}")


def read_bytes(server: subprocess.Popen[str]) -> int:
    """Bytes that a process has read so far, from the system's cache or the disk."""
    for line in Path(f"/proc/{server.pid}/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise SystemExit("this script reads /proc: it needs Linux")


def ask(url: str, session: str, tokens: int) -> dict[str, Any]:
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "What was the last error?"}],
        "session_id": session,
        "append": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens,
    }
    first_s, usage = None, {}
    with httpx.Client(base_url=url, timeout=300) as http:
        body["model"] = http.get("/models").json()["data"][0]["id"]
        sent = time.perf_counter()
        with http.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise SystemExit(response.read().decode())
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if first_s is None and any(choice["delta"].get("content") for choice in event["choices"]):
                    first_s = time.perf_counter() - sent
                usage = event.get("usage") or usage
    return {"first_token_s": None if first_s is None else round(first_s, 2), "usage": usage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--session", default="million")
    parser.add_argument("--rounds", type=int, default=3, help="moves to and fro")
    parser.add_argument("--tokens", type=int, default=8, help="of each answer")
    parser.add_argument("--bucket", help="such as file:///tmp/bucket")
    given, options = parser.parse_known_args()
    folder = Catalog(given.root).folder(Catalog(given.root).require(given.session))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(json.dumps({"session_mb": round(size / 1e6, 1)}), flush=True)
    with tempfile.TemporaryDirectory(prefix="moving-", dir=given.root.parent) as other:
        roots = [given.root, Path(other)] if given.bucket else [given.root] * 2
        if given.bucket:
            began = time.perf_counter()
            done = Bucket(given.bucket).publish(given.root, given.session)
            print(
                json.dumps({"published_mb": done.bytes // 10**6, "s": round(time.perf_counter() - began, 1)}),
                flush=True,
            )
            options += ["--bucket", given.bucket]
        measure(given, [start(root, options) for root in roots])


def measure(given: argparse.Namespace, servers: list[tuple[subprocess.Popen[str], str]]) -> None:
    try:
        for move in range(2 * given.rounds):
            server, url = servers[move % 2]
            for what in ("moved", "again"):
                before = read_bytes(server)
                row = {what: move, **ask(url, given.session, given.tokens)}
                row["read_mb"] = round((read_bytes(server) - before) / 1e6, 1)
                print(json.dumps(row), flush=True)
    finally:
        for server, _ in servers:
            server.terminate()
        for server, _ in servers:
            server.wait(60)


if __name__ == "__main__":
    main()
