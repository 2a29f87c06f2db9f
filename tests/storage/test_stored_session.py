"""Sessions that earlier versions wrote, opened with today's code: see ``tests/data/make_session.py``."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from load_example import load_module

from infllm_agent import AgentRuntime
from infllm_agent.errors import SessionMismatch
from infllm_agent.maintenance.check import check
from infllm_agent.storage.catalog import Catalog
from infllm_agent.storage.session_store import SessionStore

DATA = Path(__file__).resolve().parents[1] / "data"
ARCHIVES = sorted(DATA.glob("session-*.tar.xz"))
NAMES = ["old", "old.b2", "rounded"]


maker = load_module(DATA / "make_session.py")


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name)
def unpacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="tar")
    return folder


@pytest.fixture
def root(unpacked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(unpacked / "root", tmp_path / "root"))


def test_there_is_one_at_least() -> None:
    assert ARCHIVES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("one_thread")
def test_it_goes_on_as_it_did_then(unpacked: Path, root: Path, name: str) -> None:
    expected = safetensors.torch.load_file(unpacked / "expected" / f"{name}.safetensors")
    found = maker.going_on(root, maker.load(unpacked / "model"), name)
    assert found.keys() == expected.keys()
    # The version that made them gave the same bits in any two processes of one machine. What is read from the disk is
    # compared to the bit. Logits are computed, by a matrix product whose order of sums depends on the processor: where
    # they are not the same bits, they differ by a rounding of float32.
    for part in found.keys() - {"logits", "logits_crc"}:
        assert torch.equal(found[part], expected[part]), part
    if found["logits_crc"] != expected["logits_crc"]:
        torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_its_record_is_all_there(root: Path) -> None:
    with SessionStore.open(root, "old") as store:
        store.verify()
        assert store.generation == 3
        assert store.info.blocks > 128
        system, user, observation, called, result, answer = store.messages(0, 6)
        assert (system.role, [tool.name for tool in system.tools]) == ("system", ["weather"])
        assert system.text == "You are brief, très brief."
        assert (user.role, observation.role, observation.name) == ("user", "observation", "log")
        assert [(call.name, call.arguments, call.id) for call in called.calls] == [
            ("weather", {"city": "Zürich", "days": 2}, "call-1")
        ]
        assert (result.role, result.name, result.call_id, result.text) == ("tool", "weather", "call-1", "rain, 12 °C")
        assert store.traced() == [answer.index]
        (trace,) = store.traces()
        assert trace.queries > 0
        assert trace.sinks + trace.looked_up + trace.window == pytest.approx(1)
        assert store.state is not None
        assert store.state["arriving"]["role"] == "observation"
        assert store.announcing_message() == system
        assert observation in store.search("retry", limit=1000)


def test_all_of_the_root_is_whole(root: Path) -> None:
    assert [info.name for info in Catalog(root).list()] == NAMES
    (root / "catalog.db").unlink()
    assert [info.name for info in Catalog(root).list()] == NAMES
    for checked in check(root):
        assert checked.ok, checked


def test_another_model_is_told_apart(unpacked: Path, root: Path, tmp_path: Path) -> None:
    weights = safetensors.torch.load_file(unpacked / "model" / "model.safetensors")
    other = Path(shutil.copytree(unpacked / "model", tmp_path / "other"))
    weights = {name: weight * 2 for name, weight in weights.items()}
    safetensors.torch.save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with AgentRuntime(root, maker.load(other)) as runtime, pytest.raises(SessionMismatch, match="weights"):
        runtime.session("old")
