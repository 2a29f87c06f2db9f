"""The device cache against a plain dict, and blocks on disk against what went in."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cache_machine import SHAPE, CacheAgainstDict
from hypothesis import given, settings
from hypothesis import strategies as st

from infllm_agent.blocks.layout import CRC_BYTES, BlockShape
from infllm_agent.blocks.segments import PAGE, SEGMENT_BLOCKS, BlockFiles, Marks, segment_path
from infllm_agent.blocks.store import BlockStore
from infllm_agent.errors import CorruptSession
from infllm_agent.kernels.int8 import rounded

CacheAgainstDict.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestCache = CacheAgainstDict.TestCase


def fill(store: BlockStore, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Add ``count`` random blocks; returns keys, values and representatives of each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    while len(made) < count:
        n = min(1 + len(made) % 40, count - len(made))  # some at a time, across the ends of segments
        values = torch.randn(n, SHAPE.layers, 9, 2, 4, 8, generator=generator).to(SHAPE.torch_dtype)
        first = store.add(n)
        for layer in range(SHAPE.layers):
            store.put(first, layer, values[:, layer, 0], values[:, layer, 1], values[:, layer, 2, :, 0])
        made += values.unbind()
    return made


def check(store: BlockStore, made: list[torch.Tensor]) -> None:
    assert store.count == len(made)
    for layer in range(SHAPE.layers if made else 0):
        everything, some = range(len(made)), range(0, len(made), 3)
        for blocks in (everything, some, everything):
            expected = torch.stack([made[number][layer] for number in blocks])
            assert torch.equal(store.keys(blocks, layer), expected[:, 0])
            assert torch.equal(store.values(blocks, layer), expected[:, 1])


def read_all(store: BlockStore) -> list[torch.Tensor]:
    """Every plane, and the blocks' keys of each layer."""
    shape = (store.count, store.shape.kv_heads, store.shape.head_dim)
    keys = [torch.empty(shape, dtype=store.shape.torch_dtype) for _ in range(store.shape.layers)]
    store.files.keys(keys)
    for layer in range(store.shape.layers):
        store.keys(range(store.count), layer)
        store.values(range(store.count), layer)
    return keys


def opened(folder: Path, count: int, marks: Marks, shape: BlockShape = SHAPE) -> BlockStore:
    return BlockStore.of(BlockFiles(folder, shape, count, marks))


