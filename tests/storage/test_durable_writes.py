"""``write_atomically``: the old file or the new one, whatever fails, and on stable storage when it returns."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from infllm_agent.blocks.remote import ORIGIN_FILE, Origin
from infllm_agent.platform.files import UNFINISHED, write_atomically
from infllm_agent.storage.tail import remove_other_tails


def failing(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_failure_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing)
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_a_writer_that_fails_changes_nothing(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("the rest")

    with pytest.raises(ValueError, match="the rest"):
        write_atomically(tmp_path / "file", write)
    assert os.listdir(tmp_path) == []


def test_create_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"first", create=True)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"second", create=True)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"first"


def test_files_are_private_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    path.write_bytes(b"")
    path.chmod(0o644)
    write_atomically(path, lambda file: file.writelines([b"a", b"b"]))
    assert path.read_bytes() == b"ab"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("of", ["a file", "origin.json"])
def test_the_file_is_synced_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replacing(old: Path, new: Path) -> None:
        assert UNFINISHED.fullmatch(Path(old).name)
        done.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    if of == "a file":
        write_atomically(tmp_path / "file", b"new")
    else:
        Origin("memory://bucket", base="a1").write(tmp_path)
        assert Origin.of(tmp_path) == Origin("memory://bucket", base="a1")
        assert os.listdir(tmp_path) == [ORIGIN_FILE]
    assert done == ["file", "name", "folder"]


def test_a_tail_that_was_never_complete_goes_with_the_next_commit(tmp_path: Path) -> None:
    kept, other = f"tail-{'1' * 32}.safetensors", f"tail-{'2' * 32}.safetensors"
    for name in (kept, other, f".{'3' * 32}-{other}", f".{'3' * 32}-origin.json"):
        (tmp_path / name).touch()
    remove_other_tails(tmp_path, keep=kept)
    assert set(os.listdir(tmp_path)) == {kept, f".{'3' * 32}-origin.json"}
