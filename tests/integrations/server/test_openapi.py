"""schemathesis against the OpenAPI document: whatever fits it or not, no 5xx, and errors in one form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from serving import Served, serving

from infllm_agent.integrations.server.config import ServerConfig
from infllm_agent.model.local_model import LocalModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tiny_model: LocalModel) -> Iterator[Served]:
    config = ServerConfig(most_tokens=8)
    with serving(tmp_path_factory.mktemp("served"), tiny_model, config=config) as server:
        yield server


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_server_error(served: Served, mode: GenerationMode) -> None:
    document = schemathesis.openapi.from_url(served.url + "/openapi.json")
    statuses: Counter[int] = Counter()
    for found in document.get_all_operations():
        operation = found.ok()
        httpx.post(f"{served.v1}/sessions/known/events", json={"events": [{"role": "user", "text": "hello"}]})

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def check(case: schemathesis.Case) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = served.model  # else nothing is looked at further
            if "response_id" in case.path_parameters and mode is GenerationMode.POSITIVE:
                body = {"model": served.model, "input": "hello", "max_output_tokens": 1, "conversation": "known"}
                case.path_parameters["response_id"] = httpx.post(f"{served.v1}/responses", json=body).json()["id"]
            if "session" in case.path_parameters and mode is GenerationMode.POSITIVE:
                case.path_parameters["session"] = "known"
            response = case.call(timeout=30)
            statuses[response.status_code] += 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            if response.status_code >= 400:
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}

        with suppress(Unsatisfiable):  # an operation that takes nothing cannot be asked wrongly
            check()
    assert statuses.total() > 80
    if mode is GenerationMode.POSITIVE:
        assert statuses[200] + statuses[201] > 0.6 * statuses.total(), statuses
