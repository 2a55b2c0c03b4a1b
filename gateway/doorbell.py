"""Between those who write the journal and the one who reads it: rung only while the reader sleeps.

A flag in a mapped file says that it does, so that a busy reader costs its writers a look at memory and no more.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from typing import TYPE_CHECKING

from clarion.adapters.files import make_folder

if TYPE_CHECKING:
    from pathlib import Path


class Doorbell:
    """The flag, and the way to the reader's socket. `ring` may be called by any thread."""

    def __init__(self, journal: Path, wake: Path, reader: str = "grouping") -> None:
        path = make_folder(journal) / "reader-sleeps"
        if not path.exists() or path.stat().st_size != mmap.PAGESIZE:
            path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        # A socket's path may have 107 bytes; by way of the open folder it is short however deep the folder lies.
        self._folder = os.open(make_folder(wake), os.O_RDONLY | os.O_DIRECTORY)
        self._name = f"{reader}.sock"
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.settimeout(0)

    def ring(self) -> None:
        """Wake the reader if it sleeps; never raises, for what it follows is already done."""
        if self._map[0]:
            self._map[0] = 0
            # Nobody there, or awake with a full queue: it looks by itself once a second.
            with contextlib.suppress(OSError):
                self._sender.sendto(b"!", f"/proc/self/fd/{self._folder}/{self._name}")

    def sleeps(self) -> None:
        """Say that the reader is about to sleep; it then looks once more before it does."""
        self._map[0] = 1
