"""langchain-tests' standard suites for chat models, on the packaged model.

What needs judgement a model of 135M parameters does not have is marked with what it does instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from infllm_agent.integrations.langchain import ChatInfLLM

pytestmark = pytest.mark.model


@pytest.fixture(scope="module", autouse=True)
def sessions(tmp_path_factory: pytest.TempPathFactory, smollm2_path: str) -> Iterator[None]:
    """The folder that ``root`` names; the packaged model is there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("standard"))
        keeper = ChatInfLLM(root="sessions")
        keeper.opened()  # shared by all that agree with it, as long as one of them lives
        yield
        keeper.close()


class _Model:
    @property
    def chat_model_class(self) -> type[ChatInfLLM]:
        return ChatInfLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"root": "sessions"}


class TestUnit(_Model, ChatModelUnitTests):
    @pytest.mark.xfail(
        reason="langchain-core loads no class outside its own list, unless it is named to it (test_langchain.py does)",
        raises=ValueError,
    )
    def test_serdes(self, model: BaseChatModel, snapshot: Any) -> None:
        super().test_serdes(model, snapshot)


class TestIntegration(_Model, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"root": "sessions", "max_tokens": 40}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @pytest.mark.xfail(reason="it answers in words that it will look, and calls no tool by itself")
    @pytest.mark.parametrize("model", [{}, {"output_version": "v1"}], indirect=True)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)
