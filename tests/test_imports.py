"""Imports run one way: a module may import from its own layer and from those above it in this table, never below.

A new module fails the test until it has a place here.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "infllm_agent"

LAYERS = [
    ["errors", "config", "tools", "threads", "compute", "signals", "logs", "files"],
    ["kernels"],
    ["origin", "planes", "hostcache", "tiers", "blockfile", "blocks", "index", "candidates", "state", "window"],
    ["far", "decode", "layers", "memory"],
    ["hub", "attention", "batch", "probe", "scheduler", "weights", "model", "snapshot"],
    [
        *["trace", "database", "locks", "records", "integrity", "catalog", "store", "tailfile", "fork"],
        *["check", "rebuild", "archive", "prune", "bucket"],
    ],
    [
        "chat",
        "tokens",
        "toolformat",
        "toolparse",
        "schemas",
        "grammar",
        "generate",
        "writer",
        "recorder",
        "reply",
        "fingerprint",
    ],
    ["observer", "metrics", "answer", "message_stream", "session"],
    ["inbox", "worker", "dispatch", "live"],
    ["functions", "toolrun", "agent_events", "agent"],
    ["runtime"],
    [
        *["integrations", "bench", "inspector"],
        *[
            "demo",
            "cli",
            "cli_chat",
            "cli_input",
            "cli_options",
            "cli_output",
            "cli_serve",
            "cli_sessions",
            "cli_upkeep",
        ],
        *["chat_commands", "chat_gauge", "chat_live", "chat_prompt", "chat_screen", "transcript"],
    ],
]
TOP = ["", "__main__"]  # the package itself hands out the public names, so it may import anything

RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer} | dict.fromkeys(TOP, len(LAYERS))


def module_names() -> dict[Path, list[str]]:
    """Each source file with its dotted name inside the package, as parts."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        names[path] = list(path.relative_to(PACKAGE).with_suffix("").parts)
    for folder in ("kernels", "integrations"):  # rglob does not follow the symlinks
        for path in sorted((PACKAGE / folder).resolve().rglob("*.py")):
            names[path] = [folder, *path.relative_to((PACKAGE / folder).resolve()).with_suffix("").parts]
    return names


def unit(parts: list[str]) -> str:
    """The row of the table that a module belongs to: its first part, or "" for the package itself."""
    return parts[0] if parts and parts[0] != "__init__" else ""


def imported_units(source: str, parts: list[str]) -> set[str]:
    """The table rows that a module imports, at the top or inside a function; type-checking imports count too."""
    units = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                base = ["infllm_agent", *parts[: len(parts) - node.level], *base]
            # `from infllm_agent import config` names a module, or a public name of the package
            dotted = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in dotted:
            head, *rest = name.split(".")
            if head == "infllm_agent":
                units.add(rest[0] if rest and rest[0] in RANK else "")
            assert head not in ("kernels", "integrations"), f"import infllm_agent.{name} instead of {name}"
    return units


def violations(source: str, parts: list[str]) -> list[str]:
    own = unit(parts)
    lower = [name for name in sorted(imported_units(source, parts)) if RANK[name] > RANK[own]]
    return [f"{'.'.join(parts)} imports infllm_agent{'.' + name if name else ''}" for name in lower]


def test_every_module_has_a_place_in_the_table():
    unplaced = {unit(parts) for parts in module_names().values()} - RANK.keys()
    assert not unplaced, f"put {sorted(unplaced)} into LAYERS"


def test_imports_run_one_way():
    found = []
    for path, parts in module_names().items():
        if unit(parts) in RANK:
            found += violations(path.read_text("utf-8"), parts)
    assert not found, "; ".join(found)


@pytest.mark.parametrize(
    ("source", "parts", "broken"),
    [
        ("from infllm_agent.errors import InfLLMError", ["memory"], False),
        ("from infllm_agent import config", ["memory"], False),
        ("from infllm_agent.session import Session", ["memory"], True),
        ("from infllm_agent import session", ["memory"], True),
        ("from infllm_agent import AgentRuntime", ["memory"], True),
        ("import infllm_agent.cli", ["runtime"], True),
        ("def f():\n    from infllm_agent.runtime import AgentRuntime", ["store"], True),
        ("from .session import Session", ["model"], True),
        ("from ..memory import LayerMemory", ["kernels", "attention"], True),
        ("from .attention import attend", ["kernels", "rotary"], False),
        ("from infllm_agent.runtime import AgentRuntime", ["__init__"], False),
    ],
)
def test_the_guard_sees_each_form_of_import(source, parts, broken):
    assert bool(violations(source, parts)) is broken


def test_root_folders_are_no_packages_of_their_own():
    """With an __init__.py, `kernels` would shadow the package that transformers looks for."""
    for name in ("kernels", "integrations"):
        assert (PACKAGE / name).is_symlink()
        assert not (PACKAGE / name / "__init__.py").exists()
