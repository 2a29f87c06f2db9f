"""The log: what happens in sessions, as lines for people or for programs. Silent until it is asked for.

Everything is told to the standard library's ``logging``, under the logger ``infllm_agent``, with its fields as extras.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from infllm_agent.errors import ConfigError

LogFormat = Literal["json", "text"]

LOGGER = "infllm_agent"

_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime"}  # what every record has; the rest are its fields
# An error may quote what came from outside: no line may look like two, or move a terminal's cursor.
_HARMLESS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), "\ufffd")


def setup(format: LogFormat = "text", level: str = "INFO") -> None:
    """Write the log to stderr. Called again, it replaces what it did before; other handlers stay.

    Args:
        format: ``json``, one object on each line, or ``text``.
        level: ``INFO`` (what happens), ``WARNING`` (what fails), or another level's name.

    Raises:
        ConfigError: an unknown format or level.
    """
    if format not in get_args(LogFormat):
        raise ConfigError(f'log format "{format}" is unknown; use json or text')
    if level.upper() not in logging.getLevelNamesMapping():
        raise ConfigError(f'log level "{level}" is unknown; use DEBUG, INFO, WARNING or ERROR')
    logger = logging.getLogger(LOGGER)
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, _OnStderr)]
    handler = _OnStderr(sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def event(
    log: logging.Logger, level: int, name: str, message: str, cause: BaseException | None = None, **fields: Any
) -> None:
    """Tell of an event. ``message`` is a template over the fields, such as ``%(session)s``; a cause is shown with its
    traceback."""
    log.log(level, message, fields, exc_info=cause, extra={"event": name, **fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON, in ASCII: time, level, logger, message, its fields, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """A record for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return super().formatMessage(record).translate(_HARMLESS)


class _OnStderr(logging.StreamHandler[Any]):
    pass
