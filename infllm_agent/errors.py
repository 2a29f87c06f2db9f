"""Every error a user can meet. Each message says what happened, with which value, and what to do."""

from __future__ import annotations


class InfLLMError(Exception):
    """Base of all errors raised on purpose by this package. The command line prints its message as one line."""


class ConfigError(InfLLMError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class ModelNotFound(InfLLMError):
    """No model by that name: not a folder, not packaged, not in the hub's cache."""


class UnsupportedModel(InfLLMError):
    """The model's attention cannot be served by the memory exactly; it is refused rather than computed wrongly."""


class UnknownSession(InfLLMError, KeyError):
    """No session by that name in this root."""

    __str__ = Exception.__str__  # KeyError would print the message in quotes


class UnknownMessage(InfLLMError, IndexError):
    """The session has no message by that number."""


class InvalidName(InfLLMError, ValueError):
    """A session, role or tool name outside the allowed alphabet."""


class SessionLocked(InfLLMError):
    """Another process has the session open for writing."""


class SessionMismatch(InfLLMError):
    """The session was made with another model, tokenizer or memory configuration; the message names the field."""


class SessionClosed(InfLLMError):
    """The session was closed; open it again through the runtime."""


class NeedsModel(InfLLMError):
    """What was asked of a stored session cannot be done without its model."""


class CorruptSession(InfLLMError):
    """Stored bytes fail their checksum, or a file is missing; the message names the file."""


class StorageError(InfLLMError):
    """The root cannot be read or written (permissions, no space)."""


class SessionFull(StorageError):
    """There is no room for what a call brings: nothing of it was kept, and nothing of the history was dropped."""


class BudgetExceeded(InfLLMError):
    """A byte budget would be exceeded."""


class SessionBusy(InfLLMError):
    """The session cannot do this now: a streamed message is still open, or a reply is being generated."""


class Cancelled(InfLLMError):
    """The work was stopped on request, between two chunks. Everything taken in so far is kept."""


class QueueFull(InfLLMError):
    """No room was made in a live session's queue in the time given. The text was not taken."""


class Stopped(InfLLMError):
    """The runtime is stopping: nothing new is taken in, and what was asked for is not answered."""


class UnsupportedSchema(ConfigError):
    """A JSON schema that is malformed, cannot be satisfied, or asks for what decoding cannot hold an answer to."""


class SessionExists(InvalidName):
    """A session by that name is already in this root."""


class DivergedHistory(InfLLMError, ValueError):
    """A list of messages that continues no session, where branches are not wanted."""


class Diverged(InfLLMError):
    """Another machine has published a commit that a session's local folder does not continue."""


class BucketError(StorageError):
    """An object store cannot be reached, or refuses."""
