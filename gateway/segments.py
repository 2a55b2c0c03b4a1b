"""The segment being written: a shared sync, over blocks that were written before wherever that pays.

Group commit: the first thread that waits finds no sync under way and syncs for all that have written; those who come
meanwhile wait for the next, or, where what they wrote is large, begin a second one. Among small ones it begins a moment
later where others are about to write (`Gathering`). Each is woken by a lock of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

from clarion.adapters.files import open_past_cache, sync_folder
from clarion.adapters.objects import segment_path
from clarion.crashpoints import effect
from gateway.blocks import to_blocks
from gateway.gathering import Gathering

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

SEGMENT_BYTES = 64 * 2**20
FREED = "freed-"
"""How the name of a segment begins that nothing is wanted of any more."""
MOST_READY = 16
"""So many files of a log wait to be written over: a GiB, a large study."""
# So many zeros are written behind a small record that does not fit into what has been written before: the records that
# follow lie in blocks that exist, and their sync has no size and no block to record. Larger ones would gain nothing.
_LAID = bytes(512 * 2**10)
_SMALL_BYTES = 64 * 2**10
# So much is allocated at a time in a new file, for records past the cache: a sync then records that blocks have been
# written, but no size, and a third of the processor time of the cache is left. What is not used stays allocated.
_ALLOCATED_BYTES = 8 * 2**20


class Segment:
    """The file being appended to: `write` and `reserve` are called under the writer's lock, the others by any thread.

    What is reserved is then written past the page cache, beside others; a sync counts up to the first that is not
    written yet. A write or sync that fails breaks the segment: nobody appends behind torn bytes, and nobody syncs again
    what the kernel has already reported as lost. `on_synced` is told how far the segment is synced, in order.
    """

    def __init__(self, folder: Path, number: int, ready: Path | None, on_synced: Callable[[int, int], None]) -> None:
        self.number = number
        self.size = 0
        self.synced = 0
        self.broken = False
        self._sync_failed = False
        self._on_synced = on_synced
        self._mutex = threading.Lock()
        self._gathering = Gathering()
        # Up to where, by which lock, and who.
        self._waiting: list[tuple[int, threading.Lock, int]] = []
        # What is reserved and being written: by its end, where what lies before it ends.
        self._filling: dict[int, int] = {}
        # How far the file's blocks have been written, by this use of it or an older one, and how far there are any.
        self._laid = self._allocated = 0 if ready is None else ready.stat().st_size
        path = segment_path(folder, number)
        with effect("journal.rotate"):
            if ready is not None:
                ready.rename(path)
            self._file = os.open(path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if ready is None else 0), 0o600)
            try:
                sync_folder(folder)
                self._past_cache = open_past_cache(path, os.O_WRONLY)
            except OSError:
                os.close(self._file)
                raise
        # By which a sync may begin. Each under way has an open file to itself, which the kernel tells what failed.
        self._open = [self._file, self._past_cache] if self._past_cache >= 0 else [self._file]
        self._idle = list(self._open)

    def write(self, parts: Sequence[Buffer]) -> int:
        """Append the parts as one record; give the offset to sync up to."""
        offset, wanted = self.size, sum(map(len, parts))  # type: ignore[arg-type]  # bytes and bytearrays
        # Where large ones come as well, zeros would only be in their way.
        lay = offset + wanted > self._allocated and self._allocated <= self._laid and wanted <= _SMALL_BYTES
        try:
            with effect("journal.write"):
                done = os.pwritev(self._file, [*parts, _LAID] if lay else parts, offset)
                if done < wanted:
                    self._write_rest(b"".join(parts), offset, done)
                self._laid = max(self._laid, offset + done, offset + wanted)
                self._allocated = max(self._allocated, self._laid)
        except OSError:
            self.broken = True
            self._wake_all()
            raise
        self.size = offset + wanted
        return self.size

    @property
    def gap(self) -> int:
        """How many bytes are left out before a record of whole blocks."""
        return to_blocks(self.size) - self.size

    def takes_blocks(self, count: int) -> bool:
        """Tell whether so many bytes, whole blocks, may be written past the cache; allocate them if need be."""
        end = self.size + self.gap + count
        return self._past_cache >= 0 and (end <= self._allocated or self._allocate(end))

    def _allocate(self, end: int) -> bool:
        """Have blocks up to `end`, and for some records more; tell whether there are."""
        wanted = max(end, min(self._allocated + _ALLOCATED_BYTES, SEGMENT_BYTES))
        try:
            with effect("journal.allocate"):
                os.posix_fallocate(self._file, self._allocated, wanted - self._allocated)
        except OSError:
            return False  # the record is appended through the cache, and fails there if it must
        self._allocated = wanted
        return True

    def reserve(self, count: int) -> int:
        """Keep a place behind the gap for what `write_blocks` must then write; give the offset of its end."""
        with self._mutex:
            end = self.size + self.gap + count
            self._filling[end] = self.size
            self.size = end
        return end

    def write_blocks(self, record: memoryview, end: int) -> None:
        """Write what was reserved."""
        done, begin = 0, end - len(record)
        try:
            with effect("journal.writeblocks"):
                while done < len(record):
                    done += os.pwrite(self._past_cache, record[done:], begin + done)
        except BaseException:  # whatever it was, the place stays empty: nobody may count on what is behind it
            self.broken = True
            raise
        finally:
            with self._mutex:
                del self._filling[end]
            if self.broken:
                self._wake_all()

    def _written(self) -> int:
        """Give up to where everything is written. Called with the mutex."""
        return min(self._filling.values(), default=self.size)

    def _wake_all(self) -> None:
        """Have everybody look again: the segment is broken. Whose a sync under way may be waits on for it."""
        with self._mutex:
            woken, self._waiting = self._waiting, []
        for _, gate, _ in woken:
            gate.release()

    def _write_rest(self, whole: bytes, offset: int, done: int) -> None:
        rest = memoryview(whole)
        while done < len(rest):
            done += os.pwrite(self._file, rest[done:], offset + done)

    def sync(self, end: int, *, of_blocks: bool = False) -> None:
        """Return when everything up to `end` is durable; raises OSError when it cannot be.

        Who has written blocks waits for nobody else to write, and may sync beside another: so large a write seldom
        comes together with others.
        """
        self._gathering.came()
        while True:
            with self._mutex:
                if self.synced >= end:
                    return
                if self.broken and not self._leading:
                    raise OSError(errno.EIO, "the segment was given up")
                turn = self._wait_or_lead(end, of_blocks=of_blocks)
            if isinstance(turn, int):
                self._lead(turn, gathers=not of_blocks)
            else:
                turn.acquire()

    @property
    def _leading(self) -> bool:
        return len(self._idle) < len(self._open)

    def _wait_or_lead(self, end: int, *, of_blocks: bool = False) -> threading.Lock | int:
        """Give the lock to wait on, or the open file by which the caller is to sync. Called with the mutex."""
        taken = not self._idle if of_blocks else self._leading
        if taken or self.broken or self._written() < end:
            return self._gate(end)
        return self._idle.pop()

    def _gate(self, end: int) -> threading.Lock:
        """Make a lock that is released when there is news for who waits for `end`. Called with the mutex."""
        gate = threading.Lock()
        gate.acquire()
        self._waiting.append((end, gate, threading.get_ident()))
        return gate

    def _lead(self, file: int, *, gathers: bool = True) -> None:
        if gathers:
            self._gathering.wait()
        with self._mutex:
            # What failed meanwhile is not being written any more, and is not written either.
            mark = self.synced if self.broken else self._written()
            waiting = {who for end, _, who in self._waiting if end > mark}
        self._gathering.begin(waiting)
        try:
            with effect("journal.sync"):
                os.fdatasync(file)
        except OSError:
            # A disk may tell one of two syncs alone that it lost what both were to cover.
            self.broken = self._sync_failed = True
            mark = self.synced
        self._gathering.end()
        self._let_go(mark, file)

    def _let_go(self, mark: int, file: int) -> None:
        """Note what was synced; wake whose bytes it covers, and one of the others to lead the next."""
        with self._mutex:
            self._idle.append(file)
            if mark > self.synced and not self._sync_failed:
                self.synced = mark
                self._on_synced(self.number, mark)
            rest = [] if self.broken else [one for one in self._waiting if one[0] > mark]
            woken = self._waiting if self.broken else [one for one in self._waiting if one[0] <= mark]
            # Who waits for what is still being written leaves it to those who write.
            following = next((one for one in rest if one[0] <= self._written()), None)
            if following is not None:
                rest.remove(following)
                woken = [*woken, following]
            self._waiting = rest
        for _, gate, _ in woken:
            gate.release()

    def retire(self) -> None:
        """Sync what is whole and close; whoever waits for a record that could not be synced is told so."""
        with contextlib.suppress(OSError):
            self.sync(self.size)
        self.broken = True
        while True:
            with self._mutex:
                if not self._leading and not self._filling:
                    break
                gate = self._gate(0)
            gate.acquire()
        os.close(self._file)
        if self._past_cache >= 0:
            os.close(self._past_cache)


def ready(folder: Path) -> list[Path]:
    """Give the files of a log that wait to be written over."""
    return list(folder.glob(f"{FREED}*"))


def take_freed(folder: Path) -> Path | None:
    """Give a file of the log that nothing is wanted of any more, to be written over; None if there is none."""
    return next(iter(ready(folder)), None)
