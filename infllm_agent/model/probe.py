"""What a model does with positions, measured: whatever cannot be served exactly is refused by name.

Forwarding with all positions zero makes a model's own rotary embedding the identity: the attention function then gets
queries and keys unrotated. Which layers rotate, and how, is not read from the model's class or configuration: the
same tokens go through once with true positions and once with zeros, and the two must differ by a rotation that we
can redo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import UnsupportedModel
from infllm_agent.kernels.rotary import Rotary
from infllm_agent.memory.spec import LayerSpec, block_shape
from infllm_agent.model.attention_hook import register, set_attention

PROBE = "infllm_probe"
PROBE_TOKENS = 24


@dataclass
class _Seen:
    """What one layer handed to the attention function during a probe."""

    q: Tensor
    k: Tensor
    v: Tensor
    sliding_window: int | None
    extra: list[str]


class _Probe:
    """Records what each layer hands over. Its output does not depend on positions, so that two probes at different
    positions see the same hidden states in every layer."""

    def __init__(self) -> None:
        self.seen: dict[int, _Seen] = {}
        self.repeated = False


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    memory: _Probe | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if memory is not None:
        layer: int = getattr(module, "layer_idx", -1)
        memory.repeated |= layer in memory.seen or layer < 0
        extra = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _HARMLESS]
        memory.seen[layer] = _Seen(query[0], key[0], value[0], sliding_window, extra)
    repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return repeated.transpose(1, 2), None


#: Tensors that models pass along to every attention function and that change nothing here.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings"}

register(PROBE, _probe_attention)


@torch.inference_mode()
def probe(model: Any, name: str) -> dict[int, LayerSpec]:
    """Measure how each attention layer treats positions.

    Raises:
        UnsupportedModel: naming the model and what about it cannot be served.
    """

    def refuse(reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{name} ({type(model).__name__}) is not supported: {reason}")

    ids = probe_ids(model)
    positions = torch.tensor([[*range(PROBE_TOKENS // 2), *range(100, 100 + PROBE_TOKENS // 2)]], device=ids.device)
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention", "attention"}:
        raise refuse(f"it has layers of type {', '.join(sorted(unknown))}")
    if not set_attention(model, PROBE):
        raise refuse("its attention does not go through transformers' attention interface")
    try:
        rotated, rotaries = _probe_at(model, ids, positions), _rotaries(model)
        plain = _probe_at(model, ids, torch.zeros_like(positions))
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise refuse(f"it does not take the attention interface's arguments ({error})".replace("\n", " ")) from error
    if rotated.repeated or plain.repeated:
        raise refuse("a layer attends more than once in a forward")
    n_layers = int(text_config.num_hidden_layers)
    if not plain.seen:
        raise refuse("its attention does not go through transformers' attention interface")
    if len(plain.seen) != n_layers:
        raise refuse(f"only {len(plain.seen)} of its {n_layers} layers are attention; the others keep their own state")
    specs = {}
    for layer, seen in sorted(plain.seen.items()):
        if seen.extra:
            raise refuse(f"layer {layer} passes {', '.join(seen.extra)} to its attention, which has no place for it")
        if seen.k.shape[-1] != seen.v.shape[-1]:
            raise refuse(f"layer {layer} has keys of {seen.k.shape[-1]} and values of {seen.v.shape[-1]} channels")
        other = rotated.seen[layer]
        if relative_error(other.v, seen.v) > 1e-3:
            raise refuse("positions reach it by another way than rotary embedding")
        specs[layer] = LayerSpec(
            q_heads=seen.q.shape[0],
            kv_heads=seen.k.shape[0],
            head_dim=seen.k.shape[-1],
            rotary=_find_rotary(layer, seen, other, positions[0], rotaries, refuse),
            sliding_window=seen.sliding_window,
        )
    remembering = {number: spec for number, spec in specs.items() if spec.sliding_window is None} or specs
    try:
        block_shape(MemoryConfig(), remembering, model.dtype)
    except ValueError as error:
        raise refuse(str(error)) from error
    return specs


def _probe_at(model: Any, ids: Tensor, positions: Tensor) -> _Probe:
    record = _Probe()
    model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, memory=record)
    return record


def _rotaries(model: Any) -> list[Rotary]:
    """List every rotation that the model's buffers could mean: each set of frequencies, in both channel layouts."""
    frequencies: list[Tensor] = []
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dim() == 1:
            value = buffer.detach().double().cpu().clone()
            if not any(value.shape == other.shape and torch.equal(value, other) for other in frequencies):
                frequencies.append(value)
    return [Rotary(value, interleaved) for value in frequencies for interleaved in (False, True)]


def _find_rotary(
    layer: int,
    plain: _Seen,
    rotated: _Seen,
    positions: Tensor,
    candidates: Sequence[Rotary],
    refuse: Callable[[str], UnsupportedModel],
) -> Rotary | None:
    """Find the rotation that turns the layer's queries and keys at position zero into those at ``positions``."""
    if torch.equal(plain.q, rotated.q) and torch.equal(plain.k, rotated.k):
        return None
    best, best_error = None, float("inf")
    for rotary in candidates:
        if 2 * rotary.inv_freq.shape[0] > plain.q.shape[-1]:
            continue
        angles = rotary.angles(positions)
        pairs = ((plain.q, rotated.q), (plain.k, rotated.k))
        error = max(relative_error(rotary.rotate(x.float(), angles), y.float()) for x, y in pairs)
        if error < best_error:
            best, best_error = rotary, error
    if best is None or best_error > (1e-3 if plain.q.dtype in (torch.float32, torch.float64) else 0.03):
        raise refuse(f"layer {layer} treats positions in a way that no rotary embedding of its own reproduces")
    return best


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))


def probe_ids(model: Any) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7919 % vocabulary)[None]
