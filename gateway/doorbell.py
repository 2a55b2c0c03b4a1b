"""Between those who write the journal and the one who reads it: rung only while the reader sleeps.

A flag in a mapped file says that it does, so that a busy reader costs its writers a look at memory and no more.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from clarion.adapters.files import make_folder, map_page
from clarion.adapters.wakeup import socket_path

if TYPE_CHECKING:
    from pathlib import Path


class Doorbell:
    """The flag, and the way to the reader's socket. `ring` may be called by any thread."""

    def __init__(self, journal: Path, wake: Path, reader: str = "grouping") -> None:
        self._map = map_page(make_folder(journal) / "reader-sleeps")
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
                self._sender.sendto(b"!", socket_path(self._folder, self._name))

    def sleeps(self) -> None:
        """Say that the reader is about to sleep; it then looks once more before it does."""
        self._map[0] = 1
