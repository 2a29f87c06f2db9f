"""A transformers model that answers from a memory: loading, attaching without patching, refusing what cannot work.

Every attention layer calls a function that transformers lets us register; keyword arguments given to the model's
forward reach it, so the memory travels as one. Forwarding with all positions zero makes the model's own rotary
embedding the identity: the function gets queries and keys unrotated and the memory rotates them itself.

Which layers rotate, and how, is not read from the model's class or configuration but measured (``probe``): the same
tokens go through once with true positions and once with zeros, and the two must differ by a rotation we can redo.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.masking_utils import AttentionMaskInterface

from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, ModelNotFound, UnsupportedModel
from infllm_agent.hub import resolve_model
from infllm_agent.kernels.rotary import Rotary
from infllm_agent.memory import ContextMemory, LayerSpec, block_shape

ATTENTION = "infllm"
PROBE = "infllm_probe"
PROBE_TOKENS = 24


class Memory(Protocol):
    """What the attention function needs of a memory (``ContextMemory`` or a reference)."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None
    ) -> Tensor: ...

    def advance(self, n: int) -> None: ...


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    memory: Memory | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (1, q_heads, n, head_dim) in, (1, n, q_heads, head_dim) out."""
    if memory is None:
        raise ValueError('attn_implementation="infllm" needs a forward with memory=...; use LocalModel.forward')
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer: int = cast(Any, module).layer_idx
    out = memory.attend(layer, query[0].contiguous(), key[0], value[0], scale=scale, softcap=softcap)
    return out.transpose(0, 1).unsqueeze(0), None


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

AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(PROBE, _probe_attention)
for _name in (ATTENTION, PROBE):
    AttentionMaskInterface.register(_name, lambda *args, **kwargs: None)


@dataclass
class LocalModel:
    """A causal language model with its tokenizer, attached to the memory's attention.

    Attributes:
        specs: what the memory needs of each attention layer, by the model's layer number.
        window: the longest distance the model was trained on, in tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    specs: dict[int, LayerSpec]
    window: int
    device: torch.device
    dtype: torch.dtype
    eos_ids: frozenset[int] = field(default_factory=frozenset)
    lock: threading.RLock = field(default_factory=threading.RLock)  # one forward at a time
    _digest: str | None = None

    @classmethod
    def load(
        cls,
        model: str = "smollm2",
        *,
        device: str = "auto",
        dtype: str = "auto",
        progress: Callable[[str], None] | None = None,
    ) -> LocalModel:
        """Load a packaged alias, a local folder or a hub id.

        Args:
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
            dtype: ``auto`` (bfloat16 where the processor computes in it, else float32), or a torch dtype's name.

        Raises:
            ModelNotFound: nothing there by that name.
            UnsupportedModel: the memory cannot serve it exactly.
            ConfigError: an unknown device or dtype.
        """
        path = resolve_model(model, progress=progress)
        target = _device(device)
        precision = _dtype(dtype, target)
        try:
            config = AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=precision)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelNotFound(f'model "{model}" could not be loaded from {path}: {reason}') from error
        return cls.attach(loaded.to(target), tokenizer, name=str(model))

    @classmethod
    def attach(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> LocalModel:
        """Attach the memory to a model that is already loaded (``detached`` gives it back for a while).

        Raises:
            UnsupportedModel: the memory cannot serve it exactly; the model is left as it was.
        """
        model.eval()
        name = name or type(model).__name__
        text_config = model.config.get_text_config()
        before = model.config._attn_implementation
        window = _trained_window(text_config)
        try:
            specs = probe(model, name)
            if all(spec.sliding_window is not None for spec in specs.values()):
                # A model whose every layer slides has no layer that sees everything: the memory serves them all,
                # and the model's window is the one its layers were trained with.
                window = min(window, *(spec.sliding_window or window for spec in specs.values()))
                specs = {number: replace(spec, sliding_window=None) for number, spec in specs.items()}
            local = cls(
                name=name,
                model=model,
                tokenizer=tokenizer,
                specs=specs,
                window=window,
                device=model.device,
                dtype=model.dtype,
                eos_ids=_eos_ids(model),
            )
            local._check_against_own_attention()
            _set_attention(model, ATTENTION)
        except BaseException:
            _set_attention(model, before)
            raise
        return local

    def new_memory(self, config: MemoryConfig | None = None) -> ContextMemory:
        """An empty memory for one session.

        Raises:
            ConfigError: the configuration needs more than the model's window.
        """
        config = config or self.default_memory()
        self.check_memory(config)
        return ContextMemory(config, self.specs, self.dtype, self.device)

    def default_memory(self) -> MemoryConfig:
        """The default configuration, scaled down for a model whose window is too small for it."""
        config = MemoryConfig()
        while config.attended_keys > self.window and config.n_local > 16:
            config = MemoryConfig(
                **{
                    **config.model_dump(),
                    "n_local": config.n_local // 2,
                    "n_init": config.n_init // 2,
                    "block_size": max(config.block_size // 2, config.repr_topk),
                    "chunk_size": config.chunk_size // 2,
                }
            )
        return config

    def check_memory(self, config: MemoryConfig) -> None:
        """Raise ConfigError unless a step's keys fit the model's window."""
        if config.attended_keys > self.window:
            raise ConfigError(
                f"a step would attend to {config.attended_keys} keys (n_init {config.n_init} + topk·block_size "
                f"{config.topk * config.block_size} + window, block and chunk {config.window_capacity}), but the "
                f"window of {self.name} is {self.window} tokens: lower n_local, topk or chunk_size"
            )

    def digest(self) -> str:
        """A fingerprint of the weights: names, shapes and a sample of the values of every parameter."""
        if self._digest is None:
            digest = hashlib.sha256(type(self.model).__name__.encode())
            for name, parameter in self.model.named_parameters():
                flat = parameter.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes()
                digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample)
            for number, spec in self.specs.items():
                frequencies = spec.rotary.inv_freq.numpy().tobytes() if spec.rotary else b""
                digest.update(f"{number}{spec.sliding_window}".encode() + frequencies)
            self._digest = digest.hexdigest()
        return self._digest

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int], memory: Memory) -> Tensor:
        """Stream one chunk into the memory; returns the logits (vocab,) float32 after its last token."""
        return self._step(token_ids, memory, last_only=True)[-1]

    @torch.inference_mode()
    def forward_all(self, token_ids: Sequence[int], memory: Memory) -> Tensor:
        """As ``forward``, but the logits (n, vocab) after every token of the chunk."""
        return self._step(token_ids, memory, last_only=False)

    @contextlib.contextmanager
    def detached(self, attention: str = "sdpa") -> Iterator[Any]:
        """The model with transformers' own attention, for as long as the ``with`` lasts."""
        with self.lock:
            _set_attention(self.model, attention)
            try:
                yield self.model
            finally:
                _set_attention(self.model, ATTENTION)

    def _step(self, token_ids: Sequence[int], memory: Memory, *, last_only: bool) -> Tensor:
        with self.lock:
            ids = torch.tensor([list(token_ids)], device=self.device)
            logits = self._logits(ids, memory, last_only=last_only)
            memory.advance(len(token_ids))
            return logits.float()

    def _logits(self, ids: Tensor, memory: Memory, *, last_only: bool) -> Tensor:
        out = self.model(
            input_ids=ids,
            position_ids=torch.zeros_like(ids),
            use_cache=False,
            logits_to_keep=1 if last_only else 0,
            memory=memory,
        )
        return out.logits[0]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _check_against_own_attention(self) -> None:
        """The last word: a short text in two chunks must give the logits of the model's own eager attention."""
        ids = _probe_ids(self.model)
        _set_attention(self.model, "eager")
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        _set_attention(self.model, ATTENTION)
        n = PROBE_TOKENS
        config = MemoryConfig(n_init=0, n_local=n, block_size=n, repr_topk=1, topk=0, chunk_size=n, max_cached_block=0)
        memory = ContextMemory(config, self.specs, self.dtype, self.device)
        parts = []
        for chunk in (ids[:, :10], ids[:, 10:]):
            parts.append(self._logits(chunk, memory, last_only=False).float())
            memory.advance(chunk.shape[1])
        got = torch.cat(parts)
        error = _relative(got - got.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True))
        if not error < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1):
            raise UnsupportedModel(
                f"{self.name} ({type(self.model).__name__}): with the memory's attention its logits differ from its "
                f"own by {error:.1%}, so something in it is not served; it is refused rather than computed wrongly"
            )


