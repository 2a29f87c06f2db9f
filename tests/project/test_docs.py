"""The documentation: it builds strictly and without the network, and what it says of code, commands and sizes is so."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from load_example import load_module
from tiny import ARCHITECTURES, build

from infllm_agent import errors
from infllm_agent.config import MemoryConfig
from infllm_agent.memory.context import ContextMemory
from infllm_agent.model.local_model import LocalModel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("examples/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [text for tag, text in FENCE.findall(page.read_text("utf-8")) if tag == language]


def script(name: str) -> ModuleType:
    return load_module(DOCS / "tools" / f"{name}.py")


# -- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; every way to the network ends at a closed port."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | nowhere)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Sources(HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag != "a":
            self.found += [value for name in ("src", "srcset", "data", "poster") if (value := given.get(name))]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.found.append(given.get("href") or "")
        self.found += css_sources(given.get("style") or "")


def css_sources(text: str) -> list[str]:
    return [url for url in re.findall(r"(?:url\(|@import\s*)['\"]?([^'\")\s;]+)", text) if not url.startswith("data:")]


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://a.b/c.js"></script>',
        '<link rel="stylesheet" href="//a.b/c.css">',
        '<img alt="" src=http://a.b/c.png>',
        "<p style=\"background: url('https://a.b/c.png')\">",
    ],
)
def test_the_check_sees_what_a_page_loads(text):
    (source,) = Sources(text).found
    assert urlsplit(source).netloc == "a.b"


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    loaded = {page.name: Sources(page.read_text("utf-8")).found for page in pages}
    loaded |= {sheet.name: css_sources(sheet.read_text("utf-8")) for sheet in site.rglob("*.css")}
    assert sum(map(len, loaded.values())) > 50
    outside = {name: [url for url in urls if urlsplit(url).netloc] for name, urls in loaded.items()}
    assert not {name: urls for name, urls in outside.items() if urls}


def test_reference_has_what_users_meet(site):
    runtime = (site / "reference" / "runtime.html").read_text("utf-8")
    for identifier in ("runtime.AgentRuntime.open", "session.session.Session.stream_tool_result", "reply.Reply"):
        assert f'id="infllm_agent.{identifier}"' in runtime
    settings = (site / "reference" / "settings.html").read_text("utf-8")
    for name, field in MemoryConfig.model_fields.items():
        assert f'id="infllm_agent.config.MemoryConfig.{name}"' in settings
        assert str(field.description).split(";")[0] in settings.replace("&#39;", "'")
    assert 'id="infllm_agent.integrations.langchain.chat_models.ChatInfLLM.prune"' in (
        site / "reference" / "langchain.html"
    ).read_text("utf-8")
    commands = (site / "reference" / "cli.html").read_text("utf-8")
    for option in ("--n-local", "--temperature", "--truncate-to", "--yes"):
        assert option in commands


def test_errors_in_one_line_become_entries():
    apart = script("docstrings").errors_apart
    text = """Do it.

Raises:
    SessionClosed, SessionLocked (open
    elsewhere), Unheard.
    ConfigError: as it
        says."""
    assert apart(text) == (
        "Do it.\n\nRaises:\n"
        "    SessionClosed: The session was closed; open it again through the runtime.\n"
        "    SessionLocked: open elsewhere\n"
        "    Unheard: \n"
        "    ConfigError: as it says."
    )
    assert apart("Nothing is raised.") == "Nothing is raised."


# -- links, code, commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_pages_link_to_exist(page):
    for link in re.findall(r"\]\(([^)\s#]+)", FENCE.sub("", page.read_text("utf-8"))):
        assert urlsplit(link).scheme or (page.parent / link).exists(), link


def test_python_in_the_pages_compiles():
    found = [(page, text) for page in PAGES for text in blocks(page, "python")]
    assert len(found) > 5
    for page, text in found:
        compile(text, f"{page.name}: {text[:40]}", "exec")


def test_getting_started_runs(tiny_model_folder, tmp_path, monkeypatch, one_thread):
    """Its Python from top to bottom, in one process, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    out = StringIO()
    names: dict[str, object] = {}
    with redirect_stdout(out):
        for text in blocks(DOCS / "getting-started.md", "python"):
            exec(text.replace('"smollm2"', repr(str(tiny_model_folder))), names)
    assert re.search(r"^6 messages, \d+ tokens$", out.getvalue(), re.MULTILINE)
    assert re.search(r"^\d+ tokens read, \d{3,} kept$", out.getvalue(), re.MULTILINE)


def shell_lines(page: Path) -> Iterator[list[str]]:
    """The words behind each ``infllm-agent`` in the page's blocks of commands."""
    for text in (*blocks(page, ""), *blocks(page, "sh")):
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split("|"):
                words = shlex.split(part, comments=True) if "infllm-agent" in part else []
                if words[:1] == ["infllm-agent"]:
                    yield words[1:]


def mentions(page: Path) -> Iterator[list[str]]:
    """The words behind each ``infllm-agent`` that stands in the text."""
    for span in re.findall(r"`infllm-agent ([^`]+)`", FENCE.sub("", page.read_text("utf-8"))):
        yield span.split()


