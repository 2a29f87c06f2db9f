"""Where models come from: folders, and a hub that is served here."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from infllm_agent.errors import ModelNotFound
from infllm_agent.model import resolve


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("INFLLM_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert resolve.default_cache_dir() == Path("/own")
    monkeypatch.delenv("INFLLM_CACHE")
    assert resolve.default_cache_dir() == Path("/xdg/infllm-agent")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert resolve.default_cache_dir() == Path("/home/ada/.cache/infllm-agent")


def test_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve.resolve_model(tmp_path) == resolve.resolve_model(str(tmp_path)) == str(tmp_path.resolve())


def test_folder_without_config(tmp_path):
    with pytest.raises(ModelNotFound, match=r"model folder \".*\" has no config.json"):
        resolve.resolve_model(tmp_path)


def test_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelNotFound, match=r"model\.gguf\" is a file"):
        resolve.resolve_model(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a b", "", Path("absent")])
def test_absent_folder_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(resolve, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ModelNotFound, match="no such folder"):
        resolve.resolve_model(name)


def resolve_in_new_process(name: str, home: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """The hub's client reads its settings at import, hence a process of its own."""
    script = (
        "import sys; from infllm_agent.errors import ModelNotFound; "
        "from infllm_agent.model.resolve import resolve_model\n"
        "try: print(resolve_model(sys.argv[1]))\n"
        "except ModelNotFound as error: print('error:', error)"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    environment = kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", script, name]
    root = Path(resolve.__file__).parents[2]
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)


def test_unknown_model_is_one_line_without_noise(tmp_path):
    result = resolve_in_new_process("org/absent", tmp_path, "http://127.0.0.1:9")  # nothing listens there
    (line,) = result.stdout.splitlines()
    assert line.startswith(
        'error: model "org/absent" not found: no folder ./org/absent, not a packaged model (smollm2), not in the hub ('
    )
    assert line.endswith("Give a folder with config.json, or a hub id (org/name), or use --model smollm2.")
    assert result.stderr == ""


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers what the hub's client asks for one repository, org/tiny."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    files: ClassVar = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "original/model.bin": b"",
        "notes.md": b"",
    }

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/org/tiny/tree/{self.commit}"):
            tree = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in self.files.items()]
            body = json.dumps(tree).encode()
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            body = json.dumps({"id": "org/tiny", "sha": self.commit, "siblings": siblings}).encode()
        elif path.startswith(f"/org/tiny/resolve/{self.commit}/"):
            body = self.files[path.split("/", 5)[5]]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_hub_model_is_downloaded_then_found_offline(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        first = resolve_in_new_process("org/tiny", tmp_path, endpoint)
    finally:
        server.shutdown()
        server.server_close()
    folder = Path(first.stdout.strip())
    assert folder.is_dir(), first
    assert first.stderr == ""
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert resolve_in_new_process("org/tiny", tmp_path, endpoint).stdout.strip() == str(folder)


def test_wanted_files_are_one_set_of_weights():
    both = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"]
    assert "pytorch_model.bin" not in resolve._wanted_files(both)
    assert resolve._wanted_files(["pytorch_model.bin", "vocab.txt", "README.md"]) == ["pytorch_model.bin", "vocab.txt"]


def test_snapshot_lacking_a_shard_is_not_whole(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    assert not resolve._has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert resolve._has_weights(tmp_path)
