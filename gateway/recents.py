"""The beginnings of the records that a log's writer wrote last past the page cache, for the owner, who reads them soon.

They would have to come back from the disk, between the writes of what comes meanwhile: everybody's syncs then take half
as long again. The file is never synced and nothing depends on it: what is not found in it, whole and of this use of its
segment, is read from the segment.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# As many as come to a log in the seconds for which the owner may wait; with the header of nearly every data set.
SLOTS = 4096
SLOT_BYTES = 8 * 2**10
# Which record it is, how many bytes of its front and of its data are here and how many it leaves out between them,
# behind the seal of all that.
_SAID = struct.Struct("<QQIII")
_SEAL_BYTES = 8
_BEGIN = _SEAL_BYTES + _SAID.size


def recents_path(folder: Path) -> Path:
    """Give the file of a log's recent records."""
    return folder / "recent"


def _seal(key: bytes, parts: Sequence[bytes | memoryview]) -> bytes:
    return blake3(b"".join(parts), key=key).digest(_SEAL_BYTES)


class RecentWriter:
    """Keeps the beginnings of the last records, by their sequence numbers. Safe from several threads.

    It begins with none: of what an earlier writer kept, a power cut may have left more here than in the segment.
    """

    def __init__(self, folder: Path) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(recents_path(folder), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def put(self, key: bytes, place: tuple[int, int], front: bytes, left_out: int, data: memoryview) -> None:
        """Keep the beginning of a record, unless its front alone is too long. Never raises.

        `key` is its segment's, `place` its sequence number and its offset; so much is left out behind its front.
        """
        if self._file < 0 or _BEGIN + len(front) > SLOT_BYTES:
            return
        beginning = data[: SLOT_BYTES - _BEGIN - len(front)]
        parts = _SAID.pack(*place, len(front), left_out, len(beginning)), front, beginning
        with contextlib.suppress(OSError):
            os.pwritev(self._file, (_seal(key, parts), *parts), place[0] % SLOTS * SLOT_BYTES)

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)


class RecentReader:
    """Finds the beginnings of records; each may be overwritten while it is read, and is then not found."""

    def __init__(self, folder: Path) -> None:
        self._file = -1
        with contextlib.suppress(OSError):
            self._file = os.open(recents_path(folder), os.O_RDONLY)

    def find(self, key: bytes, sequence: int, offset: int) -> bytes | None:
        """Give the beginning of the record with a sequence number at an offset, if it is here."""
        slot = b""
        with contextlib.suppress(OSError):
            slot = os.pread(self._file, SLOT_BYTES, sequence % SLOTS * SLOT_BYTES) if self._file >= 0 else b""
        if len(slot) < _BEGIN:
            return None
        *place, front, left_out, data = _SAID.unpack_from(slot, _SEAL_BYTES)
        end = _BEGIN + front + data
        if place != [sequence, offset] or _seal(key, (slot[_SEAL_BYTES:end],)) != slot[:_SEAL_BYTES]:
            return None
        return slot[_BEGIN : _BEGIN + front] + bytes(left_out) + slot[_BEGIN + front : end]

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
