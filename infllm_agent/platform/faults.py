"""Errors of the operating system and of SQLite in our own words."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infllm_agent.errors import CorruptSession, StorageError

# Primary result codes that speak of the machine (permissions, space, another process) and not of damaged content.
_MACHINE_TROUBLE = frozenset(
    {
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_TOOBIG,
    }
)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Inside, operating-system errors leave as StorageError, and SQLite's as StorageError or CorruptSession.

    The messages are one line and name the file: the error's own where it has one, else ``path``.
    """
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None and isinstance(error, (sqlite3.ProgrammingError, sqlite3.InterfaceError)):
            raise  # a mistake in our own code, not on the disk
        if code is not None and code & 0xFF in _MACHINE_TROUBLE:
            raise StorageError(f"{path}: {error}") from error
        raise CorruptSession(f"{path} is damaged: {error}") from error
    except UnicodeDecodeError as error:  # how Python reports an SQLite message that quotes damaged bytes
        raise CorruptSession(f"{path} is damaged: text that is not UTF-8") from error
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from error
