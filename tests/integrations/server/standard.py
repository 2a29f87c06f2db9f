"""langchain-tests' standard suites through ``ChatOpenAI`` against the server, on the packaged model.

What needs judgement a model of 135M parameters does not have is marked with what it does instead. It takes minutes, and
mostly tests a client that is others' own, so it is no part of ``make test``: ``make standard`` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from serving import Served, serving

from infllm_agent.model.local_model import LocalModel

# One loop for all: langchain-openai keeps its connections from one test to the next.
pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]


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
        return {"model": "smollm2", "base_url": self.url, "api_key": "-"}


class TestUnit(_Model, ChatModelUnitTests):
    @pytest.mark.xfail(reason="compares with a stored snapshot of langchain-openai's own, which has no base_url")
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)


class TestIntegration(_Model, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {**super().chat_model_params, "max_tokens": 40, "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @pytest.mark.xfail(reason="it answers in words that it will look, and calls no tool by itself")
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason="in JSON mode the schema stands in the prompt only; the model leaves out a key")
    def test_json_mode(self, model: BaseChatModel) -> None:
        super().test_json_mode(model)
