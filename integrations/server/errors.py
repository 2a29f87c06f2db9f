"""Errors in the form that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from infllm_agent.errors import (
    BucketError,
    BudgetExceeded,
    Cancelled,
    ConfigError,
    Diverged,
    InfLLMError,
    InvalidName,
    QueueFull,
    SessionBusy,
    SessionClosed,
    SessionExists,
    SessionFull,
    SessionLocked,
    SessionMismatch,
    Stopped,
    UnknownMessage,
    UnknownSession,
)
from infllm_agent.routing.calls import is_full

log = logging.getLogger(__name__)

#: The status of a connection that its client has closed: nobody reads it, the log does.
CLIENT_GONE = 499

#: What an error of the package is to a client; the first that fits. All others are the server's own trouble: 500.
_KINDS: list[tuple[type[BaseException], int, str]] = [
    (UnknownSession, 404, "session_not_found"),
    (UnknownMessage, 400, "message_not_found"),
    (SessionExists, 409, "session_exists"),
    (InvalidName, 400, "invalid_name"),
    (ConfigError, 400, "invalid_value"),
    (SessionLocked, 409, "session_locked"),
    (SessionBusy, 409, "session_busy"),
    (SessionClosed, 409, "session_closed"),
    (SessionMismatch, 409, "session_mismatch"),
    (Diverged, 409, "session_diverged"),
    (SessionFull, 507, "insufficient_storage"),
    (BudgetExceeded, 507, "insufficient_storage"),
    (QueueFull, 503, "overloaded"),
    (Stopped, 503, "stopping"),
    (Cancelled, 503, "stopping"),
    (TimeoutError, 504, "timeout"),
]
_WAIT_S = {409: 1, 429: 1, 503: 1}


class ApiError(HTTPException):
    """An error for the client, with its HTTP status.

    Attributes:
        code: for programs.
        param: the part of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The answer to every failed request."""

    error: ErrorDetail


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def error_of(error: BaseException) -> ApiError:
    """Turn any error into one for the client. What the client must not know stays in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    for kind, status, code in _KINDS:
        if isinstance(error, kind):
            # The catalogue's own words name the sessions that there are, which may be others'.
            lists = isinstance(error, UnknownSession) and "sessions there" in str(error)
            return ApiError(status, "no such session" if lists else str(error), code=code)
    if isinstance(error, BucketError):
        log.error("a request failed: %s", error)
        return ApiError(503, "the server cannot reach its storage; try again", code="storage_unreachable")
    if is_full(error):
        return ApiError(507, "the disk of the server is full", code="insufficient_storage")
    log.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    what = type(error).__name__ if isinstance(error, InfLLMError) else "something unforeseen"
    return ApiError(500, f"{what}: the server's log has the rest", code="server_error")


def body_of(error: ApiError) -> dict[str, Any]:
    detail = ErrorDetail(message=str(error.detail), type=_type(error.status_code), param=error.param, code=error.code)
    return ErrorBody(error=detail).model_dump()


def response_of(error: ApiError) -> Response:
    headers = dict(error.headers or {})
    if error.status_code in _WAIT_S:
        headers.setdefault("Retry-After", str(_WAIT_S[error.status_code]))
    return JsonResponse(body_of(error), error.status_code, headers)


class JsonResponse(Response):
    """JSON in ASCII: what was received may be quoted in it, lone surrogates and all."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


def install(app: FastAPI) -> None:
    """Have all errors of an application answered in this form."""

    async def answer(request: Request, error: Exception) -> Response:
        return response_of(error_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return response_of(_invalid(error))

    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, answer)
    app.add_exception_handler(InfLLMError, answer)
    app.add_exception_handler(TimeoutError, answer)
    app.add_exception_handler(Exception, answer)


def _invalid(error: RequestValidationError) -> ApiError:
    """Report the first thing that is wrong with a request."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return bad_request(f"the body is not JSON: {reason}", code="invalid_json")
    where, *path = first["loc"]
    param = ".".join(str(part) for part in path) or str(where)
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return bad_request(f"{param} is unknown here, and would have no effect", param, "unknown_parameter")
    return bad_request(f"{param}: {said}", param)


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 403:
        return "permission_error"
    if status == 404:
        return "not_found_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
