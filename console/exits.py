"""Exit statuses of every command: 0 done, 1 permanent failure, 2 usage or configuration, 3 worth repeating."""

from __future__ import annotations

from clarion.errors import ClarionError, ConfigError, TransientError

DONE, FAILED, USAGE, TRANSIENT, INTERRUPTED = 0, 1, 2, 3, 130


def status_of(error: ClarionError) -> int:
    """Give the exit status of an error."""
    if isinstance(error, ConfigError):
        return USAGE
    return TRANSIENT if isinstance(error, TransientError) else FAILED
