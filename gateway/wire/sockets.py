"""The options of an association's socket, on either side: no Nagle, keep-alive, deadlines that cost no system call."""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def prepare(connection: socket.socket, *, receive_s: float, send_s: float) -> None:
    """Make a socket block: to receive something for so long, to send something for so long."""
    connection.setblocking(True)  # noqa: FBT003  as the standard library has it
    wait(connection, socket.SO_RCVTIMEO, receive_s)
    wait(connection, socket.SO_SNDTIMEO, send_s)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(send_s * 1000))
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def readable(descriptors: Iterable[int], seconds: float) -> bool:
    """Wait until something can be read; tell whether there is. However high the descriptors, unlike `select`."""
    poll = select.poll()
    for one in descriptors:
        poll.register(one, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def wait(connection: socket.socket, option: int, seconds: float) -> None:
    """Set how long one call waits at most; `option` is SO_RCVTIMEO or SO_SNDTIMEO."""
    connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))
