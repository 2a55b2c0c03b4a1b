"""Writing a log of the journal: one process, any number of its threads, each success backed by a sync.

`append` returns when the record, and the data set in it, are synced. A record whose write or sync failed is written
once more into a new segment: a failed sync is never repeated. A writer begins with a new segment and says in its first
record where the ones before end, so that what a crash left behind the end is never read.
"""

from __future__ import annotations

import errno
import fcntl
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import structlog
from pydantic_core import to_json

from clarion.adapters.files import make_folder, map_page
from clarion.adapters.objects import segment_path
from clarion.digests import agrees
from clarion.errors import ResourceBusyError, StoreUnavailableError
from gateway import journal
from gateway.blocks import BLOCK_BYTES, to_blocks
from gateway.journal import Position
from gateway.recents import RecentWriter
from gateway.segments import SEGMENT_BYTES, Segment, take_freed

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from typing_extensions import Buffer

    from clarion.ports import Clock
    from gateway.blocks import BlockBuffer

log = structlog.get_logger()

# Smaller ones are as fast through the cache, together with those beside them.
_PAST_CACHE_BYTES = 64 * 2**10


class JournalWriter:
    """The one writer of a log; any number of its process's threads may append.

    `on_commit` is called after the committed end has moved.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        on_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = make_folder(folder)
        self._clock = clock
        self._on_commit = on_commit
        self._writing = threading.Lock()
        self._lock_file = (folder / "writer.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ResourceBusyError(f"another process writes the journal in {folder}") from error
        self._number = max(journal.segments(folder), default=0)
        self._sequence = 0
        self._key = b""
        self._closed = False
        self._past_cache = True
        self._segment: Segment | None = None
        self._appended = time.monotonic()
        self.filled = count_filled(folder)
        """How many segments of the log have been filled, about."""
        try:
            self._end = _CommittedEnd(folder)
            self._recents = RecentWriter(folder)
            self._ends, self._torn = recover(folder)
            with self._writing:
                segment = self._usable(0)
            # What a power cut left unread is committed with this, though nothing new may come for long.
            segment.sync(segment.size)
        except OSError as error:
            self._lock_file.close()
            raise StoreUnavailableError(f"the journal cannot be written: {error.strerror}") from error

    def append(
        self, kind: str, fields: dict[str, Any], data: Buffer = b"", lying_in: BlockBuffer | None = None
    ) -> datetime:
        """Write a record, `data` in it; durable on return. Gives the record's time. Raises StoreUnavailableError.

        What lies at the beginning of a BlockBuffer is written past the page cache where that pays.
        """
        body = to_json({"kind": kind, **fields})
        if len(body) > journal.MAX_BODY_BYTES:
            raise StoreUnavailableError(f"a journal record of {len(body)} bytes is too large")
        try:
            try:
                if not self._past_cache or len(data) < _PAST_CACHE_BYTES:  # type: ignore[arg-type]  # as below
                    lying_in = None
                return self._append(body, data, lying_in)
            except OSError as error:
                log.warning("journal.again", reason=error.strerror)
                # The disk may want blocks of another size.
                self._past_cache = self._past_cache and not (lying_in is not None and error.errno == errno.EINVAL)
                return self._append(body, data)
        except OSError as error:
            raise StoreUnavailableError(f"the journal cannot be written: {error.strerror}") from error

    def idle_s(self) -> float:
        """Give for how long nothing has been appended."""
        return time.monotonic() - self._appended

    def close(self) -> None:
        """Sync and let go."""
        with self._writing:
            self._closed = True
            if self._segment is not None:
                self._segment.retire()
            self._segment = None
            self._lock_file.close()
            self._end.close()
            self._recents.close()

    def _append(self, body: bytes, data: Buffer, lying_in: BlockBuffer | None = None) -> datetime:
        with self._writing:
            if self._closed:
                raise StoreUnavailableError("the journal has been closed")
            segment = self._usable(len(body) + len(data) + 3 * BLOCK_BYTES)  # type: ignore[arg-type]  # bytes or like it
            now = self._clock.now()
            self._appended = time.monotonic()
            framed = self._frame(segment, now, body, len(data), lying_in) if lying_in is not None else None  # type: ignore[arg-type]  # as above
            if framed is None:
                end = self._write(segment, now, body, data)
            else:
                record, front, within = framed
                end = segment.reserve(len(record))
                key, sequence = self._key, self._sequence
        if framed is not None:
            # First, for the segment is not closed while a record is being written.
            self._recents.put(key, (sequence, end - len(record)), front, within, memoryview(data))
            segment.write_blocks(record, end)  # others write behind it meanwhile
        segment.sync(end, of_blocks=framed is not None)
        self._on_commit()
        return now

    def _write(self, segment: Segment, now: datetime, body: bytes, data: Buffer) -> int:
        self._sequence += 1
        place = journal.Place(segment=segment.number, sequence=self._sequence)
        head = journal.encode(self._key, place, now, body, len(data))  # type: ignore[arg-type]  # as above
        return segment.write((head, body, data) if data else (head, body))

    def _frame(
        self, segment: Segment, now: datetime, body: bytes, size: int, buffer: BlockBuffer
    ) -> tuple[memoryview, bytes, int] | None:
        """Make the record whole blocks, for the next place in the segment; give its front and what it leaves out also.

        None if the segment takes none, or none so long.
        """
        front = to_blocks(journal.HEAD_LENGTH + len(body))
        if not (buffer.takes(front) and segment.takes_blocks(front + to_blocks(size))):
            return None
        self._sequence += 1
        place = journal.Place(
            segment=segment.number,
            sequence=self._sequence,
            before=segment.gap,
            within=front - journal.HEAD_LENGTH - len(body),
            behind=to_blocks(size) - size,
        )
        head = journal.encode(self._key, place, now, body, size)
        return buffer.frame((head + body).ljust(front, b"\0"), size), head + body, place.within

    def _usable(self, size: int) -> Segment:
        """Give the segment to append to: the present one, or a new one when it is broken or full."""
        segment = self._segment
        if segment is not None and not segment.broken and segment.size + size <= SEGMENT_BYTES:
            return segment
        if segment is not None:
            if segment.broken:
                log.error("journal.segmentabandoned", segment=segment.number)
            self._segment = None
            self.filled += not segment.broken
            segment.retire()
            self._ends[segment.number] = segment.synced
        # A number is used once, also when its file could not be made durable.
        self._number += 1
        opened = Segment(self.folder, self._number, take_freed(self.folder), self._synced)
        said = {"ends": self._ends, "torn": self._torn}
        body = to_json({"kind": journal.OPENED, **said})
        self._segment = opened
        self._key = secrets.token_bytes(journal.KEY_BYTES)
        opened.write((journal.encode_key(self._key),))
        self._write(opened, self._clock.now(), body, b"")
        return opened

    def _synced(self, number: int, offset: int) -> None:
        """Publish the committed end. Once a segment's first record is synced, what it announces need not be again."""
        self._end.publish(Position(number, offset))
        if not self._ends:
            return
        for announced in [one for one in self._ends if one < number]:
            del self._ends[announced]
            self._torn.pop(announced, None)


