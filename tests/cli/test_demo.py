"""The demo from end to end on the packaged model, at a small size: its report and its restart, not its accuracy."""

from __future__ import annotations

import io
import json
import os
import subprocess

import pytest
from rich.console import Console

from infllm_agent.bench.oplog import Event, generate
from infllm_agent.chat.format import ChatFormat
from infllm_agent.cli import demo
from infllm_agent.errors import InfLLMError
from infllm_agent.runtime import AgentRuntime


def as_messages(events: list[Event]) -> list[dict[str, str]]:
    return [{"role": event.role, "content": event.text} for event in events]


@pytest.mark.model
def test_the_truncated_history_is_the_chat_template_over_the_latest_messages(smollm2_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    chat = ChatFormat(tokenizer)
    events = [
        event
        for event in generate(1, 3000, lambda event: len(event.text) // 3).events
        if event.role in ("system", "user", "assistant")
    ]
    for room in (200, 700, 10**6):
        ids = demo.latest_messages(chat, events, room)
        assert len(ids) <= room
        kept = next(n for n in range(len(events)) if len(_template(tokenizer, events, n)) <= room)
        assert ids == _template(tokenizer, events, kept)


def _template(tokenizer, events: list[Event], dropped: int) -> list[int]:
    messages = as_messages([events[0], *events[1 + dropped :]])
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]


@pytest.mark.model
@pytest.mark.slow
def test_it_reports_what_it_promises_and_restarts_in_a_new_process(smollm2_path, tmp_path, monkeypatch):
    processes = []
    run_process = subprocess.run

    def seen(command, **options):
        processes.append(command)
        return run_process(command, **options)

    monkeypatch.setattr(subprocess, "run", seen)
    shown = io.StringIO()
    result = demo.run(tmp_path, model="smollm2", tokens=3000, seed=7, console=Console(file=shown, width=120))

    assert json.loads(json.dumps(result)) == result
    assert result["tokens"] >= 3000
    assert result["window"] == 8192
    assert result["memory"]["asked"] == result["truncated"]["asked"] == 6
    assert result["restart"]["asked"] == 2
    for part in ("memory", "truncated", "restart"):
        assert 0 <= result[part]["correct"] <= result[part]["asked"]
    assert result["attended"]["asked"] == 8
    assert 0 <= result["attended"]["found"] <= 8
    assert result["ingest_tok_s"] > 0
    assert result["peak_rss_mb"] > 100
    assert result["seconds"] > 0

    # The new process took everything before its question from the disk.
    ((executable, *_),) = processes
    assert os.path.basename(executable).startswith("python")
    assert 0 < result["restart"]["prefilled_tokens"] < 100
    assert result["restart"]["reused_tokens"] > result["tokens"]
    assert 0 < result["restart"]["first_token_s"] < result["seconds"]

    with AgentRuntime.open(tmp_path, "smollm2") as runtime:
        texts = [message.text for message in runtime.session(demo.SESSION).messages()]
    for answer in [*result["questions"], *result["questions_after_restart"]]:
        assert texts[texts.index(answer["question"]) + 1] == answer["text"]
    assert "restart: first token" in shown.getvalue()

    with pytest.raises(InfLLMError, match="holds a session called demo already"):
        demo.run(tmp_path, tokens=3000, console=Console(file=io.StringIO()))
