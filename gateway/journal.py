"""The journal: what intake has acknowledged, in order, on the local disk. It is the queue to the grouping owner.

Contract. One process writes, by any number of threads: `append` returns when the record is synced (threads share a
sync). Any number of processes read. A record is length, CRC-32 and JSON. A write or sync that failed is never tried
again on that segment: the journal goes on in a new one, and nobody in the old one was told success. A writer always
begins a new segment, so a position past a torn tail leads to the next segment and not into it.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog

from clarion.adapters.files import make_folder, sync_folder
from clarion.crashpoints import effect
from clarion.errors import ResourceBusyError, StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from clarion.ports import Clock

log = structlog.get_logger()

SEGMENT_BYTES = 32 * 2**20
MAX_RECORD_BYTES = 2**20
_READ_BYTES = 4 * MAX_RECORD_BYTES
_HEAD = struct.Struct("<4sII")
_MAGIC = b"CLJ1"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the journal."""

    segment: int
    offset: int


START = Position(1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One record: when it was journalled, its kind, its fields, and the position after it."""

    time: datetime
    kind: str
    fields: dict[str, Any]
    after: Position


def _segment_path(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.clj"


def _segments(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.clj"))


class JournalWriter:
    """The one writer of a journal; any number of its process's threads may append."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = make_folder(folder)
        self._clock = clock
        self._writing = threading.Lock()
        self._syncing = threading.Lock()
        self._lock_file = (folder / "writer.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ResourceBusyError(f"another process writes the journal in {folder}") from error
        self._number = max(_segments(folder), default=0)
        self._file = -1
        self._size = self._written = self._synced = 0
        self._abandoned: set[int] = set()
        self._begin_segment()

    def append(self, kind: str, fields: dict[str, Any]) -> datetime:
        """Write a record; durable on return. Gives the record's time. Raises StoreUnavailableError."""
        try:
            with self._writing:
                now = self._clock.now()
                self._write(_encode(now, kind, fields))
                self._written += 1
                ticket, segment = self._written, self._number
            with self._syncing:
                self._sync(ticket, segment)
        except OSError as error:
            self._abandon_segment()
            raise StoreUnavailableError(f"the journal cannot be written: {error.strerror}") from error
        return now

    def close(self) -> None:
        """Sync and let go."""
        with self._writing, self._syncing:
            os.fdatasync(self._file)
            os.close(self._file)
            self._lock_file.close()

    def _write(self, record: bytes) -> None:
        if self._size + len(record) > SEGMENT_BYTES:
            with self._syncing:
                os.fdatasync(self._file)
                self._synced = self._written
                os.close(self._file)
                self._begin_segment()
        with effect("journal.write"):
            rest = memoryview(record)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self._size += len(record)

    def _sync(self, ticket: int, segment: int) -> None:
        if segment in self._abandoned:
            raise OSError(0, "the segment was given up")
        if self._synced >= ticket:
            return
        mark = self._written
        with effect("journal.sync"):
            os.fdatasync(self._file)
        self._synced = mark

    def _begin_segment(self) -> None:
        number = self._number + 1
        with effect("journal.rotate"):
            self._file = os.open(
                _segment_path(self._folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600
            )
            sync_folder(self._folder)
        self._number, self._size = number, 0

    def _abandon_segment(self) -> None:
        """Go on in a new segment: what a failed write or sync left behind is not to be built upon."""
        with self._writing, self._syncing:
            log.error("journal.segmentabandoned", segment=self._number)
            self._abandoned.add(self._number)
            try:
                self._begin_segment()
            except OSError as error:
                log.error("journal.unwritable", reason=error.strerror)  # noqa: TRY400  the reason says it all


def _encode(now: datetime, kind: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps({"time": now.isoformat(), "kind": kind, **fields}, separators=(",", ":")).encode()
    if len(body) > MAX_RECORD_BYTES:
        raise StoreUnavailableError(f"a journal record of {len(body)} bytes is too large")
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def read(folder: Path, start: Position, limit: int) -> Iterator[Entry]:
    """Give up to `limit` records from a position on; ends where nothing whole is written yet."""
    numbers = [number for number in _segments(folder) if number >= start.segment]
    given = 0
    for index, number in enumerate(numbers):
        last = index == len(numbers) - 1
        offset = start.offset if number == start.segment else 0
        with _segment_path(folder, number).open("rb") as file:
            file.seek(offset)
            data = file.read(_READ_BYTES)
        used = 0
        while given < limit:
            entry = _decode(data, used, number, offset)
            if entry is None:
                break
            used = entry.after.offset - offset
            given += 1
            yield entry
        if given >= limit:
            return
        if len(data) == _READ_BYTES:
            return
        if used < len(data) and not last:
            log.error("journal.torn", segment=number, offset=offset + used, dropped_bytes=len(data) - used)


def _decode(data: bytes, at: int, segment: int, offset: int) -> Entry | None:
    if at + _HEAD.size > len(data):
        return None
    magic, length, checksum = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + length
    if magic != _MAGIC or length > MAX_RECORD_BYTES or end > len(data):
        return None
    body = data[at + _HEAD.size : end]
    if zlib.crc32(body) != checksum:
        return None
    raw = json.loads(body)
    return Entry(
        time=datetime.fromisoformat(raw.pop("time")),
        kind=raw.pop("kind"),
        fields=raw,
        after=Position(segment, offset + end),
    )