@torch.inference_mode()
def probe(model: Any, name: str) -> dict[int, LayerSpec]:
    """Measure how each attention layer treats positions.

    Raises:
        UnsupportedModel: naming the model and what about it cannot be served.
    """

    def refuse(reason: str) -> UnsupportedModel:
        return UnsupportedModel(f"{name} ({type(model).__name__}) is not supported: {reason}")

    ids = _probe_ids(model)
    positions = torch.tensor([[*range(PROBE_TOKENS // 2), *range(100, 100 + PROBE_TOKENS // 2)]], device=ids.device)
    text_config = model.config.get_text_config()
    layer_types = set(getattr(text_config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention", "attention"}:
        raise refuse(f"it has layers of type {', '.join(sorted(unknown))}")
    if not _set_attention(model, PROBE):
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
        if _relative(other.v, seen.v) > 1e-3:
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
    """Every rotation that the model's buffers could mean: each set of frequencies, in both channel layouts."""
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
    """The rotation that turns the layer's queries and keys at position zero into those at ``positions``."""
    if torch.equal(plain.q, rotated.q) and torch.equal(plain.k, rotated.k):
        return None
    best, best_error = None, float("inf")
    for rotary in candidates:
        if 2 * rotary.inv_freq.shape[0] > plain.q.shape[-1]:
            continue
        angles = rotary.angles(positions)
        pairs = ((plain.q, rotated.q), (plain.k, rotated.k))
        error = max(_relative(rotary.rotate(x.float(), angles), y.float()) for x, y in pairs)
        if error < best_error:
            best, best_error = rotary, error
    if best is None or best_error > (1e-3 if plain.q.dtype in (torch.float32, torch.float64) else 0.03):
        raise refuse(f"layer {layer} treats positions in a way that no rotary embedding of its own reproduces")
    return best


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-20))


def _probe_ids(model: Any) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return (torch.arange(1, PROBE_TOKENS + 1, device=model.device) * 7919 % vocabulary)[None]


def _set_attention(model: Any, implementation: str) -> bool:
    """Switch the model's attention; False if it would not be switched."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.set_attn_implementation(implementation)
        except ValueError:
            return False
    return bool(model.config._attn_implementation == implementation)


def _trained_window(text_config: Any) -> int:
    """The longest distance the rotation measured by ``probe`` was trained for."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this length the model would switch to other frequencies
        return int(rope["original_max_position_embeddings"])
    return int(getattr(text_config, "max_position_embeddings", 0) or 2**31)


def _eos_ids(model: Any) -> frozenset[int]:
    ids = getattr(model.generation_config, "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'device "{name}" cannot be used: {str(error).splitlines()[0]}') from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type != "cpu" or _cpu_computes_bfloat16() else torch.float32
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise ConfigError(f'dtype "{name}" is unknown; use auto, float32, bfloat16 or float16')
    return known[name]


def _cpu_computes_bfloat16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
