"""What a layer of the memory holds, given to the decode kernel as it lies there, comes to what the layer computes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, build
from torch import Tensor

from infllm_agent.config import MemoryConfig
from infllm_agent.kernels.backend import Backend, using
from infllm_agent.kernels.decode_attention import decode_attention
from infllm_agent.kernels.decode_attention.keys import Angles, DecodeKeys, bounds
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.layer import MemoryLayer
from infllm_agent.model.local_model import LocalModel

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu


def decode_keys(layer: MemoryLayer) -> DecodeKeys:
    """Of a layer that has just attended to one token and has not advanced."""
    window, far, device = layer.window, layer.far, layer.cache.k.device
    slots = torch.tensor(layer.cache.fetch(layer.selected, layer._load), dtype=torch.int64, device=device)
    angles = None
    if window.rotary is not None:
        table = far.rotary or window.rotary
        distance = None if far.rotary is not None else layer.config.n_local
        angles = Angles(*table.angles, table.rotary.interleaved, distance)
    return DecodeKeys(
        far.k,
        far.v,
        layer.cache.k,
        layer.cache.v,
        slots,
        window.k_rotated,
        window.v,
        bounds(far.n_sinks, len(layer.selected), window.start, window.stop + 1, device),
        angles,
    )


@pytest.mark.parametrize("chosen", ["triton", "plain"])
@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("llama", "contiguous"),
        ("glm4", "one_angle"),  # interleaved, and half of the channels rotate
        ("glm4", "contiguous"),
        ("gemma2", "contiguous"),  # soft-capped logits
        ("smollm3", "one_angle"),  # a layer without rotation
    ],
)
def test_a_layer_decodes_the_same(
    name: str, positions: Any, chosen: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MemoryConfig(
        n_init=5, n_local=24, block_size=8, topk=3, candidates=6, chunk_size=16, max_cached_block=9, positions=positions
    )
    model = LocalModel.attach(build(*ARCHITECTURES[name]).to(device), None, name=name)
    memory = model.new_memory(config)
    compared = 0
    original = MemoryLayer.attend

    def attend(layer: MemoryLayer, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        nonlocal compared
        expected = original(layer, q, k, v, **options)
        if q.shape[1] == 1:
            with using(chosen):
                got = decode_attention(q[:, 0], decode_keys(layer), scale=options["scale"], softcap=options["softcap"])
            torch.testing.assert_close(got.out, expected, atol=2e-5, rtol=2e-4)
            compared += 1
        return expected

    monkeypatch.setattr(MemoryLayer, "attend", attend)
    ids = torch.randint(3, 97, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    for chunk in ([ids[0]], ids[1:12], [ids[12]], *(ids[start : start + 16] for start in range(13, 93, 16))):
        model.forward(chunk, memory)
    for token in ids[93:95]:
        model.forward([token], memory)
    assert memory.store.count > config.topk
    assert compared == 4 * len(memory.layers)


@pytest.mark.parametrize("name", ["llama", "glm4", "gemma2"])
@pytest.mark.parametrize(
    "rules",
    [{}, {"positions": "one_angle", "block_key": "representatives", "repr_topk": 2, "candidates": 0}],
    ids=["default", "paper"],
)
def test_a_model_answers_the_same(name: str, rules: dict[str, Any], device: torch.device) -> None:
    """Chunks and single tokens in turn: whatever computes them, the logits are the same."""
    sizes = {"n_init": 5, "n_local": 24, "block_size": 8, "topk": 3, "candidates": 6, "chunk_size": 16}
    config = MemoryConfig(**{**sizes, "max_cached_block": 9, **rules})
    config_class, overrides = ARCHITECTURES[name]
    model = LocalModel.attach(build(config_class, overrides).to(device), None)
    ids = torch.randint(3, 97, (138,), generator=torch.Generator().manual_seed(2)).tolist()
    cuts = [0, *range(10, 107, 16), *range(107, 119), 134, 135, 136, 137]
    logits = []
    for chosen in ("triton", "plain"):
        with using(chosen):
            memory = model.new_memory(config)
            logits.append(torch.stack([model.forward(ids[a:b], memory) for a, b in pairwise(cuts)]))
    assert memory.store.count > 10
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_token_whose_candidates_are_kept_waits_for_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MemoryConfig(n_init=5, n_local=24, block_size=8, topk=3, candidates=6, chunk_size=16, max_cached_block=3)
    model = LocalModel.attach(build(*ARCHITECTURES["llama"]).to(device), None)
    memory, quiet = model.new_memory(config), 0
    attend = ContextMemory.attend

    def watched(self: ContextMemory, layer: int, *arguments: Any, **options: Any) -> Tensor:
        nonlocal quiet
        kept, before = self.layers[layer].kept, torch.cuda.get_sync_debug_mode()
        if kept is not None and kept.serve(self.length, self.store.count, config.candidate_tokens):
            quiet += 1
            torch.cuda.set_sync_debug_mode("error")
        try:
            return attend(self, layer, *arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    ids = torch.randint(3, 97, (160,), generator=torch.Generator().manual_seed(2)).tolist()
    for start in range(0, 128, 16):
        model.forward(ids[start : start + 16], memory)
    monkeypatch.setattr(ContextMemory, "attend", watched)
    for token in ids[128:]:
        model.forward([token], memory)
    assert quiet > 20 * len(memory.layers)
