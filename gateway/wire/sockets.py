"""An association's socket, on either side: no Nagle, keep-alive, deadlines that cost no system call, its end.

Under TLS Python keeps the deadlines, and what waits may be decrypted already: nobody else asks which of the two it is.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
from typing import TYPE_CHECKING

from gateway.wire.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Iterable

_TLS_LOOK_S = 1.0
_DISCARDED_BYTES = 65536
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def prepare(connection: socket.socket, *, receive_s: float, send_s: float) -> None:
    """Make a socket block: to receive something for so long, to send something for so long."""
    connection.setblocking(True)  # noqa: FBT003  as the standard library has it
    wait(connection, socket.SO_SNDTIMEO, send_s)
    wait(connection, socket.SO_RCVTIMEO, receive_s)
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
    if isinstance(connection, ssl.SSLSocket):
        connection.settimeout(seconds)
        return
    connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def waits(connection: socket.socket, seconds: float) -> bool:
    """Wait until a connection has something to read; tell whether it has."""
    if isinstance(connection, ssl.SSLSocket) and connection.pending():
        return True
    return readable([connection.fileno()], seconds)


def has_timed_out(error: OSError) -> bool:
    """Tell whether a call gave up because nothing came in time, and the connection is as it was."""
    return error.errno in {errno.EAGAIN, errno.EWOULDBLOCK} or (error.errno is None and isinstance(error, TimeoutError))


def send_parts(connection: socket.socket, parts: Iterable[bytes | memoryview], stall_s: float) -> None:
    """Send all of it, in as few calls as there can be, to a peer that keeps pace. Raises OSError."""
    pace = Pace(stall_s)
    pace.begin()
    if isinstance(connection, ssl.SSLSocket):
        _send_tls(connection, memoryview(b"".join(parts)), pace, stall_s)
        return
    rest = [memoryview(one) for one in parts]
    while rest:
        sent = connection.sendmsg(rest)
        if pace.is_slow(sent):
            raise TimeoutError
        while rest and sent >= len(rest[0]):
            sent -= len(rest.pop(0))
        if rest and sent:
            rest[0] = rest[0][sent:]


def _send_tls(connection: ssl.SSLSocket, rest: memoryview, pace: Pace, stall_s: float) -> None:
    # The deadline of this socket is that of reading, which may be one of looking only.
    reading_s = connection.gettimeout()
    connection.settimeout(stall_s)
    try:
        while rest:
            sent = connection.send(rest)
            rest = rest[sent:]
            if pace.is_slow(sent):
                raise TimeoutError
    finally:
        connection.settimeout(reading_s)


def look_s(connection: socket.socket, seconds: float) -> float:
    """Give how long a read may wait that `stop_reading` is to end: so long, or less where it cannot be woken."""
    return min(seconds, _TLS_LOOK_S) if isinstance(connection, ssl.SSLSocket) else seconds


def stop_reading(connection: socket.socket) -> None:
    """Make whoever reads hear the end. Callable by another thread; under TLS they look by themselves once a second.

    There an end without notice would be an attack, and nothing could be said any more.
    """
    if isinstance(connection, ssl.SSLSocket):
        return
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RD)


def close_gently(connection: socket.socket, seconds: float) -> None:
    """Close, but let the peer do so first (ARTIM, PS3.8 9.1.5); not for long, for it still has a place."""
    try:
        wait(connection, socket.SO_RCVTIMEO, seconds)
        if isinstance(connection, ssl.SSLSocket):
            connection.unwrap()
        socket.socket.shutdown(connection, socket.SHUT_WR)
        left = 3
        while left and connection.recv(_DISCARDED_BYTES):
            left -= 1
    except (OSError, ValueError):
        pass
    connection.close()
