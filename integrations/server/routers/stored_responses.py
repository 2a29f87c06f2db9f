"""``/v1/responses/ID``: responses that were given before, and what they answered."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from infllm_agent.integrations.server.auth import Namespace
from infllm_agent.integrations.server.deps import Caller, TheService
from infllm_agent.integrations.server.errors import ApiError, JsonResponse, bad_request
from infllm_agent.integrations.server.protocol.requests import ERRORS
from infllm_agent.integrations.server.protocol.responses import input_items
from infllm_agent.integrations.server.response_store import Key
from infllm_agent.integrations.server.service import Service
from infllm_agent.platform.cancellation import Cancellation
from infllm_agent.storage.catalog import SessionInfo
from infllm_agent.storage.session_store import SessionStore

router = APIRouter(prefix="/v1/responses", responses=ERRORS)

_KEY = "([0-9a-f]{32})_([1-9][0-9]{0,8})"
_ID = re.compile(f"resp_{_KEY}")
_ITEM_ID = re.compile(f"(?:msg|fc|fco)_{_KEY}(?:_[0-9]+)?")


def kept_response(service: Service, caller: Namespace, id: str, param: str) -> tuple[SessionInfo, Key, dict[str, Any]]:
    """Find a response that the caller may see, and its session.

    Args:
        param: the part of the request that names it.

    Raises:
        ApiError: there is none by that id, or it is another's.
    """
    if matched := _ID.fullmatch(id):
        key = Key(matched[1], int(matched[2]))
        info = next((info for info in caller.sessions(service.catalog) if info.id == key.session), None)
        if info is not None and (response := service.responses.find(key)) is not None:
            return info, key, response
    code = "previous_response_not_found" if param == "previous_response_id" else "response_not_found"
    said = "it or its session is deleted, it was not stored, or it never was"
    raise ApiError(404, f"no response {id[:100]!r}: {said}", code=code, param=param)


@router.get("/{response_id}")
async def show_response(
    response_id: str,
    request: Request,
    service: TheService,
    caller: Caller,
    stream: Annotated[bool, Query(description="not served: a response is complete when it is stored")] = False,
) -> Response:
    """Show a response as it was given."""
    if stream:
        raise bad_request("stream: a stored response is complete; leave it out", "stream", "unsupported_parameter")
    found = await service.do(request, lambda _: kept_response(service, caller, response_id, "response_id")[2])
    return JsonResponse(found)


@router.delete("/{response_id}")
async def delete_response(response_id: str, request: Request, service: TheService, caller: Caller) -> Response:
    """Delete a response. Its history stays, in its session, until that is deleted."""

    def delete(cancelled: Cancellation) -> None:
        _, key, _ = kept_response(service, caller, response_id, "response_id")
        service.responses.forget(key)

    await service.do(request, delete)
    return JsonResponse({"id": response_id, "object": "response", "deleted": True})


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    request: Request,
    service: TheService,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(description="the id of an item: only what follows it")] = None,
) -> Response:
    """List what the response answered: the whole history before it, the latest first."""

    def read(cancelled: Cancellation) -> dict[str, Any]:
        info, key, _ = kept_response(service, caller, response_id, "response_id")
        start, stop = 0, key.messages - 1
        if after:
            matched = _ITEM_ID.fullmatch(after)
            if matched is None or matched[1] != key.session or int(matched[2]) > stop:
                raise bad_request(f"after: this response has no item {after[:100]!r}", "after")
            start, stop = (int(matched[2]) - 1, stop) if order == "asc" else (0, int(matched[2]))
        # Each message is one item at least: so many hold the page, what it follows, and whether there is more.
        most = limit + 2
        start, stop = (start, min(stop, start + most)) if order == "asc" else (max(start, stop - most), stop)
        with SessionStore.open(service.runtime.root, info.name, readonly=True) as store:
            items = [item for message in store.messages(start, stop) for item in input_items(key.session, message)]
        if order == "desc":
            items.reverse()
        if after:
            place = next((place for place, item in enumerate(items) if item["id"] == after), None)
            if place is None:
                raise bad_request(f"after: this response has no item {after[:100]!r}", "after")
            items = items[place + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return {"object": "list", "data": page, "has_more": len(items) > limit, **ends}

    return JsonResponse(await service.do(request, read))