class _CommittedEnd:
    """One number in a mapped file: readers see it at once, and a store is all that it costs."""

    def __init__(self, folder: Path) -> None:
        self._map = map_page(journal.committed_path(folder))
        self._number = memoryview(self._map).cast("Q")

    def publish(self, end: Position) -> None:
        self._number[0] = journal.pack_end(end)

    def close(self) -> None:
        self._number.release()
        self._map.close()


def count_filled(folder: Path) -> int:
    """Count the segments of a log that have been filled, about."""
    sizes = [segment_path(folder, number).stat().st_size for number in journal.segments(folder)]
    return sum(size > SEGMENT_BYTES // 2 for size in sizes)


def recover(folder: Path) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Find the ends of the segments that nobody has announced, and the torn records in them; sync what is whole.

    Only what a crash left open is read: the last segment, seldom another.
    """
    numbers = journal.segments(folder)
    committed = journal.committed_end(folder)
    openings = {number: journal.opening(folder, number) for number in numbers}
    announced = {int(one) for opened in openings.values() if opened is not None for one in opened["ends"]}
    # Whoever opened the last of them announced all before it; some who did so have been freed since.
    last = max((number for number, opened in openings.items() if opened is not None), default=0)
    ends: dict[int, int] = {}
    torn: dict[int, list[int]] = {}
    for number in numbers:
        if number not in announced and number >= last:
            # What is committed was synced and acknowledged: if it cannot be read now, it is damaged and not torn.
            sure = committed.offset if number == committed.segment else 0
            end, half = _recover_one(folder, number)
            ends[number], torn[number] = max(end, sure), [one for one in half if one >= sure]
    return ends, torn


def settle(folder: Path, clock: Clock) -> None:
    """Commit what a log holds that nobody writes any more, and that a power cut may have left unread."""
    numbers = journal.segments(folder)
    committed = journal.committed_end(folder)
    if numbers and (committed.segment != numbers[-1] or _recover_one(folder, numbers[-1])[0] > committed.offset):
        JournalWriter(folder, clock).close()


def _recover_one(folder: Path, number: int) -> tuple[int, list[int]]:
    """Find the end of the last whole record, and the offsets of those before it whose data set is not whole."""
    end, torn, expected = 0, [], journal.FIRST_OFFSET
    size = segment_path(folder, number).stat().st_size
    with journal.SegmentFile(folder, number) as file:
        for entry in file.whole(0, size):
            if entry.since != expected:
                torn.append(expected)  # not even its head came to the disk, but what was written behind it did
            expected = entry.after.offset
            if entry.head and not agrees(file.data(entry), entry.fields["object"]["digest"]):
                torn.append(entry.begin)
            else:
                end = entry.after.offset
        file.sync()
    torn = [one for one in torn if one < end]
    if end < size:
        log.info("journal.recovered", log=folder.name, segment=number, end=end, torn=len(torn))
    return end, torn
