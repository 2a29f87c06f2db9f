"""The packaged model. Conversions run for real, on a GGUF file of a few kilobytes made here."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import safetensors.torch
import torch

from infllm_agent.errors import ModelNotFound, StorageError
from infllm_agent.model import packaged as package
from infllm_agent.model.packaged import PACKAGED, PackagedModel, align
from infllm_agent.model.resolve import resolve_model

DIM, HEADS, LAYERS, HIDDEN = 32, 2, 2, 64


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    """A llama of two layers with a byte-level tokenizer, in the form of the packaged file."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / PACKAGED["smollm2"].gguf
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt"]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), DIM), "output_norm": (DIM,)}
    for layer in range(LAYERS):
        block = {"attn_norm": (DIM,), "ffn_norm": (DIM,), "attn_q": (DIM, DIM), "attn_output": (DIM, DIM)}
        block |= {"attn_k": (DIM // HEADS, DIM), "attn_v": (DIM // HEADS, DIM)}
        block |= {"ffn_gate": (HIDDEN, DIM), "ffn_up": (HIDDEN, DIM), "ffn_down": (DIM, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, packaged: PackagedModel, gguf: bytes) -> Path:
    """A wheel that pip accepts, with ``gguf`` as the model file."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{packaged.module}-{packaged.version}"
    path = folder / f"{stem}-py3-none-any.whl"
    info = f"{stem}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{packaged.module}/{packaged.gguf}", gguf)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {packaged.distribution}\nVersion: {packaged.version}\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def packaged(tiny_gguf, monkeypatch, tmp_path) -> PackagedModel:
    """The alias, made to stand for the tiny file; pip sees only the wheels in tmp_path/wheels."""
    module = "infllm_test_absent_model"
    tiny = replace(PACKAGED["smollm2"], module=module, distribution=module.replace("_", "-"))
    wheel = make_wheel(tmp_path / "wheels", tiny, tiny_gguf.read_bytes())
    tiny = replace(tiny, wheel_sha256=sha256(wheel), gguf_sha256=sha256(tiny_gguf))
    monkeypatch.setitem(PACKAGED, "smollm2", tiny)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tiny


# --- the packaged model ------------------------------------------------------------------------------------------


def test_alias_is_downloaded_checked_and_converted_once(packaged, tmp_path, capfd):
    lines: list[str] = []
    cache = tmp_path / "cache"
    folder = Path(resolve_model("smollm2", cache_dir=cache, progress=lines.append))
    assert folder == cache / packaged.folder_name
    assert [line.split()[0] for line in lines] == ["fetching", "converting"]
    assert [path.name for path in cache.iterdir()] == [packaged.folder_name], "nothing else is left behind"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert "".join(capfd.readouterr()) == ""

    lines.clear()
    assert resolve_model("smollm2", cache_dir=cache, progress=lines.append) == str(folder)
    assert not lines

    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<tools>" in tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model(**tokenizer("to be", return_tensors="pt")).logits.isfinite().all()


def test_installed_package_is_used_without_importing_it(packaged, tiny_gguf, tmp_path, monkeypatch):
    package = tmp_path / "site" / packaged.module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / packaged.gguf).write_bytes(tiny_gguf.read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert Path(resolve_model("smollm2", cache_dir=tmp_path / "cache"), "model.safetensors").is_file()
    assert packaged.module not in sys.modules


def test_other_wheel_is_refused(packaged, tmp_path):
    make_wheel(tmp_path / "wheels", packaged, b"something else")
    with pytest.raises(ModelNotFound, match=r"\.whl was refused: its SHA-256 is [0-9a-f]{64}, expected"):
        resolve_model("smollm2", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_other_gguf_is_refused(packaged, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "wheels", packaged, b"something else")
    monkeypatch.setitem(PACKAGED, "smollm2", replace(packaged, wheel_sha256=sha256(wheel)))
    with pytest.raises(ModelNotFound, match=r"\.gguf was refused"):
        resolve_model("smollm2", cache_dir=tmp_path / "cache")


def test_no_wheel_to_be_had(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ModelNotFound, match=r"not converted in the cache.*not installed.*could not download") as caught:
        resolve_model("smollm2", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.fixture
def quick_conversion(monkeypatch):
    """Stands in for the conversion where only its surroundings are tested."""

    def convert(gguf: Path, out: Path, template: str) -> None:
        out.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (out / name).write_text("{}")

    monkeypatch.setattr(package, "_convert", convert)
    return convert


def test_interrupted_conversion_is_redone(packaged, quick_conversion, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def killed(gguf: Path, out: Path, template: str) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(package, "_convert", killed)
        with pytest.raises(KeyboardInterrupt):
            resolve_model("smollm2", cache_dir=cache)
    assert not list(cache.iterdir())

    left = cache / f"{packaged.folder_name}.part-old"  # what a kill -9 leaves
    left.mkdir()
    os.utime(left, (0, 0))
    final = cache / packaged.folder_name  # and what a user leaves who deletes the large file
    final.mkdir()
    (final / "config.json").write_text("{}")
    assert resolve_model("smollm2", cache_dir=cache) == str(final)
    assert (final / "model.safetensors").is_file()
    assert [path.name for path in cache.iterdir()] == [final.name]


def test_two_conversions_at_once_both_finish(packaged, quick_conversion, tmp_path, monkeypatch):
    cache, together = tmp_path / "cache", threading.Barrier(2)
    results: list[str] = []

    def convert(gguf: Path, out: Path, template: str) -> None:
        together.wait(30)  # both found an empty cache
        quick_conversion(gguf, out, template)

    monkeypatch.setattr(package, "_convert", convert)
    threads = [threading.Thread(target=lambda: results.append(resolve_model("smollm2", cache_dir=cache))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [str(cache / packaged.folder_name)] * 2
    assert [path.name for path in cache.iterdir()] == [packaged.folder_name]


@pytest.mark.parametrize("name_length", range(1, 70, 9))
def test_weights_begin_at_a_cache_line(name_length, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"w" * name_length: torch.randn(7, 32), "b": torch.arange(32.0)}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    align(path)
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    assert begin % 64 == 0
    assert path.stat().st_size == begin + 4 * 8 * 32
    loaded = safetensors.torch.load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = path.stat()
    align(path)
    assert path.stat() == before, "done once, it is left alone"
    assert list(tmp_path.iterdir()) == [path]


def test_cache_that_cannot_be_written(packaged, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write the model cache .*; set INFLLM_CACHE"):
        resolve_model("smollm2", cache_dir=tmp_path / "file" / "cache")


@pytest.mark.model
def test_packaged_model_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model("smollm2")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


# --- the chat template -------------------------------------------------------------------------------------------

DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
GGUF_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "lookup", "description": "Find <it>", "parameters": {"type": "object", "properties": {}}},
}
TOOL_JSON = (
    '{"type": "function", "function": {"name": "lookup", "description": "Find <it>", '
    '"parameters": {"type": "object", "properties": {}}}}'
)
TOOLS_TEXT = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + TOOL_JSON + "\n</tools>"
    "\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)


def render(messages, tools=None, add_generation_prompt=False, template: str | None = None) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = template or package._template(PACKAGED["smollm2"])
    rendered: Any = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt
    )
    return rendered[0][0]


def test_plain_dialogue_has_the_default_system_prompt():
    messages = [{"role": "user", "content": " Hello \n"}, {"role": "assistant", "content": "Hi."}]
    dialogue = "<|im_start|>user\n Hello \n<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
    assert render(messages) == DEFAULT_SYSTEM + dialogue
    assert render(messages, add_generation_prompt=True) == DEFAULT_SYSTEM + dialogue + "<|im_start|>assistant\n"


def test_own_system_prompt_replaces_it():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    assert render(messages) == expected


@pytest.mark.parametrize(
    "roles", ["", "u", "su", "us", "suaua", "uu", "ssu", "ua", "oua"], ids=lambda roles: roles or "none"
)
def test_plain_dialogues_are_rendered_as_by_the_template_of_the_gguf(roles):
    names = {"s": "system", "u": "user", "a": "assistant", "o": "observation"}
    messages = [{"role": names[role], "content": f"text {index}\n"} for index, role in enumerate(roles)]
    for prompt in (False, True):
        assert render(messages, add_generation_prompt=prompt) == render(
            messages, add_generation_prompt=prompt, template=GGUF_TEMPLATE
        )


def test_tools_are_listed_in_the_system_message():
    user = "<|im_start|>user\nHello<|im_end|>\n"
    plain = [{"role": "user", "content": "Hello"}]
    assert render(plain, tools=[TOOL]) == DEFAULT_SYSTEM.removesuffix("<|im_end|>\n") + TOOLS_TEXT + user
    own = [{"role": "system", "content": "Be brief."}, *plain]
    assert render(own, tools=[TOOL]) == "<|im_start|>system\nBe brief." + TOOLS_TEXT + user


CALL_TEXT = '<tool_call>\n{"name": "lookup", "arguments": {"key": "é"}}\n</tool_call>'


@pytest.mark.parametrize(
    "call",
    [
        {"name": "lookup", "arguments": {"key": "é"}},
        {"type": "function", "id": "1", "function": {"name": "lookup", "arguments": {"key": "é"}}},
        {"type": "function", "id": "1", "function": {"name": "lookup", "arguments": '{"key": "é"}'}},
    ],
    ids=["bare", "openai", "arguments as text"],
)
def test_tool_calls_and_results(call):
    messages = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Looking.", "tool_calls": [call]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "42", "name": "lookup"},
        {"role": "tool", "content": "43", "name": "lookup"},
    ]
    assert render(messages) == (
        DEFAULT_SYSTEM + "<|im_start|>user\nGo<|im_end|>\n"
        f"<|im_start|>assistant\nLooking.\n{CALL_TEXT}<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n43\n</tool_response><|im_end|>\n"
    )
    whole = render(messages)
    for count in range(1, len(messages)):
        assert whole.startswith(render(messages[:count])), "a dialogue can be tokenised as it grows"


def test_template_needs_nothing_but_jinja():
    text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(package._template(PACKAGED["smollm2"]))
    assert text.render(messages=[{"role": "user", "content": "Hello"}]).startswith(DEFAULT_SYSTEM)
