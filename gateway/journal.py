"""The journal as it lies on the disk, and reading it: what intake has acknowledged, the queue to the grouping owner.

A log is a folder of segments, written by one process: records one behind the other, each with the number of its
segment, so that what an older use left in a recycled file is never taken for a record. A record is a head, a body of
JSON and, for an instance of up to a mebibyte, its data set: the record is then the object. The first record of a
segment says where the segments before it end. Any number of processes read, up to the committed end and never beyond:
what lies behind it was written, and perhaps is not synced.

A record that was written past the page cache fills whole blocks: it says how many bytes it leaves out before it and
before its data set, so that a block begins with each, and how many behind it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import structlog
from blake3 import blake3

from clarion.adapters.objects import offset_of, segment_location, segment_path
from clarion.errors import ConfigError
from gateway.blocks import BLOCK_BYTES, to_blocks
from gateway.recents import RecentReader

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from typing_extensions import Buffer

log = structlog.get_logger()

MAX_BODY_BYTES = 2**20
# So much of a data set comes with its record: the header of nearly every one.
HEAD_BYTES = 16 * 2**10
_WINDOW = 64 * 2**10
# How far is read at once where instances are large: to the end of a head, seldom into the next record.
_STRIDE = 24 * 2**10
# The beginning of the key, seal of all that follows and the body, segment, sequence, microseconds since 1970, lengths
# of body and data, of what is left out before the record, before the data and behind.
_HEAD = struct.Struct("<4s8sQQQIIHHH")
HEAD_LENGTH = _HEAD.size
_SEALED_FROM = 12
# A segment begins with a key of its own, that no peer knows: bytes of a data set never pass for a record, nor for the
# beginning of one.
_KEY_MAGIC = b"CLK3"
_MAGIC_BYTES = 4
KEY_BYTES = 32
FIRST_OFFSET = len(_KEY_MAGIC) + KEY_BYTES
_END = struct.Struct("=Q")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NONE: frozenset[int] = frozenset()
_NAME = re.compile(r"\d{8}\.seg")

OPENED = "opened"
"""The first record of a segment: where those before it end, and which of their records are torn."""
DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in a log."""

    segment: int
    offset: int


START = Position(1, 0)


class Entry(NamedTuple):
    """One record: when it was journalled, its kind, its fields, the log it is from and the position after it.

    `begin` is the offset in its segment, `since` that of the end of the record before. `head` is the beginning of the
    data set that lies in the record, at most HEAD_BYTES, less of what was just written; empty if none does.
    """

    time: datetime
    kind: str
    fields: dict[str, Any]
    log: str
    since: int
    begin: int
    after: Position
    head: bytes = b""


def encode_key(key: bytes) -> bytes:
    """Make the beginning of a segment."""
    return _KEY_MAGIC + key


class Place(NamedTuple):
    """Where a record is to be, and how many bytes are left out before it, before its data and behind it."""

    segment: int
    sequence: int
    before: int = 0
    within: int = 0
    behind: int = 0


def encode(key: bytes, place: Place, time: datetime, body: bytes, data_bytes: int) -> bytes:
    """Make the head of a record."""
    microseconds = (time - _EPOCH) // timedelta(microseconds=1)
    left_out = place.before, place.within, place.behind
    numbers = place.segment, place.sequence, microseconds, len(body), data_bytes
    rest = _HEAD.pack(b"", b"", *numbers, *left_out)[_SEALED_FROM:]
    return key[:_MAGIC_BYTES] + _seal(key, rest + body) + rest


def _seal(key: bytes, data: Buffer) -> bytes:
    return blake3(data, key=key).digest(8)


def logs(journal: Path) -> list[str]:
    """Give the names of the logs of a journal."""
    return sorted(path.name for path in journal.iterdir() if path.is_dir()) if journal.is_dir() else []


def segments(folder: Path) -> list[int]:
    """Give the numbers of a log's segments."""
    return sorted(int(path.stem) for path in folder.iterdir() if _NAME.fullmatch(path.name))


def refuse_other_formats(journal: Path) -> None:
    """Raise ConfigError for a journal that another version wrote: what it acknowledged would pass for a torn end."""
    for log_name in logs(journal):
        for number in segments(journal / log_name)[-1:]:
            path = segment_path(journal / log_name, number)
            with path.open("rb") as file:
                magic = file.read(len(_KEY_MAGIC))
            if magic != _KEY_MAGIC and magic.startswith(_KEY_MAGIC[:3]):
                raise ConfigError([f"data: {path} was written by another version of Clarion; run that one, or move it"])


