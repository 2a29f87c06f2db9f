"""What a stored session was made with: opening it with anything else is refused by the field that differs."""

from __future__ import annotations

import json
from typing import Any

from infllm_agent.chat.format import ChatFormat
from infllm_agent.config import MemoryConfig
from infllm_agent.errors import SessionMismatch
from infllm_agent.memory.snapshot import FORMAT
from infllm_agent.model.local_model import LocalModel


def fingerprint(model: LocalModel, chat: ChatFormat, config: MemoryConfig) -> dict[str, Any]:
    """All that must be the same for a stored session to mean the same."""
    return {
        "format": FORMAT,
        "model": model.name,
        "weights": model.digest(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat": chat.digest(),
        "memory": config.model_dump(),
    }


def check_fingerprint(name: str, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise SessionMismatch, naming the first field that differs. The model's name may: its weights decide."""
    memory = MemoryConfig.from_record(stored["memory"]).model_dump()
    stored, current = _flat({**stored, "memory": memory}), _flat(json.loads(json.dumps(current)))
    for field in sorted(stored.keys() | current.keys()):
        if field != "model" and stored.get(field) != current.get(field):
            raise SessionMismatch(
                f'session "{name}" was made with {field} = {stored.get(field)!r}, not {current.get(field)!r} '
                f"(model then: {stored.get('model')}): open it with the settings it was made with, or start another"
            )


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    memory = {f"memory.{key}": value for key, value in nested.get("memory", {}).items()}
    return {**{key: value for key, value in nested.items() if key != "memory"}, **memory}
