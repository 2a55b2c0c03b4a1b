"""The journal: what intake has acknowledged, in order, on the local disk. It is the queue to the grouping owner.

Contract. One process writes, by any number of threads: `append` returns when the record is synced (threads share a
sync). Any number of processes read. A record is length, CRC-32 and JSON. A write or sync that failed breaks its
segment: the journal goes on in a new one, and whoever was not synced by then is told a failure. A writer always begins
a new segment, so a position past a torn tail leads to the next segment and not into it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
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
# Of a tail no time is known; by this one no group is judged.
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
DAMAGED = "damaged"
TAIL = "tail"


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


class _Segment:
    """The file being appended to. `write` is called under the writer's lock, `sync` by any thread.

    A write or sync that fails breaks the segment at once, while the lock that let it happen is still held: nobody
    appends behind torn bytes, and nobody syncs again what the kernel has already reported as lost.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.size = 0
        self.broken = False
        self._written = self._synced = 0
        self._syncing = threading.Lock()
        with effect("journal.rotate"):
            self._file = os.open(
                _segment_path(folder, number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o600
            )
            try:
                sync_folder(folder)
            except OSError:
                os.close(self._file)
                raise

    def write(self, record: bytes) -> int:
        """Append a record; give the ticket to sync it by."""
        try:
            with effect("journal.write"):
                rest = memoryview(record)
                while rest:
                    rest = rest[os.write(self._file, rest) :]
        except OSError:
            self.broken = True
            raise
        self.size += len(record)
        self._written += 1
        return self._written

    def sync(self, ticket: int) -> None:
        """Return when the record is durable; threads that wait together share one sync."""
        with self._syncing:
            if self._synced >= ticket:
                return
            if self.broken:
                raise OSError(errno.EIO, "the segment was given up")
            mark = self._written
            try:
                with effect("journal.sync"):
                    os.fdatasync(self._file)
            except OSError:
                self.broken = True
                raise
            self._synced = mark

    def retire(self) -> None:
        """Sync what is whole and close; whoever waits for a record that could not be synced is told so."""
        with contextlib.suppress(OSError):
            self.sync(self._written)
        with self._syncing:
            self.broken = True
            os.close(self._file)


class JournalWriter:
    """The one writer of a journal; any number of its process's threads may append."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        self._folder = make_folder(folder)
        self._clock = clock
        self._writing = threading.Lock()
        self._lock_file = (folder / "writer.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ResourceBusyError(f"another process writes the journal in {folder}") from error
        self._number = max(_segments(folder), default=0)
        self._segment: _Segment | None = None
        with self._writing:
            self._usable(0)

    def append(self, kind: str, fields: dict[str, Any]) -> datetime:
        """Write a record; durable on return. Gives the record's time. Raises StoreUnavailableError."""
        try:
            with self._writing:
                now = self._clock.now()
                record = _encode(now, kind, fields)
                segment = self._usable(len(record))
                ticket = segment.write(record)
            segment.sync(ticket)
        except OSError as error:
            raise StoreUnavailableError(f"the journal cannot be written: {error.strerror}") from error
        return now

    def close(self) -> None:
        """Sync and let go."""
        with self._writing:
            if self._segment is not None:
                self._segment.retire()
            self._lock_file.close()

    def _usable(self, size: int) -> _Segment:
        """Give the segment to append to: the present one, or a new one when it is broken or full."""
        segment = self._segment
        if segment is not None and not segment.broken and segment.size + size <= SEGMENT_BYTES:
            return segment
        if segment is not None:
            if segment.broken:
                log.error("journal.segmentabandoned", segment=segment.number)
            self._segment = None
            segment.retire()
        # A number is used once, also when its file could not be made durable.
        self._number += 1
        self._segment = _Segment(self._folder, self._number)
        return self._segment


def _encode(now: datetime, kind: str, fields: dict[str, Any]) -> bytes:
    body = json.dumps({"time": now.isoformat(), "kind": kind, **fields}, separators=(",", ":")).encode()
    if len(body) > MAX_RECORD_BYTES:
        raise StoreUnavailableError(f"a journal record of {len(body)} bytes is too large")
    return _HEAD.pack(_MAGIC, len(body), zlib.crc32(body)) + body


def read(folder: Path, start: Position, limit: int) -> Iterator[Entry]:
    """Give up to `limit` records from a position on; ends where nothing whole is written yet.

    Damaged bytes are passed over up to the next whole record and given as a record of kind DAMAGED: no bit that
    turned hides what lies behind it. Bytes at the end of a segment that has a successor are no whole record and never
    will be: a write that was cut, most likely, and not acknowledged; they are given as a record of kind TAIL.
    """
    numbers = [number for number in _segments(folder) if number >= start.segment]
    everything = (
        entry
        for number in numbers
        for entry in _read_segment(
            folder, number, start.offset if number == start.segment else 0, is_last=number == numbers[-1]
        )
    )
    return itertools.islice(everything, limit)


def _read_segment(folder: Path, number: int, offset: int, *, is_last: bool) -> Iterator[Entry]:
    with _segment_path(folder, number).open("rb") as file:
        while True:
            file.seek(offset)
            data = file.read(_READ_BYTES)
            used = 0
            while (entry := _decode(data, used, number, offset)) is not None:
                used = entry.after.offset - offset
                yield entry
            if used == 0:
                used, said = _pass_over(data, number, offset, is_last=is_last)
                if said is not None:
                    yield said
                if used == 0:
                    return
            offset += used


def _pass_over(data: bytes, number: int, offset: int, *, is_last: bool) -> tuple[int, Entry | None]:
    """Say how many bytes are no whole record, and the record that tells of them; 0 where nothing whole follows.

    That is a torn tail, a record that is being written, or damage: the last has whole records behind it.
    """
    behind = _next_whole(data, number, offset)
    fields = {"segment": number, "offset": offset}
    if behind is None and len(data) < _READ_BYTES:
        if is_last or not data:
            return 0, None
        tail = {**fields, "skipped_bytes": len(data)}
        return 0, Entry(time=_LONG_AGO, kind=TAIL, fields=tail, after=Position(number + 1, 0))
    used = len(data) - MAX_RECORD_BYTES if behind is None else behind[0]
    log.error("journal.damaged", **fields, skipped_bytes=used)
    if behind is None:
        return used, None
    damaged = {**fields, "skipped_bytes": used}
    return used, Entry(time=behind[1], kind=DAMAGED, fields=damaged, after=Position(number, offset + used))


def _next_whole(data: bytes, segment: int, offset: int) -> tuple[int, datetime] | None:
    """Find the next whole record behind the start of `data`, and its time."""
    at = data.find(_MAGIC, 1)
    while at > 0:
        entry = _decode(data, at, segment, offset)
        if entry is not None:
            return at, entry.time
        at = data.find(_MAGIC, at + 1)
    return None


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
