"""A transformers model that answers from a memory: loading, attaching, detaching, forwards.

The model is forwarded with all positions zero, which makes its own rotary embedding the identity; the memory rotates
queries and keys itself (see ``probe``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from infllm_agent.blocks.budgets import Tiers
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError, ModelNotFound, UnsupportedModel
from infllm_agent.memory.context import ContextMemory
from infllm_agent.memory.spec import LayerSpec
from infllm_agent.model.attention_hook import ATTENTION, Memory, set_attention
from infllm_agent.model.decode_batch import DecodeBatch, Outcome
from infllm_agent.model.probe import probe, probe_ids, relative_error
from infllm_agent.model.resolve import resolve_model
from infllm_agent.model.turns import Turns, Urgency
from infllm_agent.model.weights import to_int8, to_rows
from infllm_agent.platform.compute import compute_thread

#: A dtype of weights alone.
INT8 = "int8"


@dataclass(eq=False)
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
    turns: Turns = field(default_factory=lambda: Turns(compute_thread()))  # one forward at a time
    _digest: str | None = None

    def __post_init__(self) -> None:
        def turn() -> AbstractContextManager[None]:
            return self.turns.turn(self, urgency=Urgency.NEXT_TOKEN)

        def together(token_ids: Sequence[int], memories: Sequence[Memory]) -> list[Outcome]:
            return compute_thread().run(lambda: self._together(token_ids, memories))

        self._batch = DecodeBatch(turn, together)

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
            dtype: ``auto`` (bfloat16 where the processor computes in it, else float32), or a torch dtype's name;
                ``int8``: weights rounded to eight bits, computing as with ``auto``.

        Raises:
            ModelNotFound: nothing there by that name.
            UnsupportedModel: the memory cannot serve it exactly.
            ConfigError: an unknown device or dtype.
        """
        path = resolve_model(model, progress=progress)
        return compute_thread().run(lambda: cls._load(str(model), path, device, dtype), leave=True)

    @classmethod
    def _load(cls, name: str, path: str, device: str, dtype: str) -> LocalModel:
        target = _device(device)
        precision = _dtype("auto" if dtype == INT8 else dtype, target)
        try:
            config = AutoConfig.from_pretrained(path)
            tokenizer = AutoTokenizer.from_pretrained(path)
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=precision)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelNotFound(f'model "{name}" could not be loaded from {path}: {reason}') from error
        if dtype == INT8:
            to_int8(loaded)
        else:
            to_rows(loaded)
        return cls.attach(loaded.to(target), tokenizer, name=name)

    @classmethod
    def attach(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> LocalModel:
        """Attach the memory to a model that is already loaded (``detached`` gives it back for a while).

        Raises:
            UnsupportedModel: the memory cannot serve it exactly; the model is left as it was.
        """
        return compute_thread().run(lambda: cls._attach(model, tokenizer, name or type(model).__name__))

    @classmethod
    def _attach(cls, model: Any, tokenizer: Any, name: str) -> LocalModel:
        model.eval()
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
            set_attention(model, ATTENTION)
        except BaseException:
            set_attention(model, before)
            raise
        return local

    def new_memory(self, config: MemoryConfig | None = None, tiers: Tiers | None = None) -> ContextMemory:
        """Make an empty memory for one session.

        Args:
            tiers: what it may take, together with others; None: as much as it needs.

        Raises:
            ConfigError: the configuration needs more than the model's window.
            BudgetExceeded: there is no room for it on the device.
        """
        config = config or self.default_memory()
        self.check_memory(config)
        return compute_thread().run(lambda: ContextMemory(config, self.specs, self.dtype, self.device, tiers))

    def default_memory(self) -> MemoryConfig:
        """Scale the default configuration down for a model whose window is too small for it."""
        config = MemoryConfig()
        while config.attended_keys > self.window and config.n_local > 16:
            config = config.changed(
                n_local=config.n_local // 2,
                n_init=config.n_init // 2,
                topk=config.topk // 2,
                question_topk=None if config.question_topk is None else config.question_topk // 2,
                candidates=config.candidates // 2,
                chunk_size=config.chunk_size // 2,
            )
        return config

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return sum(2 * spec.kv_heads * spec.head_dim for spec in self.specs.values()) * self.dtype.itemsize

    def check_memory(self, config: MemoryConfig) -> None:
        """Raise ConfigError unless a step's keys fit the model's window."""
        if config.attended_keys > self.window:
            raise ConfigError(
                f"a step would attend to {config.attended_keys} keys (n_init {config.n_init} + topk·block_size "
                f"{config.most_topk * config.block_size} + window, block and chunk), but the window of {self.name} is "
                f"{self.window} tokens: lower n_local, topk, question_topk or chunk_size"
            )

    def digest(self) -> str:
        """Compute a fingerprint of the weights: names, shapes and a sample of the values of every parameter."""
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
    def forward(
        self, token_ids: Sequence[int], memory: Memory, *, urgency: Urgency = Urgency.NOBODY, batch: int = 1
    ) -> Tensor:
        """Stream one chunk into the memory; returns the logits (vocab,) float32 after its last token.

        Args:
            urgency: who waits for it (``Turns``).
            batch: most memories in a forward, if the chunk is the next token of an answer: it may go with those of
                other threads. The logits may then differ in their last bits from those computed alone.
        """
        if batch > 1 and len(token_ids) == 1 and urgency is Urgency.NEXT_TOKEN:
            return self._batch.step(token_ids[0], memory, batch)
        return self._step(token_ids, memory, last_only=True, urgency=urgency)[-1]

    @torch.inference_mode()
    def forward_all(self, token_ids: Sequence[int], memory: Memory) -> Tensor:
        """Stream one chunk into the memory; returns the logits (n, vocab) float32 after every token of it."""
        return self._step(token_ids, memory, last_only=False)

    @contextlib.contextmanager
    def detached(self, attention: str = "sdpa") -> Iterator[Any]:
        """Give the model transformers' own attention, for as long as the ``with`` lasts."""
        with self.turns.turn(self):
            set_attention(self.model, attention)
            try:
                yield self.model
            finally:
                set_attention(self.model, ATTENTION)

    def _step(
        self, token_ids: Sequence[int], memory: Memory, *, last_only: bool, urgency: Urgency = Urgency.NOBODY
    ) -> Tensor:
        def step() -> Tensor:
            ids = torch.tensor([list(token_ids)], device=self.device)
            memory.reserve(len(token_ids))
            logits = self._logits(ids, [memory], last_only=last_only)[0]
            memory.advance(len(token_ids))
            return logits.float()

        with self.turns.turn(memory, urgency=urgency):
            return compute_thread().run(step)

    def _together(self, token_ids: Sequence[int], memories: Sequence[Memory]) -> list[Outcome]:
        """Compute one token of each memory together. If that fails each goes alone, and only those at fault fail."""
        try:
            for memory in memories:
                memory.reserve(1)
            ids = torch.tensor(token_ids, device=self.device).unsqueeze(1)
            logits = self._logits(ids, memories, last_only=True)[:, -1].float()
        except Exception as error:
            if len(memories) == 1:
                return [error]
            return [self._together([token], [memory])[0] for token, memory in zip(token_ids, memories, strict=True)]
        for memory in memories:
            memory.advance(1)
        return list(logits)

    def _logits(self, ids: Tensor, memories: Sequence[Memory], *, last_only: bool) -> Tensor:
        """Compute the logits (rows, n or 1, vocab) of chunks (rows, n), each of another session."""
        out = self.model(
            input_ids=ids,
            position_ids=torch.zeros_like(ids),
            use_cache=False,
            logits_to_keep=1 if last_only else 0,
            memories=memories,
            between_layers=self._between_layers,
        )
        return out.logits  # type: ignore[no-any-return]

    def _between_layers(self) -> None:
        """Let in what cannot wait for the end of a forward."""
        self.turns.pause()
        compute_thread().between()

    @torch.inference_mode()
    def _check_against_own_attention(self) -> None:
        """Raise UnsupportedModel unless a short text in two chunks gives the logits of the model's own attention."""
        ids = probe_ids(self.model)
        set_attention(self.model, "eager")
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        set_attention(self.model, ATTENTION)
        n = ids.shape[1]
        config = MemoryConfig(n_init=0, n_local=n, block_size=n, repr_topk=1, topk=0, chunk_size=n, max_cached_block=0)
        memory = ContextMemory(config, self.specs, self.dtype, self.device)
        parts = []
        for chunk in (ids[:, :10], ids[:, 10:]):
            parts.append(self._logits(chunk, [memory], last_only=False)[0].float())
            memory.advance(chunk.shape[1])
        got = torch.cat(parts)
        error = relative_error(got - got.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True))
        if not error < (1e-3 if self.dtype in (torch.float32, torch.float64) else 0.1):
            raise UnsupportedModel(
                f"{self.name} ({type(self.model).__name__}): with the memory's attention its logits differ from its "
                f"own by {error:.1%}, so something in it is not served; it is refused rather than computed wrongly"
            )


def _trained_window(text_config: Any) -> int:
    """Find the longest distance that the rotation measured by ``probe`` was trained for."""
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
        raise ConfigError(f'dtype "{name}" is unknown; use auto, float32, bfloat16, float16 or int8')
    return known[name]


def _cpu_computes_bfloat16() -> bool:
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())
