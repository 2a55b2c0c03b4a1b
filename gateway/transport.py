"""Deadlines and bounds on an association's socket, which pynetdicom leaves without either.

The library reads a PDU with blocking calls and believes the length that its header claims. Here a peer that stops in
the middle of a PDU, that no longer reads, that claims a PDU or sends a data set beyond the limit, is cut off.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

log = structlog.get_logger()

# An A-ASSOCIATE-RQ with 128 contexts of many transfer syntaxes stays below this; P-DATA is bounded by negotiation.
MAX_PDU_BYTES = 2**20
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


class Guard:
    """Bounds one association. `reset` is called when a data set has been taken; `sent` tells progress in bytes."""

    def __init__(self, transport: Any, *, stall_s: float, max_bytes: int | None = None) -> None:  # noqa: ANN401  the library's socket
        self._socket: socket.socket = transport.socket
        self._stall_s = stall_s
        self._max_bytes = max_bytes
        self._received = 0
        self.sent = 0
        _set_options(self._socket, stall_s)
        read: Callable[[int], bytearray] = self._read
        transport.recv = read
        self._library_send: Callable[[bytes], None] = transport.send
        transport.send = self._send

    def reset(self) -> None:
        """Count the next data set from zero."""
        self._received = 0

    def cut(self) -> None:
        """End the connection; whoever is blocked on it comes back."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def _read(self, wanted: int) -> bytearray:
        """Read exactly `wanted` bytes, fewer at the end of the stream; raises OSError at a bound or a deadline."""
        self._received += wanted
        if wanted > MAX_PDU_BYTES:
            raise self._excess("pdu-too-large")
        if self._max_bytes is not None and self._received > self._max_bytes:
            raise self._excess("instance-too-large")
        buffer = bytearray(wanted)
        view = memoryview(buffer)
        end = time.monotonic() + self._stall_s
        done = 0
        while done < wanted:
            try:
                count = self._socket.recv_into(view[done:])
            except BlockingIOError as error:
                raise self._stalled() from error
            if count == 0:
                break
            done += count
            if done < wanted and time.monotonic() > end:
                raise self._stalled()
        view.release()
        del buffer[done:]
        return buffer

    def _send(self, data: bytes) -> None:
        self._library_send(data)
        self.sent += len(data)

    def _stalled(self) -> OSError:
        log.warning("association.cut", reason="stalled")
        return TimeoutError("a PDU took too long")

    def _excess(self, reason: str) -> OSError:
        log.warning("association.cut", reason=reason)
        return OSError(errno.EMSGSIZE, reason)


def _set_options(connection: socket.socket, stall_s: float) -> None:
    seconds = struct.pack("ll", int(stall_s), int(stall_s % 1 * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall_s * 1000))
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
