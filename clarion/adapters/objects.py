"""The object store on the local disk: files under their digest, and ranges of the journal's segments.

A file is written beside, synced, moved into place and the folder synced, in that order, so that a name in place always
names whole bytes, also after a power cut. A range of a segment is an instance that lies in the journal record that
acknowledged it; when the segment is given up, what is still wanted of it is first put under its digest, where every
old reference then finds it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import time
import uuid
from typing import TYPE_CHECKING

from clarion.adapters.files import make_folder, sync_folder
from clarion.crashpoints import effect
from clarion.digests import agrees, digest_of, file_name
from clarion.errors import MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_SEGMENT = re.compile(r"segment:(\w+)/(\d+)/(\d+)")


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


class FileStore:
    """The object store as files under `root`, in 256 folders by digest, and the segments under `journal`."""

    def __init__(self, root: Path, journal: Path | None = None) -> None:
        self._root = make_folder(root)
        self._journal = journal or root.parent / "journal"
        self._incoming = make_folder(root / "incoming")
        for number in range(256):
            (root / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        sync_folder(root)

    def put(self, data: bytes) -> ObjectRef:
        """Keep the data; durable on return."""
        digest = digest_of(data)
        ref = ObjectRef(location=f"file:{file_name(digest)}", digest=digest, size_bytes=len(data))
        place = self._path(digest)
        if self._is_there(place, data):
            # Whoever put it in place may not have come to syncing the folder.
            try:
                sync_folder(place.parent)
            except OSError as error:
                raise unavailable(error) from error
            return ref
        incoming = self.receive()
        try:
            incoming.write(data)
            return incoming.keep(digest)
        finally:
            incoming.abandon()

    def _is_there(self, place: Path, data: bytes) -> bool:
        """Tell whether a file has the data; one that the disk cannot read is replaced."""
        try:
            return place.read_bytes() == data
        except OSError:
            return False

    def receive(self) -> IncomingFile:
        """Begin an object that is written piece by piece. Raises StoreUnavailableError."""
        return IncomingFile(self._incoming / uuid.uuid4().hex, self._path)

    def read(self, ref: ObjectRef) -> bytes:
        """Give an object's bytes, compared with their digest."""
        data, broken = None, None
        try:
            data = self._read_segment(ref)
        except OSError as error:
            broken = error  # there may be a second copy
        try:
            if data is None or not agrees(data, ref.digest):
                data = self._path(ref.digest).read_bytes()
        except FileNotFoundError as error:
            if broken is not None:
                raise StoreUnavailableError(f"object {ref.digest[:23]} cannot be read: {broken.strerror}") from broken
            raise MissingObjectError(f"object {ref.digest[:23]} is not in the store") from error
        except OSError as error:
            raise StoreUnavailableError(f"object {ref.digest[:23]} cannot be read: {error.strerror}") from error
        if not agrees(data, ref.digest):
            raise MissingObjectError(f"object {ref.digest[:23]} is damaged: its bytes have another digest")
        return data

    def read_head(self, ref: ObjectRef, count: int) -> bytes:
        """Give up to `count` bytes from the beginning, not compared with the digest. A range of a segment is small."""
        if _SEGMENT.fullmatch(ref.location) is not None:
            return self.read(ref)[:count]
        try:
            with self._path(ref.digest).open("rb", buffering=0) as file:
                return file.read(count)
        except FileNotFoundError as error:
            raise MissingObjectError(f"object {ref.digest[:23]} is not in the store") from error
        except OSError as error:
            raise StoreUnavailableError(f"object {ref.digest[:23]} cannot be read: {error.strerror}") from error

    def _read_segment(self, ref: ObjectRef) -> bytes | None:
        """Read a range of a segment; None when the object is no such range, or its segment is gone."""
        match = _SEGMENT.fullmatch(ref.location)
        if match is None:
            return None
        log, number, offset = match.groups()
        try:
            with segment_path(self._journal / log, int(number)).open("rb", buffering=0) as file:
                return os.pread(file.fileno(), ref.size_bytes, int(offset))
        except FileNotFoundError:
            return None

    def clear_incoming(self, older_than_s: float = 3600.0) -> int:
        """Remove what a crash left half written, and nobody can still be writing. Gives the count."""
        oldest = time.time() - older_than_s
        left = [path for path in self._incoming.iterdir() if path.stat().st_mtime < oldest]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _path(self, digest: str) -> Path:
        name = file_name(digest)
        return self._root / name[:2] / name


class IncomingFile:
    """An object being written piece by piece. End it with `keep` or `abandon`; the latter may always follow."""

    def __init__(self, path: Path, place: Callable[[str], Path]) -> None:
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
        """Put the object in place under its digest, durable on return. Raises StoreUnavailableError."""
        place = self._place(digest)
        try:
            with effect("store.sync"):
                os.fdatasync(self._file)
            with effect("store.publish"):
                self._path.replace(place)
                sync_folder(place.parent)
        except OSError as error:
            raise unavailable(error) from error
        return ObjectRef(location=f"file:{file_name(digest)}", digest=digest, size_bytes=self.size)

    def abandon(self) -> None:
        """Close the file, and remove what was not kept."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            # What cannot be removed now is by `clear_incoming`.
            with contextlib.suppress(OSError):
                self._path.unlink()
