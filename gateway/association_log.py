"""The association log: a line for each association that ended or was turned away, in a file for each day.

For people who ask why a device cannot send; nothing depends on it. Several processes append, each line in one write.
No patient data: AE titles, addresses, counts, statuses. Bounded: a month, and so many bytes a day.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from clarion.adapters.files import make_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = structlog.get_logger()

ENDED, REJECTED, LOST = "ended", "rejected", "lost"
_KEPT_DAYS = 31
_MOST_BYTES_A_DAY = 64 * 2**20
_MOST_TEXT = 200


class AssociationLog:
    """Appends lines. Any number of threads and processes at once; a disk that refuses costs the line."""

    def __init__(self, data: Path) -> None:
        self._folder = make_folder(folder_of(data))
        self._lock = threading.Lock()
        self._day = ""
        self._file = -1

    def write(self, kind: str, **fields: object) -> None:
        """Append a line."""
        now = datetime.now(UTC)
        said = {name: value[:_MOST_TEXT] if isinstance(value, str) else value for name, value in fields.items()}
        line = json.dumps({"time": now.isoformat(timespec="milliseconds"), "kind": kind, **said}, default=str)
        try:
            with self._lock:
                self._open(now.date().isoformat())
                if os.fstat(self._file).st_size < _MOST_BYTES_A_DAY:
                    os.write(self._file, line.encode() + b"\n")
        except OSError as error:
            log.warning("associationlog.notwritten", reason=error.strerror)

    def _open(self, day: str) -> None:
        """Have the file of a day open; a new day lets go of what is too old."""
        if day == self._day:
            return
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._file = os.open(self._folder / f"{day}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._day = day
        for old in sorted(self._folder.glob("*.jsonl"))[:-_KEPT_DAYS]:
            old.unlink(missing_ok=True)


def folder_of(data: Path) -> Path:
    """Give the folder of the log."""
    return data / "associations"


def read(data: Path, wanted: Callable[[dict[str, Any]], bool], limit: int) -> list[dict[str, Any]]:
    """Give the newest lines that are wanted, the newest last."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder_of(data).glob("*.jsonl"), reverse=True):
        found = [*[one for one in _lines(path) if wanted(one)][-(limit - len(found)) :], *found]
        if len(found) >= limit:
            break
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        for line in file:
            # The last one may be half written.
            with contextlib.suppress(ValueError):
                yield json.loads(line)
