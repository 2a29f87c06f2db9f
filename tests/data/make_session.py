"""Make ``session-<version>.tar.xz``: a root of sessions as this version writes them, for later ones to open.

    python tests/data/make_session.py tests/data/session-0.1.tar.xz

Run it before a change of the format, with the code from before it (``PYTHONPATH``), and keep the older archives. It
uses public names only. In the archive are

    model/         the model that the sessions are of, so that no later way to draw random weights matters
    root/          the sessions: "old", its branch "old.b2", and "rounded", whose blocks are stored as int8
    expected/      of each session, what it says when it is opened and goes on (``going_on``), as safetensors
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
import sys
import tarfile
import tempfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from infllm_agent import AgentRuntime, MemoryConfig
from infllm_agent.model.local_model import LocalModel
from infllm_agent.tools import ToolCall, ToolSpec

MEMORY = MemoryConfig(n_init=4, n_local=32, block_size=4, topk=6, chunk_size=16, max_cached_block=8, candidates=9)
NAMES = ("old", "old.b2", "rounded")
#: Blocks of "old": more than a segment.
BLOCKS = 131
WEATHER = ToolSpec(
    "weather",
    "Tells the weather.",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
LOGITS = 64
COLUMNS = slice(None, None, 7)


def load(model: Path) -> LocalModel:
    return LocalModel.load(str(model), dtype="float32")


def make(root: Path, model: LocalModel) -> None:
    """The sessions: what a format can hold is in one of them."""
    with AgentRuntime(root, model, MEMORY) as runtime:
        old = runtime.session("old")
        old.trace = "on"
        old.append_system("You are brief, très brief.", tools=[WEATHER])
        old.commit()
        old.append_user("the tool printed a line of its log and the agent asked what it means")
        old.append_observation("12:30 error 404, retry in 5 s", name="log")
        old.append_assistant("I ask.", calls=[ToolCall("weather", {"city": "Zürich", "days": 2}, "call-1")])
        old.append_tool_result("weather", "rain, 12 °C", call_id="call-1")
        old.reply(max_tokens=6)
        old.commit()
        while old.usage["blocks"] < BLOCKS:
            with old.stream_tool_result("shell") as stream:
                for line in range(2):
                    stream.write(f"line {line}: error 404 at 12:30, retry in 5 s\n")
            old.commit()
        old.fork("old.b2").close()
    with AgentRuntime(root, model, MEMORY.changed(block_dtype="int8")) as runtime:
        rounded = runtime.session("rounded")
        rounded.append_user("error 404 at 12:30; " * 12)
        rounded.reply(max_tokens=4)
        rounded.commit()
    old = AgentRuntime(root, model, MEMORY).session("old")
    old.stream_observation("log").write("the tool printed a line; " * 3)
    old.commit()
    os._exit(0)  # the message is still arriving


def going_on(root: Path, model: LocalModel, name: str) -> dict[str, torch.Tensor]:
    """What a stored session is and does: its log, the bytes of its memory, a greedy answer, and logits after that.

    Changes the session.
    """
    torch.set_num_threads(1)
    with AgentRuntime(root, model) as runtime:
        session = runtime.session(name)
        found: dict[str, torch.Tensor] = {
            "token_ids": torch.tensor(session.token_ids()),
            "chunks": torch.tensor(session.chunks()),
        }
        found["messages"] = torch.tensor([_digest(message) for message in session.messages()])
        for number, layer in session.memory.state().layers.items():
            parts = {"sinks": layer.sinks, **layer.window._asdict(), "candidates": layer.candidates}
            found |= {f"layer.{number}.{key}": part.clone() for key, part in parts.items() if part is not None}
        files = session.memory.store.files
        found["blocks"] = torch.tensor(
            [zlib.crc32(files.record(block).numpy().tobytes()) for block in range(files.count)]
        )
        session.reply(max_tokens=16, temperature=0.0)
        found["reply"] = torch.tensor(session.token_ids()[len(found["token_ids"]) :])
        memory = session.memory.fork()
        logits = torch.stack([model.forward([5 + 3 * step], memory).float() for step in range(LOGITS)])
        found["logits"] = logits[:, COLUMNS].contiguous()
        found["logits_crc"] = torch.tensor(zlib.crc32(logits.contiguous().numpy().tobytes()))
        found["best"] = logits.argmax(-1)
        return found


def _digest(m: Any) -> int:
    calls = [(call.name, call.arguments, call.id) for call in m.calls]
    tools = [tool.to_json() for tool in m.tools]
    text = json.dumps([m.index, m.role, m.name, m.call_id, m.text, m.time, m.start, m.end, calls, tools])
    return zlib.crc32(text.encode())


def _expect(folder: Path) -> None:
    """In a process of its own: a copy of each session is opened as after a restart."""
    for path in (folder / "root" / "sessions").glob("*/session.db"):
        with closing(sqlite3.connect(path)) as db:  # what a killed process left in SQLite's log
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    model = load(folder / "model")
    (folder / "expected").mkdir()
    for name in NAMES:
        shutil.copytree(folder / "root", folder / "copy")
        safetensors.torch.save_file(going_on(folder / "copy", model, name), folder / "expected" / f"{name}.safetensors")
        shutil.rmtree(folder / "copy")


def _make(folder: Path) -> None:
    torch.set_num_threads(1)
    make(folder / "root", load(folder / "model"))


def main(archive: Path) -> None:
    from tiny import save_tiny  # of the tests: put tests/helpers on PYTHONPATH

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_tiny(folder / "model", **sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
        for step in (_make, _expect):
            process = multiprocessing.get_context("spawn").Process(target=step, args=(folder,))
            process.start()
            process.join()
            assert process.exitcode == 0, step.__name__
        with tarfile.open(archive, "w:xz") as tar:
            for part in ("model", "root", "expected"):
                tar.add(folder / part, part)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
