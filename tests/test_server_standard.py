"""langchain-tests' standard suites through ``ChatOpenAI`` against the server, on the packaged model.

What needs judgement a model of 135M parameters does not have is marked with what it does instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from serving import Served, serving

from infllm_agent.model import LocalModel

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", autouse=True)
def served(tmp_path_factory: pytest.TempPathFactory, smollm2_path: str) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("standard"), LocalModel.load("smollm2"), None) as server:
        _Model.url = server.v1
        yield server


class _Model:
    url = ""

    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2", "base_url": self.url, "api_key": "-", "max_tokens": 40, "stream_usage": True}


class TestUnit(_Model, ChatModelUnitTests):
    pass


class TestIntegration(_Model, ChatModelIntegrationTests):
    @property
    def supports_json_mode(self) -> bool:
        return True