def committed_path(folder: Path) -> Path:
    """Give the file in which a log's writer notes its committed end: one number, segment and offset."""
    return folder / "committed"


def pack_end(end: Position) -> int:
    """Put a position into the one number of the committed end, which is written and read as a whole."""
    return end.segment << 32 | end.offset


def committed_end(folder: Path) -> Position:
    """Read how far a log is committed: what lies before is synced."""
    try:
        (packed,) = _END.unpack(committed_path(folder).read_bytes()[: _END.size])
    except (FileNotFoundError, struct.error):
        return Position(0, 0)
    return Position(packed >> 32, packed & 0xFFFFFFFF)


def read(folder: Path, start: Position, limit: int) -> Iterator[Entry]:
    """Give up to `limit` records of a log from a position on, as far as they are committed.

    Damaged bytes are passed over up to the next whole record and given as a record of kind DAMAGED: no bit that
    turned hides what lies behind it. What was torn by a power cut before it was acknowledged is not given.
    """
    end = committed_end(folder)
    numbers = [number for number in segments(folder) if number >= start.segment]
    everything = (
        entry
        for number in numbers
        if number <= end.segment
        for entry in _read_segment(folder, number, start.offset if number == start.segment else 0, end, numbers)
    )
    return itertools.islice((one for one in everything if one.kind != OPENED), limit)


def _read_segment(folder: Path, number: int, offset: int, end: Position, numbers: list[int]) -> Iterator[Entry]:
    try:
        limit, torn = (end.offset, _NONE) if number == end.segment else _announced(folder, number, numbers)
        file = SegmentFile(folder, number, recents=True)
    except FileNotFoundError:
        return
    with file:
        yield from file.entries(offset, limit, torn)


def _announced(folder: Path, number: int, numbers: list[int]) -> tuple[int, frozenset[int]]:
    # Only damage to a first record hides an end: what can be read is read.
    return announced(folder, number, numbers) or (segment_path(folder, number).stat().st_size, frozenset())


def end_path(folder: Path, number: int) -> Path:
    """Give the file in which a segment's end is kept when the segment that announced it has been freed."""
    return folder / f"{number:08d}.end"


def announced(folder: Path, number: int, numbers: list[int]) -> tuple[int, frozenset[int]] | None:
    """Find where a segment ends, and what of it is torn, in the first records of its successors."""
    try:
        said = json.loads(end_path(folder, number).read_bytes())
        return said["end"], frozenset(said["torn"])
    except (FileNotFoundError, ValueError):
        pass  # a power cut may have left it empty
    for later in (one for one in numbers if one > number):
        opened = opening(folder, later)
        if opened is not None and str(number) in opened["ends"]:
            return opened["ends"][str(number)], frozenset(opened["torn"].get(str(number), ()))
    return None


def opening(folder: Path, number: int) -> dict[str, Any] | None:
    """Read what the first record of a segment says; None where there is none."""
    try:
        with SegmentFile(folder, number) as file:
            entry = file.entry(FIRST_OFFSET, MAX_BODY_BYTES)
    except FileNotFoundError:
        return None
    return entry.fields if entry is not None and entry.kind == OPENED else None