@settings(max_examples=12, deadline=None)
@given(counts=st.lists(st.integers(0, SEGMENT_BLOCKS + 3), min_size=1, max_size=4))
def test_what_is_written_is_read_again(counts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commit after commit, each by a process that opens what the one before wrote."""
    folder, made, marks = tmp_path_factory.mktemp("blocks"), [], Marks.none()
    for turn, count in enumerate(counts):
        store = opened(folder, len(made), marks)
        made += fill(store, count, seed=turn)
        check(store, made)
        store.write()
        assert store.host_bytes() == 0
        check(store, made)
        marks = store.files.marks
    store = opened(folder, len(made), marks)
    check(store, made)
    for layer, keys in enumerate(read_all(store)):
        if made:
            assert torch.equal(keys, torch.stack([values[layer, 2, :, 0] for values in made]))
    assert list(store.files.damages()) == []


def test_several_commits_of_one_process(tmp_path: Path) -> None:
    store, made = opened(tmp_path, 0, Marks.none()), []
    for count in (3, 0, SEGMENT_BLOCKS, 5):
        made += fill(store, count, seed=count)
        store.write()
    check(opened(tmp_path, len(made), store.files.marks), made)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_forks_share_and_do_not_disturb(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A store, its forks and their forks, each going on by itself, written or not: every one keeps what it had."""
    stores = [opened(tmp_path_factory.mktemp("blocks"), 0, Marks.none())]
    made: list[list[torch.Tensor]] = [[]]
    settled = [0]  # blocks of each that will never change
    for step in range(data.draw(st.integers(1, 8))):
        i = data.draw(st.integers(0, len(stores) - 1))
        match data.draw(st.sampled_from(["add", "write", "fork"])):
            case "add":
                made[i] = made[i] + fill(stores[i], data.draw(st.integers(0, SEGMENT_BLOCKS)), seed=step)
            case "write":
                stores[i].write()
                settled[i] = stores[i].count
            case "fork":
                count = data.draw(st.integers(0, stores[i].count))
                fork = stores[i].fork(count)
                check(fork, made[i][:count])
                fork.move(tmp_path_factory.mktemp("fork"), min(settled[i], count))
                stores, made, settled = [*stores, fork], [*made, made[i][:count]], [*settled, count]
        for store, expected in zip(stores, made, strict=True):
            check(store, expected)
    for store, expected in zip(stores, made, strict=True):
        store.write()
        check(opened(store.files.folder, store.count, store.files.marks), expected)


def test_a_fork_copies_no_full_segment(tmp_path: Path) -> None:
    store = opened(tmp_path, 0, Marks.none())
    fill(store, SEGMENT_BLOCKS + 7)
    store.write()
    fork, folder = store.fork(store.count), tmp_path / "fork"
    folder.mkdir()
    fork.move(folder, store.count)
    assert segment_path(folder, 0).samefile(segment_path(tmp_path, 0))
    assert not segment_path(folder, 1).samefile(segment_path(tmp_path, 1))


def test_what_a_fork_has_in_common_is_read_once(tmp_path: Path) -> None:
    store = opened(tmp_path, 0, Marks.none())
    made = fill(store, 40)
    store.write()
    check(store, made)
    family = [store]
    for count in range(39, 30, -1):  # forks of forks of forks
        family.append(family[-1].fork(count))
        check(family[-1], made[:count])
    assert store.counters.disk > 0
    assert all(fork.counters.disk == 0 for fork in family[1:])
    (tmp_path / "fork").mkdir()
    family[1].move(tmp_path / "fork", 0)
    more = fill(family[1], 3, seed=7)
    family[1].write()
    check(family[1], made[:39] + more)  # its block 39 is another one than the original's
    check(store, made)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_eight_bits(dtype: str, tmp_path: Path) -> None:
    """Half of bfloat16's bytes; what is read is what the reference rounds to, before and after it is written."""
    shape = BlockShape(layers=2, kv_heads=3, block_size=16, head_dim=64, dtype=dtype, stored="int8")
    store = opened(tmp_path, 0, Marks.none(), shape)
    k, v = (torch.randn(2, 40, 3, 16, 64) + 5 * torch.randn(3, 1, 64) for _ in range(2))
    k[:, 7, 1] = v[:, 8, 2] = 0.0
    k, v = k.to(shape.torch_dtype), v.to(shape.torch_dtype)
    store.add(40)
    for layer in range(2):
        store.put(0, layer, k[layer], v[layer], k[layer].float().mean(2))
    for written in (False, True):
        if written:
            store.write()
        for layer in range(2):
            mean = k[layer].mean(2, keepdim=True, dtype=torch.float32).to(shape.torch_dtype).float()
            keys = (rounded(k[layer].float() - mean) + mean).to(shape.torch_dtype)
            assert torch.equal(store.keys(range(40), layer), keys)
            assert torch.equal(store.values(range(40), layer), rounded(v[layer]).to(shape.torch_dtype))
            assert (keys.float() - k[layer].float()).abs().max() < (k[layer].float() - mean).abs().max() / 100
    full = replace(shape, dtype="bfloat16", stored="model")
    half = replace(shape, dtype="bfloat16")
    assert half.stride + half.layers * half.key_bytes <= 0.55 * (full.stride + full.layers * full.key_bytes)


class Written(NamedTuple):
    path: Path
    marks: Marks


@pytest.fixture
def written(tmp_path: Path) -> Written:
    store = opened(tmp_path, 0, Marks.none())
    fill(store, 5)
    store.write()
    return Written(segment_path(tmp_path, 0), store.files.marks)


def test_any_flipped_bit_of_a_block_is_found(written: Written) -> None:
    path, marks = written
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    keys = range(PAGE, PAGE + 5 * SHAPE.layers * SHAPE.key_bytes)
    records = range(len(whole) - 5 * SHAPE.stride, len(whole))
    padding = SHAPE.stride // SHAPE.planes - SHAPE.plane_bytes(0) - CRC_BYTES
    for where in (range(PAGE), keys, records):
        for _ in range(60):
            offset = where[int(torch.randint(0, len(where), (1,), generator=generator))]
            damaged = bytearray(whole)
            damaged[offset] ^= 1 << int(torch.randint(0, 8, (1,), generator=generator))
            path.write_bytes(damaged)
            if where is records and (offset - records.start) % (SHAPE.stride // SHAPE.planes) >= (
                SHAPE.stride // SHAPE.planes - padding
            ):
                continue  # what fills up to a multiple of eight bytes
            with pytest.raises(CorruptSession, match=path.name):
                read_all(opened(path.parent, 5, marks))
            assert path.name in "".join(opened(path.parent, 5, marks).files.damages())


def test_damaged_header_short_file_and_missing_file(written: Written) -> None:
    path, marks = written
    whole = path.read_bytes()
    for damaged in (b"X" + whole[1:], whole[:100], whole[: len(whole) - SHAPE.stride + 10], whole[:-8], b""):
        path.write_bytes(damaged)
        with pytest.raises(CorruptSession, match=path.name):
            read_all(opened(path.parent, 5, marks))
    path.unlink()
    with pytest.raises(CorruptSession, match="No such file"):
        read_all(opened(path.parent, 5, marks))


def test_a_file_cut_off_under_a_running_process_is_an_error(written: Written) -> None:
    store = opened(written.path.parent, 5, written.marks)
    store.keys([0], 0)
    written.path.write_bytes(written.path.read_bytes()[: PAGE + 100])
    with pytest.raises(CorruptSession, match="cut off"):
        store.values([3], 1)
    store.keys([0], 0)  # which it has


def test_another_sessions_file_is_found_out(tmp_path: Path) -> None:
    """Of the same shape, with the same number, whole: only the marks tell."""
    stores = []
    for name in "ab":
        (tmp_path / name).mkdir()
        stores.append(opened(tmp_path / name, 0, Marks.none()))
        fill(stores[-1], 5, seed=ord(name))
        stores[-1].write()
    segment_path(tmp_path / "a", 0).replace(segment_path(tmp_path / "b", 0))
    with pytest.raises(CorruptSession, match="another session"):
        read_all(opened(tmp_path / "b", 5, stores[1].files.marks))


def test_planes_in_each_others_place_are_found_out(written: Written) -> None:
    path, marks = written
    data, plane = bytearray(path.read_bytes()), SHAPE.stride // SHAPE.planes
    first = len(data) - 5 * SHAPE.stride
    for other in (plane, SHAPE.stride):  # the next plane; the next block's
        swapped = data.copy()
        swapped[first : first + plane] = data[first + other : first + other + plane]
        swapped[first + other : first + other + plane] = data[first : first + plane]
        path.write_bytes(swapped)
        with pytest.raises(CorruptSession, match="block 0"):
            read_all(opened(path.parent, 5, marks))


def test_a_file_of_another_shape_is_refused(written: Written) -> None:
    other = BlockShape(layers=2, kv_heads=2, block_size=8, head_dim=4, dtype="float32")
    with pytest.raises(CorruptSession, match="head is damaged"):
        read_all(opened(written.path.parent, 5, written.marks, other))
    with pytest.raises(CorruptSession, match="names 1 segments"):
        opened(written.path.parent, SEGMENT_BLOCKS + 1, written.marks)


def test_leftovers_of_a_crash_are_written_over(tmp_path: Path) -> None:
    for kept in (4, 0):
        folder = tmp_path / str(kept)
        folder.mkdir()
        store = opened(folder, 0, Marks.none())
        made = fill(store, kept, seed=1)
        store.write()
        marks = store.files.marks
        fill(store, 7, seed=2)
        store.write()  # the database does not count these
        again = opened(folder, kept, marks)
        made += fill(again, 2, seed=3)
        again.write()
        check(opened(folder, kept + 2, again.files.marks), made)


def test_a_failed_write_can_be_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it fails, nothing is lost, and what was written before stays."""
    calls, armed = 0, False

    def failing(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += armed
            if armed and calls == fail_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **options)

        return call

    store, made = opened(tmp_path, 0, Marks.none()), []
    fail_at = 0
    for name in ("open", "pwritev", "fsync"):
        monkeypatch.setattr(os, name, failing(name))
    for fail_at in range(1, 16):
        made += fill(store, 1 + 20 * (fail_at % 9), seed=fail_at)
        before, stored, calls, armed = store.files.marks, store.stored, 0, True
        try:
            store.write()
            armed = False
        except OSError:
            armed = False
            assert store.stored == stored
            assert torch.equal(store.files.marks.crcs, before.crcs)
            check(opened(tmp_path, stored, before), made[:stored])
            store.write()
        check(opened(tmp_path, len(made), store.files.marks), made)
    assert store.count > 2 * SEGMENT_BLOCKS
