"""Writes segments of a log beforehand, in a busy log's idle moments: over blocks that exist a sync costs half.

Only a log that has filled a segment gets any, only while nothing is appended, and only on a disk with plenty of room.
What is prepared is a file as one that was freed: the log's writer takes it when it needs a new segment.
"""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from typing import TYPE_CHECKING

import structlog

from clarion.adapters.files import open_past_cache, sync_folder
from clarion.crashpoints import effect
from gateway.segments import FREED, MOST_READY, SEGMENT_BYTES, ready

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway.journal_writer import JournalWriter

log = structlog.get_logger()

# A large study comes whole before there is an idle moment again; a segment that is full shows that such studies come.
IDLE_S = 1.0
_LOOK_S = 0.5
# So much is written at a time: whatever comes meanwhile waits for no more.
_STEP_BYTES = 2 * 2**20
_PLENTY_BYTES = 4 * MOST_READY * SEGMENT_BYTES


class Preparer:
    """Prepares segments in a thread of its own until `stop`. `room` tells whether so many bytes more are free."""

    def __init__(self, journal: JournalWriter, room: Callable[[int], bool]) -> None:
        self._journal = journal
        self._room = room
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preparer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when nothing is being written."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            try:
                while self._is_wanted():
                    self._prepare()
            except OSError as error:
                # Segments are made as they are needed then, as on any new log.
                log.warning("segment.notprepared", reason=error.strerror)
                return

    def _is_wanted(self) -> bool:
        return self._may_write() and len(ready(self._journal.folder)) < MOST_READY

    def _may_write(self) -> bool:
        return (
            not self._stopped.is_set()
            and self._journal.idle_s() > IDLE_S
            and self._journal.filled > 0
            and self._room(_PLENTY_BYTES)
        )

    def _prepare(self) -> None:
        """Write one file, going on where an earlier attempt was interrupted."""
        folder = self._journal.folder
        path = folder / "preparing"
        file = _open(path)
        try:
            whole = self._fill(file)
        finally:
            os.close(file)
        if whole:
            with effect("segment.prepare"):
                path.rename(folder / f"{FREED}{uuid.uuid4().hex}")
                sync_folder(folder)

    def _fill(self, file: int) -> bool:
        """Write zeros as long as nothing else is to be written; tell whether the file is whole, and synced."""
        size = os.fstat(file).st_size // _STEP_BYTES * _STEP_BYTES
        with mmap.mmap(-1, _STEP_BYTES) as zeros:  # aligned, as writing past the cache has to be
            while size < SEGMENT_BYTES:
                if not self._may_write():
                    return False
                with effect("segment.zeros"):
                    size += os.pwrite(file, zeros, size)
        with effect("segment.zerossynced"):
            os.fdatasync(file)
        return True


def _open(path: Path) -> int:
    """Open a file past the page cache: zeros that nobody reads would only push out what somebody will."""
    flags = os.O_CREAT | os.O_WRONLY
    file = open_past_cache(path, flags)
    return file if file >= 0 else os.open(path, flags, 0o600)
