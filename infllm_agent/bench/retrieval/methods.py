"""The methods that a retrieval task is measured with, by name. All but full attention see at most as many tokens at
once as the memory attends to (or as the model's window holds, if that is less)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from infllm_agent.bench.machine import available_bytes
from infllm_agent.bench.retrieval.rag import CHUNK, RagReader, bm25
from infllm_agent.bench.retrieval.readers import PIECE, FullContext, MemoryContext, Reader, TruncatedReader, WholeReader
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import ConfigError
from infllm_agent.model.local_model import LocalModel


@dataclass(frozen=True)
class Needs:
    """What a method has to be able to do with a model.

    Attributes:
        longest: tokens of the longest text, questions and answers included.
        round_tokens: tokens of the longest round of questions with its answers.
        truncate_to: tokens that a chat wrapper keeps; None: as many as the memory attends to.
    """

    longest: int
    round_tokens: int
    truncate_to: int | None = None


@dataclass(frozen=True)
class Method:
    """A way to read, ready to be used.

    Attributes:
        new_reader: makes a reader that has read nothing yet.
        settings: all that its answers depend on, beside model and text.
        shown: the settings worth a reader's attention.
        uses_memory: whether its answers depend on this project's memory, or only on the model.
    """

    name: str
    new_reader: Callable[[], Reader]
    settings: dict[str, Any]
    shown: dict[str, Any] = field(default_factory=dict)
    uses_memory: bool = False


def prepare(name: str, model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    """The method of that name.

    Raises:
        ConfigError: it is not known, or cannot do the task with this model on this machine.
    """
    check_name(name)
    return METHODS[name](model, config, needs)


def check_name(name: str) -> None:
    """Raise ConfigError unless there is a method of that name, and what it needs is installed."""
    if name not in METHODS:
        raise ConfigError(f'method "{name}" is not known; there are {", ".join(METHODS)}')
    if name == "rag":
        bm25()


def _memory(name: str, model: LocalModel, config: MemoryConfig) -> Method:
    model.check_memory(config)
    defaults = MemoryConfig().model_dump()
    settings = config.model_dump()
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    return Method(
        name, lambda: WholeReader(model, MemoryContext.empty(model, config)), settings, changed, uses_memory=True
    )


def _infllm(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    return _memory("infllm", model, config)


def _paper(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    return _memory("infllm-paper", model, config.under_paper_rules())


def _streaming(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    # Sinks and window only (StreamingLLM), at the same number of attended keys.
    window = config.n_local + config.topk * config.block_size
    return _memory("streaming", model, config.changed(topk=0, question_topk=None, n_local=window))


def _full(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    # An append copies the keys or values of one layer; the mask of a piece has a byte or more for each key.
    needed = round(1.1 * needs.longest * model.kv_bytes_per_token) + 4 * PIECE * needs.longest
    free = available_bytes(model.device)
    if needed > free:
        raise ConfigError(
            f"full attention over {needs.longest} tokens needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: "
            "ask for fewer tokens, or leave method full out"
        )
    return Method("full", lambda: WholeReader(model, FullContext(model)), {})


def _truncate(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    limit = needs.truncate_to or _budget(model, config)
    if limit > model.window:
        raise ConfigError(f"--truncate-to {limit} is more than the window of {model.name}, {model.window} tokens")
    _check_room("truncate", limit, needs)
    shown = {"truncate_to": limit}
    return Method("truncate", lambda: TruncatedReader(model, limit), shown, shown)


def _rag(model: LocalModel, config: MemoryConfig, needs: Needs) -> Method:
    limit = _budget(model, config)
    _check_room("rag", limit, needs)
    shown = {"budget": limit, "chunk": CHUNK}
    return Method("rag", lambda: RagReader(model, limit), shown, shown)


def _budget(model: LocalModel, config: MemoryConfig) -> int:
    return min(model.window, config.attended_keys)


def _check_room(name: str, limit: int, needs: Needs) -> None:
    if limit < 2 * needs.round_tokens:
        raise ConfigError(
            f"method {name} sees {limit} tokens at once, and a round of questions and answers takes "
            f"{needs.round_tokens} of them: raise n_local or topk, or leave it out"
        )


METHODS: dict[str, Callable[[LocalModel, MemoryConfig, Needs], Method]] = {
    "infllm": _infllm,
    "infllm-paper": _paper,
    "full": _full,
    "streaming": _streaming,
    "truncate": _truncate,
    "rag": _rag,
}
