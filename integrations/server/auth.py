"""API keys, and the sessions that each may see.

A key belongs to a namespace. The sessions of the namespace ``ops`` are those whose names begin with ``ops:``; those who
have a key of it see them without that, and no others. A key of the namespace ``*`` sees all sessions by their full
names, and the server's metrics.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infllm_agent.errors import ConfigError, InvalidName, UnknownSession
from infllm_agent.routing.families import branch_base, session_name
from infllm_agent.storage.catalog import Catalog, SessionInfo

#: Where keys come from when no file is named: ``NAMESPACE=KEY``, separated by commas or white space.
VARIABLE = "INFLLM_API_KEYS"

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SHORTEST = 16


@dataclass(frozen=True)
class Namespace:
    """The part of a root's sessions that a caller sees.

    Attributes:
        name: None: all of them.
    """

    name: str | None = None

    @property
    def prefix(self) -> str:
        return "" if self.name is None else f"{self.name}:"

    def own(self, full: str) -> str:
        """Shorten a session's name to what callers know it by."""
        return full.removeprefix(self.prefix)

    def family(self, catalog: Catalog, id: str) -> str:
        """Name the family that an id stands for, which may be any text; a branch's stands for its family."""
        full = self.prefix + id
        base = branch_base(full)
        return base if base != full and self._exists(catalog, full) else session_name(full)

    def session(self, catalog: Catalog, id: str) -> str:
        """Name the very session that an id stands for, whether or not it exists."""
        full = self.prefix + id
        return full if self._exists(catalog, full) else session_name(full)

    def existing(self, catalog: Catalog, id: str) -> str:
        """Name the session that an id stands for. Raises UnknownSession if there is none, or it is another's."""
        name = self.session(catalog, id)
        if not self._exists(catalog, name):
            raise UnknownSession(f"no session {id[:140]!r} here")
        return name

    def sessions(self, catalog: Catalog) -> Sequence[SessionInfo]:
        """List its sessions by name."""
        return [info for info in catalog.list() if info.name.startswith(self.prefix)]

    def _exists(self, catalog: Catalog, full: str) -> bool:
        try:
            return catalog.find(full) is not None
        except InvalidName:
            return False


EVERYTHING = Namespace()


class ApiKeys:
    """Keys and their namespaces; only digests of the keys are kept."""

    def __init__(self, entries: Iterable[tuple[str, str]]) -> None:
        """
        Args:
            entries: (namespace, key) or (namespace, ``sha256:`` and the key's hexadecimal SHA-256).

        Raises:
            ConfigError: an invalid namespace, a short key, or the same key twice.
        """
        self._namespaces: dict[str, Namespace] = {}
        for name, key in entries:
            if name != "*" and not _NAMESPACE.fullmatch(name):
                raise ConfigError(
                    f"namespace {name[:40]!r} of an API key: 1 to 32 of the letters A-Z a-z, digits, _ and -, the "
                    "first a letter or digit; or *"
                )
            if not _DIGEST.fullmatch(key) and len(key) < _SHORTEST:
                raise ConfigError(
                    f'a key of namespace "{name}" has {len(key)} characters: take {_SHORTEST} at least, such as '
                    "`python3 -c 'import secrets; print(secrets.token_urlsafe(32))'` makes"
                )
            digest = key.removeprefix("sha256:") if _DIGEST.fullmatch(key) else _digest(key)
            if digest in self._namespaces:
                raise ConfigError(f'a key of namespace "{name}" is there twice')
            self._namespaces[digest] = EVERYTHING if name == "*" else Namespace(name)
        if not self._namespaces:
            raise ConfigError("there is no API key: give lines of a namespace and a key")

    @classmethod
    def load(cls, path: Path | None, environment: Mapping[str, str] = os.environ) -> ApiKeys | None:
        """Read the keys from a file, else from the environment; None if there are none.

        The file has a namespace and a key on each line; ``#`` begins a comment. Nobody but its owner may read it.

        Raises:
            ConfigError.
        """
        if path is not None:
            return cls(_lines(path))
        if given := environment.get(VARIABLE):
            parts = [part.partition("=") for part in re.split(r"[,\s]+", given.strip()) if part]
            if any(not equals for _, equals, _ in parts):
                raise ConfigError(f"{VARIABLE} needs NAMESPACE=KEY, separated by commas")
            return cls((name, key) for name, _, key in parts)
        return None

    def namespace(self, key: str) -> Namespace | None:
        """Look up the namespace of a key; None for an unknown one. All unknown keys take the same time."""
        return self._namespaces.get(_digest(key))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    try:
        mode = path.stat().st_mode
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the API keys in {path} cannot be read: {error}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others can read the API keys in {path}: chmod 600 {path}")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words and len(words) != 2:
            raise ConfigError(f"{path}, line {number}: a namespace and a key are expected")
        if words:
            yield words[0], words[1]
