"""Bytes on the local disk: the object store, and the few file-system promises the rest leans on.

An object lies under the digest of its bytes. It is written beside, synced, moved into place and the folder synced,
in that order, so that a name in place always names whole bytes, also after a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
import uuid
from pathlib import Path

from clarion.crashpoints import effect
from clarion.errors import ConfigError, MissingObjectError, StoreUnavailableError
from clarion.model import ObjectRef

_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs"))
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> Path:
    """Make a private folder and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)
    return folder


def refuse_network_file_system(folder: Path) -> None:
    """Raise ConfigError when the folder is on a file system that cannot keep SQLite's promises."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return
    best, kind = "", ""
    for line in mounts.read_text().splitlines():
        _, point, found, *_ = line.split(" ")
        if str(folder.resolve()).startswith(point.rstrip("/") + "/") and len(point) > len(best):
            best, kind = point, found
    if kind in _NETWORK:
        raise ConfigError([f"data: {folder} is on a network file system ({kind}); choose a folder on a local disk"])


def free_bytes(folder: Path) -> tuple[int, int]:
    """Give the bytes free to us and the size of the folder's file system."""
    usage = shutil.disk_usage(folder)
    return usage.free, usage.total


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part. Not synced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.write_bytes(data)
    beside.replace(path)


class FileStore:
    """The object store as files under `root`, in 256 folders by digest."""

    def __init__(self, root: Path) -> None:
        self._root = make_folder(root)
        self._incoming = make_folder(root / "incoming")
        for number in range(256):
            (root / f"{number:02x}").mkdir(mode=0o700, exist_ok=True)
        sync_folder(root)

    def put(self, data: bytes) -> ObjectRef:
        """Keep the data; durable on return."""
        digest = hashlib.sha256(data).hexdigest()
        ref = ObjectRef(location=f"file:{digest}", digest=digest, size_bytes=len(data))
        place = self._path(digest)
        try:
            if place.exists() and place.read_bytes() == data:
                # Whoever put it in place may not have come to syncing the folder.
                sync_folder(place.parent)
            else:
                self._write(place, data)
        except OSError as error:
            kind = "full" if error.errno in _FULL else "not writable"
            raise StoreUnavailableError(f"the object store is {kind}: {error.strerror}") from error
        return ref

    def _write(self, place: Path, data: bytes) -> None:
        beside = self._incoming / uuid.uuid4().hex
        try:
            with effect("store.write"), beside.open("xb") as file:
                file.write(data)
                file.flush()
                with effect("store.sync"):
                    os.fsync(file.fileno())
            with effect("store.publish"):
                beside.replace(place)
                sync_folder(place.parent)
        finally:
            beside.unlink(missing_ok=True)

    def read(self, ref: ObjectRef) -> bytes:
        """Give an object's bytes, compared with their digest."""
        try:
            data = self._path(ref.digest).read_bytes()
        except FileNotFoundError as error:
            raise MissingObjectError(f"object {ref.digest[:16]} is not in the store") from error
        except OSError as error:
            raise StoreUnavailableError(f"object {ref.digest[:16]} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != ref.digest:
            raise MissingObjectError(f"object {ref.digest[:16]} is damaged: its bytes have another digest")
        return data

    def clear_incoming(self, older_than_s: float = 3600.0) -> int:
        """Remove what a crash left half written, and nobody can still be writing. Gives the count."""
        oldest = time.time() - older_than_s
        left = [path for path in self._incoming.iterdir() if path.stat().st_mtime < oldest]
        for path in left:
            path.unlink(missing_ok=True)
        return len(left)

    def _path(self, digest: str) -> Path:
        return self._root / digest[:2] / digest
