"""Every error Clarion raises on purpose.

ClarionError
├── ConfigError                      the configuration is wrong: file, key, line and remedy (at start only)
├── PermanentError                   the same input will fail again
│   ├── InvalidInstanceError         a data set is incomplete, malformed or contradicts its request
│   ├── InvalidEventError            a record on the bus cannot be read as an event
│   ├── InvalidPipelineError         a pipeline definition is refused
│   ├── UnreadableSeriesError        a series cannot be read as a volume, for a named reason
│   ├── OperatorError                an operator failed on this input
│   ├── MissingObjectError           an object is not in the store
│   ├── DatabaseRefusalError         the database refuses a statement for what it says
│   └── PeerRefusedError             the peer refused for good
└── TransientError(retry_after_s)    may succeed later
    ├── StoreUnavailableError        the object store or the journal cannot be written or read now
    ├── BusUnavailableError          the bus or its database cannot be reached now
    ├── PeerUnavailableError         the peer cannot be reached, or asks to be asked again
    └── ResourceBusyError            something is in use: a port, a lock, a slot
"""

from __future__ import annotations

import traceback
from pathlib import Path

_FRAMES = 6


class ClarionError(Exception):
    """Any error Clarion raises on purpose."""


class ConfigError(ClarionError):
    """The configuration is wrong; each fault names file, line, key and what to write instead."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class PermanentError(ClarionError):
    """The same input will fail again."""


class InvalidInstanceError(PermanentError):
    """A data set is incomplete, malformed or contradicts its request."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class InvalidEventError(PermanentError):
    """A record on the bus cannot be read as an event."""


class InvalidPipelineError(PermanentError):
    """A pipeline definition is refused; one line per fault, as `file:line:column  PDLnnn  what → remedy`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class UnreadableSeriesError(PermanentError):
    """A series cannot be read as a volume, for a named reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class OperatorError(PermanentError):
    """An operator failed on this input."""


class MissingObjectError(PermanentError):
    """An object is not in the store."""


class DatabaseRefusalError(PermanentError):
    """The database refuses a statement for what it says; it would refuse it again."""


class PeerRefusedError(PermanentError):
    """The peer refused for good."""


class TransientError(ClarionError):
    """May succeed later; `retry_after_s` says when it is worth trying again."""

    def __init__(self, message: str, retry_after_s: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreUnavailableError(TransientError):
    """The object store or the journal cannot be written or read now."""


class BusUnavailableError(TransientError):
    """The bus or its database cannot be reached now."""


class PeerUnavailableError(TransientError):
    """The peer cannot be reached, or asks to be asked again."""


class ResourceBusyError(TransientError):
    """Something is in use: a port, a lock, a slot."""


def describe(error: BaseException) -> str:
    """Say what an error is and where it arose, without the text of errors that are not ours.

    That text may quote what was being worked on (`int('DOE^JANE')`), and patient data belongs in no log or event.
    """
    frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    places = ", ".join(f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in reversed(frames))
    said = f": {error}" if isinstance(error, ClarionError) else ""
    return f"{type(error).__name__}{said}" + (f" at {places}" if places else "")
