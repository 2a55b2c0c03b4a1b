"""Wake the other processes of this machine: a datagram to every socket in a folder.

A lost wake-up costs a second, never an event: everybody looks by himself once a second.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def socket_path(folder: int, name: str) -> str:
    """Give the path of a socket in an open folder: it may have 107 bytes, and so is short however deep that lies."""
    return f"/proc/self/fd/{folder}/{name}"


class Wakeup:
    """One process's doorbell in a folder that all share. Not thread-safe, except `ring`."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._name = f"{name}.sock"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(0)
        self._socket.bind(self._path(self._name))

    def wait(self, timeout_s: float) -> bool:
        """Wait for a ring; tell whether there was one."""
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        return True

    def ring(self) -> None:
        """Wake everybody else, and whoever waits here; never raises, for what it follows is already done."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(0)
            for name in os.listdir(self._folder):  # noqa: PTH208  by the open folder, wherever it was moved
                # Nobody there any more, or awake with a full queue: either way nothing is lost.
                with contextlib.suppress(OSError):
                    sender.sendto(b"!", self._path(name))

    def close(self) -> None:
        """Take the doorbell down."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
        os.close(self._folder)

    def _path(self, name: str) -> str:
        return socket_path(self._folder, name)
