"""What is installed: one top-level name, with kernels and integrations inside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> list[str]:
    """The files of a wheel, built without network from a copy, so that the working tree stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("infllm_agent", "kernels", "integrations", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_site_packages_gets_one_name(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"infllm_agent"}


@pytest.mark.parametrize("folder", ["kernels", "integrations"])
def test_root_folders_are_inside(wheel_names, folder):
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
    assert {f"infllm_agent/{module}" for module in modules} <= set(wheel_names)
    assert not any(name.endswith(f"{folder}/__init__.py") for name in wheel_names)


def test_data_files_are_inside_and_rubbish_is_not(wheel_names):
    data = {"py.typed", "templates/smollm2.jinja", "inspector/page.html"}
    assert {f"infllm_agent/{name}" for name in data} <= set(wheel_names)
    assert not [name for name in wheel_names if "__pycache__" in name or "tests/" in name]