class SegmentFile:
    """A segment being read; what was just written from the `recents`, if asked to. Raises FileNotFoundError."""

    def __init__(self, folder: Path, number: int, *, recents: bool = False) -> None:
        self._log = folder.name
        self._number = number
        self._file = os.open(segment_path(folder, number), os.O_RDONLY)
        self._recents = RecentReader(folder) if recents else None
        self._window, self._from, self._reach = b"", 0, _WINDOW
        # The sequence number of the record read last; whether the window holds the beginning of a recent one.
        self._sequence, self._recent = 0, False
        self._size = os.fstat(self._file).st_size
        beginning = os.pread(self._file, FIRST_OFFSET, 0)
        whole = len(beginning) == FIRST_OFFSET and beginning.startswith(_KEY_MAGIC)
        self._key = beginning[len(_KEY_MAGIC) :] if whole else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        if self._recents is not None:
            self._recents.close()

    def entries(self, offset: int, limit: int, torn: frozenset[int]) -> Iterator[Entry]:
        """Give the records between two offsets; what is no whole record there, and not known to be torn, is damage."""
        offset = max(offset, FIRST_OFFSET)
        while offset < limit:
            entry = self.entry(offset, limit)
            begin = offset if entry is None else entry.begin
            if entry is not None and begin not in torn:
                offset = entry.after.offset
                yield entry
            else:
                offset = self._next_whole(begin, limit)
                if begin not in torn:
                    yield self._damaged(begin, offset, limit)

    def whole(self, offset: int, limit: int) -> Iterator[Entry]:
        """Give the whole records between two offsets, whatever lies between them."""
        offset = max(offset, FIRST_OFFSET)
        while offset < limit:
            entry = self.entry(offset, limit)
            if entry is not None:
                yield entry
            offset = self._next_whole(offset, limit) if entry is None else entry.after.offset

    def sync(self) -> None:
        """Make durable what is in the file."""
        os.fdatasync(self._file)

    def data(self, entry: Entry) -> bytes:
        """Read the data set that lies in a record."""
        described = entry.fields["object"]
        return os.pread(self._file, described["size_bytes"], offset_of(described["location"]))

    def entry(self, offset: int, limit: int) -> Entry | None:
        """Decode the record at an offset, or the one that leaves out the bytes from there to the block it begins with.

        None where no whole record of this segment begins.
        """
        entry = self._decode(offset, limit)
        if entry is None and offset % BLOCK_BYTES:
            entry = self._decode(to_blocks(offset), limit)
            if entry is not None and entry.since != offset:
                return None
        return entry

    def _decode(self, offset: int, limit: int) -> Entry | None:
        at = self._at_head(offset)
        if self._key is None or len(self._window) - at < _HEAD.size:
            return None
        magic, seal, number, sequence, microseconds, body_bytes, data_bytes, *left_out = _HEAD.unpack_from(
            self._window, at
        )
        before, within, behind = left_out
        body_end = offset + _HEAD.size + body_bytes
        end = body_end + within + data_bytes
        after = end + behind
        if magic != self._key[:_MAGIC_BYTES] or number != self._number:
            return None
        if body_bytes > MAX_BODY_BYTES or after > min(limit, self._size):
            return None
        head_bytes = min(data_bytes, HEAD_BYTES)
        if self._recent:
            head_bytes = min(head_bytes, len(self._window) - at - _HEAD.size - body_bytes - within)
        at = self._at(offset, body_end - offset + within + head_bytes)
        begin = at + _HEAD.size + body_bytes
        sealed = memoryview(self._window)[at + _SEALED_FROM : begin]
        if len(sealed) != _HEAD.size + body_bytes - _SEALED_FROM or _seal(self._key, sealed) != seal:
            return None
        self._reach = _WINDOW if after - offset < _WINDOW else _STRIDE
        self._sequence = sequence
        fields = json.loads(self._window[at + _HEAD.size : begin])
        if data_bytes:
            fields["object"]["location"] = segment_location(self._log, self._number, end - data_bytes)
            fields["object"]["size_bytes"] = data_bytes
        return Entry(
            time=_EPOCH + timedelta(microseconds=microseconds),
            kind=fields.pop("kind"),
            fields=fields,
            log=self._log,
            since=offset - before,
            begin=offset,
            after=Position(self._number, after),
            head=self._window[begin + within : begin + within + head_bytes],
        )

    def _at_head(self, offset: int) -> int:
        """Have the head of a record in the window, where it was just written with much that follows it there."""
        if self._recents is not None and self._key is not None and self._reach == _STRIDE:
            found = self._recents.find(self._key, self._sequence + 1, offset)
            if found is not None:
                self._window, self._from, self._recent = found, offset, True
        return self._at(offset, _HEAD.size)

    def _at(self, offset: int, wanted: int) -> int:
        """Have `wanted` bytes from an offset on in the window, as far as there are any; give their place in it."""
        if offset < self._from or offset + wanted > self._from + len(self._window):
            self._window, self._from = os.pread(self._file, max(wanted, self._reach), offset), offset
            self._recent = False
        return offset - self._from

    def _next_whole(self, offset: int, limit: int) -> int:
        """Find the next whole record behind an offset; the limit if there is none."""
        at = offset + 1
        while at < limit and self._key is not None:
            magic = self._key[:_MAGIC_BYTES]
            chunk = os.pread(self._file, min(MAX_BODY_BYTES, limit - at), at)
            found = chunk.find(magic)
            while found >= 0:
                if self._decode(at + found, limit) is not None:
                    return at + found
                found = chunk.find(magic, found + 1)
            if len(chunk) < len(magic):
                break
            at += len(chunk) - len(magic) + 1
        return limit

    def _damaged(self, offset: int, after: int, limit: int) -> Entry:
        fields = {"segment": self._number, "offset": offset, "skipped_bytes": after - offset}
        log.error("journal.damaged", log=self._log, **fields)
        following = self._decode(after, limit) if after < limit else None
        time = following.time if following is not None else _EPOCH
        place = Position(self._number, after)
        return Entry(time=time, kind=DAMAGED, fields=fields, log=self._log, since=offset, begin=offset, after=place)
