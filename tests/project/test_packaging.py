"""What is published: a wheel with one top-level name and kernels and integrations inside it; a source archive."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both, built without network from a copy, so that the working tree stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    rubbish = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    for name in ("infllm_agent", "kernels", "integrations", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=rubbish)
    (source / "kernels" / "__pycache__").mkdir()
    (source / "kernels" / "__pycache__" / "int8.cpython-311.pyc").touch()
    run("build", "--no-isolation", "--outdir", out, source)  # the wheel is made from the source archive
    return out


def run(*command: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> list[str]:
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
    data = {"py.typed", "model/templates/smollm2.jinja", "inspector/page.html"}
    assert {f"infllm_agent/{name}" for name in data} <= set(wheel_names)
    assert not [name for name in wheel_names if "__pycache__" in name or "tests/" in name]


def test_the_version_is_said_once(wheel):
    tree = ast.parse((ROOT / "infllm_agent" / "__init__.py").read_text("utf-8"))
    said = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == ast.literal_eval(said["__version__"])


def test_the_source_archive_has_docs_and_examples(built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    pages = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.*"), ROOT / "CHANGELOG.md", ROOT / "constraints.txt"]
    assert {page.relative_to(ROOT).as_posix() for page in pages} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("tests/")]


def test_the_index_takes_it_and_shows_its_readme(built):
    run("twine", "check", "--strict", *built.iterdir())
