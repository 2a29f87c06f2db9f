"""Two replicas of Ray Serve over one folder of sessions."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402

from infllm_agent.integrations.ray_serve import ReplicaSettings, application  # noqa: E402
from infllm_agent.storage.session_store import SessionStore  # noqa: E402

PORT = 8931
URL = f"http://127.0.0.1:{PORT}/v1"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("shared")
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"port": PORT})
        memory = {"n_local": 64, "chunk_size": 16, "block_size": 4, "topk": 4, "candidates": 8, "max_cached_block": 8}
        settings = ReplicaSettings(str(root), str(tiny_model_folder), memory=memory, dtype="float32")
        serve.run(application(settings, replicas=2, cpus=0.5))
        yield root
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(messages: list[dict[str, Any]], session: str | None = None, **options: Any) -> httpx.Response:
    headers = {"X-Session-Id": session} if session else {}
    body = {"model": "tiny-model0", "messages": messages, "max_tokens": 4, **options}
    return httpx.post(f"{URL}/chat/completions", json=body, headers=headers, timeout=60)


def converse(session: str | None, turns: int) -> tuple[list[dict[str, Any]], list[httpx.Response]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"You look after {session}."}]
    answers = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"turn {turn}"})
        answer = ask(messages, session)
        assert answer.status_code == 200, answer.text
        messages.append(answer.json()["choices"][0]["message"])
        answers.append(answer)
    return messages, answers


def new_tokens(answer: httpx.Response) -> int:
    usage = answer.json()["usage"]
    return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


def test_a_named_session_stays_with_its_replica(root):
    replicas = [{answer.headers["x-replica"] for answer in converse(f"host-{n}", 3)[1]} for n in range(8)]
    assert all(len(used) == 1 for used in replicas)
    assert len(set().union(*replicas)) == 2


def test_a_session_without_a_name_moves_and_is_not_read_again(root):
    """Its requests go anywhere; each replica gets it from the other."""
    _, answers = converse(None, 12)
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    assert max(new_tokens(answer) for answer in answers[1:]) < 40
    assert len({answer.json()["session_id"] for answer in answers}) == 1


def test_a_replica_that_is_killed_loses_nothing_that_was_acknowledged(root):
    told = {name: converse(name, 2) for name in ("a", "b", "c", "d")}
    victim = told["a"][1][-1].headers["x-replica"]
    body = {"model": "tiny-model0", "messages": [{"role": "user", "content": "tell"}], "stream": True}
    broken = None
    try:
        with httpx.stream(
            "POST",
            f"{URL}/chat/completions",
            json={**body, "max_tokens": 16_000},
            headers={"X-Session-Id": "a"},
            timeout=60,
        ) as response:
            assert response.headers["x-replica"] == victim
            for number, _ in enumerate(response.iter_lines()):
                if number == 4:
                    os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)
    except httpx.HTTPError as error:
        broken = error
    assert broken is not None, "the client must see that the stream is not whole"
    for name, (messages, _) in told.items():
        end = time.monotonic() + 60
        while True:  # the router may not know yet
            answer = ask([*messages, {"role": "user", "content": "and now?"}], name)
            if answer.status_code == 200:
                break
            assert answer.status_code >= 500, answer.text
            assert time.monotonic() < end
            time.sleep(0.5)
        assert new_tokens(answer) < 40
        with SessionStore.open(root, answer.json()["session_id"], readonly=True) as store:
            stored = [(message.role, message.text) for message in store.messages()]
        assert stored[: len(messages)] == [(message["role"], message["content"]) for message in messages]
