"""The package without LangChain, which is an extra: in a process where it cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import json, sys

EXTRA = ("langchain", "langgraph", "langsmith")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(EXTRA):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
root, model = sys.argv[1:]
"""
IN_PYTHON = """
from infllm_agent import AgentRuntime

for resumed in (False, True):
    with AgentRuntime.open(root, model) as runtime:
        session = runtime.session("ops")
        assert session.message_count == (2 if resumed else 0)
        session.append_user("What failed?")
        assert session.reply(max_tokens=4).usage.output_tokens <= 4
        session.commit()
"""
ON_THE_COMMAND_LINE = """
from infllm_agent.cli.app import main

assert main(["ask", "ops", "And then?", "--root", root, "--model", model, "--max-tokens", "4"]) == 0
"""
ON_THE_SERVER = """
from fastapi.testclient import TestClient

from infllm_agent.integrations.server import create_app

def called(arguments):
    assert json.loads(arguments)["host"] == "db-3"

LOOK = {
    "name": "look",
    "description": "Look at a host.",
    "parameters": {"type": "object", "properties": {"host": {"enum": ["db-3"]}}, "required": ["host"]},
}
with AgentRuntime.open(root, model) as runtime, TestClient(create_app(runtime)) as client:
    name = client.get("/v1/models").json()["data"][0]["id"]
    chat = {"model": name, "messages": [{"role": "user", "content": "What failed?"}], "max_tokens": 4}
    whole = client.post("/v1/chat/completions", json=chat).json()
    text = whole["choices"][0]["message"]["content"]
    assert text and whole["usage"]["completion_tokens"] <= 4, whole

    streamed = client.post("/v1/chat/completions", json=chat | {"stream": True})
    *events, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert done == "[DONE]"

    tool = {"type": "function", "function": LOOK}
    asked = chat | {"tools": [tool], "tool_choice": "required", "max_tokens": 100}
    (call,) = client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["tool_calls"]
    called(call["function"]["arguments"])

    asked = {"model": name, "input": "What failed?", "max_output_tokens": 100}
    calling = {"tools": [{"type": "function", **LOOK}], "tool_choice": "required"}
    answer = client.post("/v1/responses", json=asked | calling)
    (item,) = answer.json()["output"]
    called(item["arguments"])
    assert client.post("/v1/responses", json=asked | {"previous_response_id": answer.json()["id"]}).status_code == 200
"""


def run(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    free = "\nassert not [name for name in sys.modules if name.startswith(EXTRA)]\n"
    command = [sys.executable, "-c", BLOCK + program + free, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_all_else_works(tmp_path, tiny_model_folder):
    done = run(IN_PYTHON + ON_THE_COMMAND_LINE + ON_THE_SERVER, tmp_path, tiny_model_folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    ["from infllm_agent.integrations.langchain import ChatInfLLM", "import infllm_agent.integrations.langgraph"],
)
def test_the_error_says_what_to_install(tmp_path, program):
    done = run(program, tmp_path, tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith(' needs langchain-core: pip install "infllm-agent[langchain]"')
