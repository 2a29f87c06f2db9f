"""``infllm-agent serve``: mistakes cost one line, and its end is orderly."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

KEY = "a-key-of-some-length"


@contextmanager
def started(cli: Any, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The command in a process of its own, and the root of its URLs."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        process = cli.start("serve", "--port", "0", *options)
    try:
        line = process.stderr.readline().decode()
        assert line.startswith("serving tiny-model0 at http://"), line + process.stderr.read().decode()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--host", "0.0.0.0"], "could read and delete all sessions"),
        (["--port", "99999"], "99999"),
        (["--keys", "/nowhere/keys"], "/nowhere/keys cannot be read"),
        (["--body-bytes", "huge"], "huge"),
        (["--concurrent", "0"], "0"),
        (["--temperature", "-1"], "-1"),
    ],
)
def test_bad_usage(cli, options, says):
    result = cli("serve", *options)
    assert result.code == 2
    assert says in result.error


def test_a_port_in_use_is_told_before_the_model_is_loaded(cli):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = cli("serve", "--port", str(taken.getsockname()[1]), "--model", "/nowhere")
    assert result.code == 2
    assert "cannot listen on 127.0.0.1" in result.error


def test_it_serves_with_keys_and_ends_in_order(cli):
    with started(cli, "--max-tokens", "5", INFLLM_API_KEYS=f"ops={KEY}") as (process, url):
        assert url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
            body = {"model": "tiny-model0", "messages": [{"role": "user", "content": "hi"}], "session_id": "talk"}
            answer = client.post("/chat/completions", json=body).json()
            assert answer["usage"]["completion_tokens"] == 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert cli.store("ops:talk").messages()[0].text == "hi"


@pytest.mark.parametrize("finished", [True, False])
def test_an_answer_under_way_ends_before_the_server_does(cli, finished):
    """One that takes longer than the grace is ended with an error, and taken back."""
    body = {
        "model": "tiny-model0",
        "messages": [{"role": "user", "content": "tell"}],
        "max_tokens": 150 if finished else 100_000,
        "stream": True,
        "session_id": "tale",
    }
    lines: list[str] = []
    begun = threading.Event()
    with started(cli, "--grace-s", "30" if finished else "1", "--most-tokens", "100000") as (process, url):

        def read() -> None:
            with httpx.stream("POST", url + "/chat/completions", json=body, timeout=60) as response:
                for line in filter(None, response.iter_lines()):
                    lines.append(line)
                    begun.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert begun.wait(30)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert process.wait(30) == 0
    if finished:
        assert lines[-1] == "data: [DONE]"
        assert len(cli.store("tale").messages()) == 2
    else:
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "stopping"
        assert "tale" not in cli("sessions", "list").out
