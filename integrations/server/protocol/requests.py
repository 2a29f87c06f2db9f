"""What requests for answers have in common: the model, the session, how tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Header
from pydantic import Field

from infllm_agent.config import SamplingConfig
from infllm_agent.integrations.server.errors import ApiError, ErrorBody, bad_request
from infllm_agent.integrations.server.protocol.messages import Asked
from infllm_agent.integrations.server.service import Service

#: The session of calls that name none.
NAMELESS = "anonymous"
LONGEST_ID = 256

SessionHeader = Annotated[str | None, Header(alias="X-Session-Id", description="the session: any text")]

#: What routes may answer besides their own, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be served."},
    "5XX": {"model": ErrorBody, "description": "The server has trouble, or no room."},
}


class AnswerRequest(Asked):
    """A request for an answer: OpenAI's words, and some of ours."""

    model: str
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="not OpenAI's: draw from so many of the likeliest tokens")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="not OpenAI's")
    session_id: str | None = Field(
        None, max_length=LONGEST_ID, description="not OpenAI's: the session, as X-Session-Id names it"
    )
    stream: bool | None = False
    parallel_tool_calls: bool | None = None
    # These are of use to hosted models, and change no answer here.
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None

    def sampling(self, service: Service, most: int | None, **others: Any) -> SamplingConfig:
        """Decide how tokens are chosen: the request comes before the server's defaults.

        Args:
            most: tokens of the answer; None: not said.

        Raises:
            ApiError, ConfigError.
        """
        if most is not None and most > service.config.most_tokens:
            raise bad_request(
                f"{most} tokens are asked for; this server gives {service.config.most_tokens} at most", "max_tokens"
            )
        given = self.model_dump(include={"temperature", "top_p", "top_k", "repetition_penalty"})
        values = {name: value for name, value in {**given, "max_tokens": most, **others}.items() if value is not None}
        return SamplingConfig(**{**service.defaults.model_dump(), **values})

    def check_model(self, service: Service) -> None:
        check_model(service, self.model)

    def session(self, header: str | None) -> str | None:
        """Read which session the call names. Raises ApiError if it names two."""
        if header is not None and len(header) > LONGEST_ID:
            raise bad_request(f"X-Session-Id has more than {LONGEST_ID} characters", "X-Session-Id")
        if self.session_id and header and self.session_id != header:
            raise bad_request("session_id and the header X-Session-Id name different sessions", "session_id")
        return self.session_id or header or None


def check_model(service: Service, model: str) -> None:
    """Check that a model is served. Raises ApiError if not."""
    if model != service.model:
        raise ApiError(
            404, f"no model {model[:200]!r} here, but {service.model!r}", code="model_not_found", param="model"
        )


def seed_of(seed: int | None) -> int | None:
    """Read a seed of OpenAI's, which may be negative."""
    return None if seed is None else seed % (1 << 63)


def stops_of(stop: str | Sequence[str] | None) -> tuple[str, ...] | None:
    return (stop,) if isinstance(stop, str) else tuple(stop) if stop else None
