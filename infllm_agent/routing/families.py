"""Which session a call belongs to."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import count
from os import PathLike

from infllm_agent.storage.catalog import Catalog, SessionInfo

_BRANCH = r"\.b[1-9][0-9]*"
#: Leaves room for the names of branches.
_LONGEST = 112


def session_name(session_id: str) -> str:
    """Name the session for an id, which may be any text: mostly the id itself.

    An id that no session can have as its name, or that is a branch's, gets a name made from it and a digest.
    """
    plain = re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_.:-]{{0,{_LONGEST - 1}}}", session_id)
    if plain and not re.search(rf"{_BRANCH}$", session_id):
        return session_id
    readable = re.sub("[^A-Za-z0-9_.:-]", "-", session_id)[:64].lstrip("_.:-") or "id"
    return f"{readable}-{hashlib.sha256(session_id.encode('utf-8', 'replace')).hexdigest()[:16]}"


def branch_base(name: str) -> str:
    """Name the first session of the family that a session belongs to; a session that is not a branch is its own."""
    return re.sub(rf"{_BRANCH}$", "", name)


def family(root: str | PathLike[str], base: str) -> list[SessionInfo]:
    """Find the session named ``base`` and its branches, as of their last commits."""
    return list(Catalog(root).family(base))


def branch_names(base: str) -> Iterator[str]:
    """Yield the names of a family, in their order, without end."""
    return (base if number == 1 else f"{base}.b{number}" for number in count(1))
