"""Fixtures that several test files share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    from infllm_agent.hub import resolve_model

    return resolve_model("smollm2")
