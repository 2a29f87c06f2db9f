"""How the two folders at the top of the repository are part of the package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "infllm_agent"


def test_root_folders_are_no_packages_of_their_own() -> None:
    """With an __init__.py, `kernels` would shadow the package that transformers looks for."""
    for name in ("kernels", "integrations"):
        assert (PACKAGE / name).is_symlink()
        assert not (PACKAGE / name / "__init__.py").exists()
