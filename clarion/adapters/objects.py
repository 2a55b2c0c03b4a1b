"""The object store on the local disk: files under their digest, and ranges of the journal's segments.

A file is written beside, synced, moved into place and the folder synced, in that order, so that a name in place always
names whole bytes, also after a power cut.

What we make is put under its digest, and whoever makes it again shares it. What is received is not shared: every
receipt has bytes of its own, in the range of a segment that acknowledged it or in a file whose name is not used again.
So a receipt can be removed while the same data set is being received once more. When a segment is given up, what is
still wanted of it is first restored: put into a file named by its place, where every old reference then finds it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING

from clarion.adapters.files import make_folder, sync_folder
from clarion.crashpoints import effect
from clarion.digests import agrees, digest_of, file_name
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from typing_extensions import Buffer

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_SEGMENT = re.compile(r"segment:(\w+)/(\d+)/(\d+)")
_RECEIVED = re.compile(r"received:([0-9a-f]{32})")


def segment_path(folder: Path, number: int) -> Path:
    """Give the file of a journal segment in the folder of its log."""
    return folder / f"{number:08d}.seg"


def segment_location(log: str, number: int, offset: int) -> str:
    """Give the location of bytes in a segment, for an ObjectRef."""
    return f"segment:{log}/{number}/{offset}"


def offset_of(location: str) -> int:
    """Give the offset that `segment_location` was made of."""
    return int(location.rpartition("/")[2])


def unavailable(error: OSError) -> StoreUnavailableError:
    """Say what is wrong with the disk."""
    kind = "full" if error.errno in _FULL else "not writable"
    return StoreUnavailableError(f"the object store is {kind}: {error.strerror}")


def segment_of(ref: ObjectRef) -> tuple[str, int] | None:
    """Give the log and the number of the segment in which an object lies, or lay; None for another place."""
    match = _SEGMENT.fullmatch(ref.location)
    return None if match is None else (match.group(1), int(match.group(2)))


def received_name(location: str) -> str:
    """Give the name of the file that a receipt has, or has when it is restored; empty for what is shared."""
    received, segment = _RECEIVED.fullmatch(location), _SEGMENT.fullmatch(location)
    if received is not None:
        return received.group(1)
    return "" if segment is None else "-".join(segment.groups())


class FileStore:
    """The object store as files under `root`, in 256 folders by digest, and the segments under `journal`."""

    def __init__(self, root: Path, journal: Path | None = None) -> None:
        self._root = make_folder(root)
        self._journal = journal or root.parent / "journal"
        self._incoming = make_folder(root / "incoming")
        self._received = make_folder(root / "received")
        for folder in (root, self._received):
            # Made in this order: where the last is, all are.
            if not (folder / "ff").exists():
                for number in range(256):
                    (folder / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder)

    def put(self, data: bytes) -> ObjectRef:
        """Keep the data; durable on return."""
        digest = digest_of(data)
        ref = ObjectRef(location=f"file:{file_name(digest)}", digest=digest, size_bytes=len(data))
        self.restore(ref, data)
        return ref

    def restore(self, ref: ObjectRef, data: bytes) -> None:
        """Put the bytes of a reference where its readers look when they are not where they were; durable on return."""
        place = self._own(ref)
        if self._is_there(place, data):
            # Whoever put it in place may not have come to syncing the folder.
            try:
                sync_folder(place.parent)
            except OSError as error:
                raise unavailable(error) from error
            return
        incoming = IncomingFile(self._incoming / uuid.uuid4().hex, lambda _: (place, ref.location))
        try:
            incoming.write(data)
            incoming.keep(ref.digest)
        finally:
            incoming.abandon()

    def _is_there(self, place: Path, data: bytes) -> bool:
        """Tell whether a file has the data; one that the disk cannot read is replaced."""
        try:
            return place.read_bytes() == data
        except OSError:
            return False

    def receive(self) -> IncomingFile:
        """Begin a receipt that is written piece by piece. Raises StoreUnavailableError."""
        name = uuid.uuid4().hex
        return IncomingFile(self._incoming / name, lambda digest: (self._in_received(digest, name), f"received:{name}"))

    def remove(self, refs: Iterable[ObjectRef]) -> None:
        """Remove the files of receipts that nothing refers to any more; twice is harmless.

        Not what was put under its digest, which others may share, and not what lies in a segment. Durable on return.
        Raises StoreUnavailableError.
        """
        emptied = set()
        try:
            with effect("store.remove"):
                for ref in refs:
                    place = self._own(ref)
                    if place.parent.parent == self._received and place.exists():
                        place.unlink()
                        emptied.add(place.parent)
                for folder in emptied:
                    sync_folder(folder)
        except OSError as error:
            raise unavailable(error) from error

    def received_files(self, older_than_s: float) -> dict[str, Path]:
        """Give the files of receipts, by the name that `received_name` gives their references, that are so old."""
        oldest = time.time() - older_than_s
        found = {}
        for path in self._received.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    found[path.name] = path
        return found

    def remove_files(self, paths: Iterable[Path]) -> None:
        """Remove files of receipts that nothing refers to. Raises StoreUnavailableError."""
        try:
            with effect("store.remove"):
                for path in paths:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise unavailable(error) from error

    def is_whole(self, ref: ObjectRef) -> bool:
        """Tell whether an object can be read as it was, without taking it into memory."""
        if _SEGMENT.fullmatch(ref.location) is not None:
            return self._is_readable(ref)
        for place in self._places(ref):
            with (
                contextlib.suppress(OSError, ValueError),
                place.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view,
            ):
                if agrees(view, ref.digest):
                    return True
        return False

    def _is_readable(self, ref: ObjectRef) -> bool:
        try:
            self.read(ref)
        except (MissingObjectError, StoreUnavailableError):
            return False
        return True

    def read(self, ref: ObjectRef) -> bytes:
        """Give an object's bytes, compared with their digest."""
        broken, damaged = None, False
        for reading in self._copies(ref):
            try:
                data = reading()
            except OSError as error:
                broken = error  # there may be a second copy
                continue
            if data is not None and agrees(data, ref.digest):
                return data
            damaged = damaged or data is not None
        if broken is not None:
            raise StoreUnavailableError(f"object {ref.digest[:23]} cannot be read: {broken.strerror}") from broken
        if damaged:
            raise MissingObjectError(f"object {ref.digest[:23]} is damaged: its bytes have another digest")
        raise MissingObjectError(f"object {ref.digest[:23]} is not in the store")

    def read_head(self, ref: ObjectRef, count: int) -> bytes:
        """Give up to `count` bytes from the beginning, not compared with the digest."""
        wanted, head, broken = min(count, ref.size_bytes), None, None
        try:
            head = self._read_segment(ref, wanted)
        except OSError as error:
            broken = error  # there may be a second copy
        if head is not None and len(head) == wanted:
            return head
        for place in self._places(ref):
            try:
                with place.open("rb", buffering=0) as file:
                    return file.read(count)
            except FileNotFoundError:
                continue
            except OSError as error:
                broken = error
        if broken is not None:
            raise StoreUnavailableError(f"object {ref.digest[:23]} cannot be read: {broken.strerror}") from broken
        raise MissingObjectError(f"object {ref.digest[:23]} is not in the store")

    def _read_segment(self, ref: ObjectRef, count: int | None = None) -> bytes | None:
        """Read a range of a segment, or its beginning; None when the object is none, or its segment is gone."""
        match = _SEGMENT.fullmatch(ref.location)
        if match is None:
            return None
        log, number, offset = match.groups()
        try:
            with segment_path(self._journal / log, int(number)).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), ref.size_bytes if count is None else count, int(offset))
        except FileNotFoundError:
            return None

    def clear_incoming(self, older_than_s: float = 3600.0) -> int:
        """Remove what a crash left half written, and nobody can still be writing. Gives the count."""
        oldest = time.time() - older_than_s
        left = [path for path in self._incoming.iterdir() if path.stat().st_mtime < oldest]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _copies(self, ref: ObjectRef) -> Iterator[Callable[[], bytes | None]]:
        yield partial(self._read_segment, ref)
        for place in self._places(ref):
            yield partial(_read_file, place)

    def _places(self, ref: ObjectRef) -> tuple[Path, ...]:
        """Give the files that may have an object: its own, and that of its digest, where others may have put it."""
        return tuple(dict.fromkeys((self._own(ref), self._path(ref.digest))))

    def _own(self, ref: ObjectRef) -> Path:
        """Give the file that is an object's alone; of a range of a segment, that to which it is restored."""
        name = received_name(ref.location)
        return self._in_received(ref.digest, name) if name else self._path(ref.digest)

    def _in_received(self, digest: str, name: str) -> Path:
        return self._received / file_name(digest)[:2] / name

    def _path(self, digest: str) -> Path:
        name = file_name(digest)
        return self._root / name[:2] / name