def command_of(words: list[str]) -> tuple[Any, str, list[str]]:
    """The command that the words name, its name, and the words behind it."""
    commands = script("commands").commands()
    words = [word for word in words if word != "--debug"]
    for count in (2, 1):
        if (name := " ".join(words[:count])) in commands:
            return commands[name], name, words[count:]
    raise AssertionError(f"no command: infllm-agent {' '.join(words)}")


def test_commands_in_the_pages_are_good_usage():
    found = [words for page in PAGES for words in shell_lines(page)]
    assert len(found) > 15
    for words in found:
        command, name, rest = command_of(words)
        command.make_context(name, rest)  # parses: raises for unknown options, bad values, missing arguments


def test_commands_named_in_the_text_exist():
    groups = {"sessions", "bench"}
    for page in PAGES:
        for words in mentions(page):
            if set(words) <= groups:
                continue
            command, name, rest = command_of(words)
            known = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= known, (page.name, name, rest)


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text("utf-8")
        named = set(re.findall(r"`make (\w+)", text)) | set(re.findall(r"^make (\w+)", text, re.MULTILINE))
        assert named <= targets, page.name


def test_operations_says_what_to_do_about_every_error():
    rows = set(re.findall(r"^\| `([A-Z]\w+)` \|", (DOCS / "operations.md").read_text("utf-8"), re.MULTILINE))
    tree = ast.parse(Path(errors.__file__).read_text("utf-8"))
    raised = {node.name for node in tree.body if isinstance(node, ast.ClassDef)} - {"InfLLMError"}
    assert rows == raised


# -- sizes and the picture -------------------------------------------------------------------------------------------


def sizes_of(model: LocalModel, config: MemoryConfig):
    spec = model.specs[0]
    dtype = str(model.dtype).removeprefix("torch.")
    return script("sizing").Sizes("", len(model.specs), spec.kv_heads, spec.head_dim, config, dtype)


SMALL = MemoryConfig(n_init=4, n_local=16, block_size=4, topk=4, candidates=8, chunk_size=64, max_cached_block=8)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        MemoryConfig.paper(n_init=4, n_local=16, block_size=4, topk=4, chunk_size=64, max_cached_block=8),
        MemoryConfig(n_init=0, n_local=256, block_size=8, topk=2, candidates=0, chunk_size=32, max_cached_block=2),
    ],
    ids=["default rules", "paper", "large window"],
)
def test_sizes_are_those_of_a_memory(config, tmp_path, one_thread):
    model = LocalModel.attach(build(*ARCHITECTURES["llama"]), None, name="llama")
    sizes, memory = sizes_of(model, config), model.new_memory(config)
    for length in (40, 1_000, 9_000 if config == SMALL else 2_000):  # at 9,000 the index has doubled
        while memory.length < length:
            model.forward([5] * min(config.chunk_size, length - memory.length), memory)
        assert memory.store.count == sizes.blocks(length)
        assert memory.device_bytes() == sizes.device_bytes
        assert memory.index_bytes() == sizes.index_bytes(length)
        assert memory.store.host_bytes() == sizes.host_bytes(length)
    from infllm_agent.memory import snapshot

    tensors, _ = snapshot.pack(memory.state(), config)
    assert sum(part.nbytes for name, part in tensors.items() if not name.endswith(".q")) == sizes.tail_bytes(length)
    memory.store.move(tmp_path, 0)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == sizes.disk_bytes(length)
    resumed = model.new_memory(config)
    snapshot.restore(resumed, memory.state(), memory.store.files)
    assert resumed.index_bytes() == sizes.index_bytes(length, resumed=True)
    assert resumed.store.host_bytes() == 0


@pytest.mark.model
def test_sizes_are_those_of_the_packaged_model(smollm2_path):
    model = LocalModel.load("smollm2", dtype="bfloat16")
    smollm2 = script("sizing").MODELS[0]
    assert sizes_of(model, MemoryConfig()).shape == smollm2.shape
    memory = ContextMemory(MemoryConfig(), model.specs, torch.bfloat16, torch.device("cpu"))
    assert memory.device_bytes() == smollm2.device_bytes
    assert memory.index_bytes() == smollm2.index_bytes(10_000)
    assert model.kv_bytes_per_token == 2 * smollm2.key_bytes


def test_the_tables_are_what_the_script_computes():
    sizing = script("sizing")
    page = (DOCS / "operations.md").read_text("utf-8")
    assert sizing.filled(page) == page, "run: python docs/tools/sizing.py --write"
    assert [
        sizing.shown(size).replace("\u00a0", " ") for size in (999, 1000, 23_808, 999_600, 135e9, 2.03e12, 2e15)
    ] == [
        "999 B",
        "1 KB",
        "23.8 KB",
        "1 MB",
        "135 GB",
        "2.03 TB",
        "2e+03 TB",
    ]


def test_the_picture_is_what_the_script_draws():
    drawn = script("figure").draw(MemoryConfig())
    assert (DOCS / "memory.svg").read_text("utf-8") == drawn, "run: python docs/tools/figure.py"
