"""A TCP proxy that forwards bytes as they come and remembers them; it can hold each piece back as a long way would."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Self

from gateway.wire import pdu


class Tap:
    """Forwards to a port on loopback; use it in a `with` block."""

    def __init__(self, target: int, *, delay_s: float = 0.0) -> None:
        self._target = target
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        # Of each connection: what the client said, and what it heard.
        self._seen: list[tuple[bytearray, bytearray]] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def seen(self) -> bytes:
        """All bytes that passed, those of the clients first."""
        return b"".join(bytes(said + heard) for said, heard in self._seen)

    def said(self) -> bytes:
        """What the clients said, one connection after another."""
        return b"".join(bytes(said) for said, _ in self._seen)

    def data_sets(self) -> list[bytes]:
        """What the clients sent as data sets, put together from the PDUs they sent (PS3.8 9.3.5)."""
        return [one for said, _ in self._seen for one in _data_sets(bytes(said))]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
                server.settimeout(None)
                self._sockets += [client, server]
                self._seen.append((bytearray(), bytearray()))
                for (one, other), seen in zip(((client, server), (server, client)), self._seen[-1], strict=True):
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


def _data_sets(said: bytes) -> list[bytes]:
    found, part, at = [], b"", 0
    while at + pdu.HEADER.size <= len(said):
        kind, length = pdu.HEADER.unpack_from(said, at)
        body, at = said[at + pdu.HEADER.size : at + pdu.HEADER.size + length], at + pdu.HEADER.size + length
        place = 0
        while kind == pdu.P_DATA and place < len(body):
            size, _, control = pdu.PDV.unpack_from(body, place)
            if not control & pdu.COMMAND:
                part += body[place + pdu.PDV.size : place + 4 + size]
                if control & pdu.LAST:
                    found.append(part)
                    part = b""
            place += 4 + size
    return found
