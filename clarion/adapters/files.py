"""The few promises of the local file system that the rest leans on."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import uuid
from pathlib import Path

from clarion.errors import ConfigError

_NETWORK = frozenset(("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs"))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_past_cache(path: Path, flags: int) -> int:
    """Open a file that is written past the page cache, in whole blocks; -1 where the file system has no such way."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return -1
        raise


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


def map_page(path: Path) -> mmap.mmap:
    """Map a file of one page that processes share, made of zeros when it is not there yet."""
    if not path.exists() or path.stat().st_size != mmap.PAGESIZE:
        path.write_bytes(bytes(mmap.PAGESIZE))
        sync_folder(path.parent)
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), mmap.PAGESIZE)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part. Not synced."""
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    beside.write_bytes(data)
    beside.replace(path)