def _read_file(place: Path) -> bytes | None:
    try:
        return place.read_bytes()
    except FileNotFoundError:
        return None


class IncomingFile:
    """An object being written piece by piece. End it with `keep` or `abandon`; the latter may always follow."""

    def __init__(self, path: Path, place: Callable[[str], tuple[Path, str]]) -> None:
        self._path = path
        self._place = place
        self.size = 0
        try:
            self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise unavailable(error) from error

    def write(self, data: Buffer) -> None:
        """Append some bytes. Raises StoreUnavailableError."""
        rest = memoryview(data)
        try:
            with effect("store.write"):
                while rest:
                    count = os.write(self._file, rest)
                    self.size += count
                    rest = rest[count:]
        except OSError as error:
            raise unavailable(error) from error

    def view(self) -> mmap.mmap:
        """Map what was written, for reading; close it before anything else is done."""
        return mmap.mmap(self._file, self.size, access=mmap.ACCESS_READ)

    def keep(self, digest: str) -> ObjectRef:
        """Put the object in place, durable on return. Raises StoreUnavailableError."""
        place, location = self._place(digest)
        try:
            with effect("store.sync"):
                os.fdatasync(self._file)
            with effect("store.publish"):
                self._path.replace(place)
                sync_folder(place.parent)
        except OSError as error:
            raise unavailable(error) from error
        return ObjectRef(location=location, digest=digest, size_bytes=self.size)

    def abandon(self) -> None:
        """Close the file, and remove what was not kept."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            # What cannot be removed now is by `clear_incoming`.
            with contextlib.suppress(OSError):
                self._path.unlink()
