"""Which session a call belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import count
from os import PathLike
from typing import Any

from langchain_core.runnables import RunnableConfig, ensure_config

from infllm_agent.storage.catalog import Catalog, SessionInfo

_BRANCH = r"\.b[1-9][0-9]*"
#: Leaves room for the names of branches.
_LONGEST = 112


def with_session_id(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords with the session that the config names, unless they name one themselves.

    Inside a node of a graph, or a tool, the config need not be given: LangChain keeps it in a context variable.
    """
    if kwargs.get("session_id") is None:
        configurable = ensure_config(config).get("configurable", {})
        named = configurable.get("session_id") or configurable.get("thread_id")
        if named is not None:
            kwargs = {**kwargs, "session_id": str(named)}
    return kwargs


def session_name(session_id: str) -> str:
    """The name of the session for an id, which may be any text: mostly the id itself.

    An id that no session can have as its name, or that is a branch's, gets a name made from it and a digest.
    """
    plain = re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{_LONGEST - 1}}}", session_id)
    if plain and not re.search(rf"{_BRANCH}$", session_id):
        return session_id
    readable = re.sub("[^A-Za-z0-9_.:-]", "-", session_id)[:64].lstrip("_.:-") or "id"
    return f"{readable}-{hashlib.sha256(session_id.encode('utf-8', 'replace')).hexdigest()[:16]}"


def branch_base(name: str) -> str:
    """The name of the family's first session, of a branch's name; any other name is its own."""
    return re.sub(rf"{_BRANCH}$", "", name)


def family(root: str | PathLike[str], base: str) -> list[SessionInfo]:
    """The session named ``base`` and its branches, as of their last commits."""
    return list(Catalog(root).family(base))


def branch_names(base: str) -> Iterator[str]:
    """The names of a family, in their order."""
    return (base if number == 1 else f"{base}.b{number}" for number in count(1))
