"""A TCP proxy that forwards bytes as they come and remembers them; it can hold each piece back as a long way would."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self


class Tap:
    """Forwards to a port on loopback; use it in a `with` block."""

    def __init__(self, target: int, *, delay_s: float = 0.0) -> None:
        self._target = target
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._seen = {True: bytearray(), False: bytearray()}
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def seen(self) -> bytes:
        """All bytes that passed, those of the clients first."""
        return bytes(self._seen[True] + self._seen[False])

    def said(self) -> bytes:
        """What the clients said."""
        return bytes(self._seen[True])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                server.settimeout(None)
                for one, other in ((client, server), (server, client)):
                    seen = self._seen[one is client]
                    threading.Thread(target=self._forward, args=(one, other, seen), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, seen: bytearray) -> None:
        timer = threading.Event()
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                came = time.monotonic()
                seen += data
                timer.wait(max(0.0, came + self._delay_s - time.monotonic()))
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
