"""A peer at the level of PDUs: it can say anything, in any state."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Self

from gateway.wire import commands, pdu

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"
VERIFICATION = "1.2.840.10008.1.1"
CONTEXTS = (
    pdu.Context(id=1, abstract_syntax=CT, transfer_syntaxes=(EXPLICIT,)),
    pdu.Context(id=3, abstract_syntax=VERIFICATION, transfer_syntaxes=("1.2.840.10008.1.2",)),
)


def element(group: int, number: int, vr: str, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    return struct.pack("<HH2sH", group, number, vr.encode(), len(value)) + value


def data_set(uid: str, size: int = 100, study: str = "1.2.9") -> bytes:
    """A small CT data set that names itself."""
    size += size % 2
    return (
        element(8, 0x16, "UI", CT.encode())
        + element(8, 0x18, "UI", uid.encode())
        + element(0x20, 0xD, "UI", study.encode())
        + element(0x20, 0xE, "UI", f"{study}.1".encode())
        + struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, size)
        + bytes(size)
    )


def store_request(uid: str, *, message: int = 1, follows: int = commands.WITH_DATA_SET, sop_class: str = CT) -> bytes:
    return commands.make([
        (commands.AFFECTED_CLASS, commands.ui(sop_class)), (commands.FIELD, commands.u16(commands.C_STORE_RQ)),
        (commands.MESSAGE_ID, commands.u16(message)), (commands.PRIORITY, commands.u16(0)),
        (commands.DATA_SET_TYPE, commands.u16(follows)), (commands.AFFECTED_INSTANCE, commands.ui(uid)),
    ])  # fmt: skip


def echo_request(message: int = 7) -> bytes:
    return commands.make([
        (commands.AFFECTED_CLASS, commands.ui(VERIFICATION)), (commands.FIELD, commands.u16(commands.C_ECHO_RQ)),
        (commands.MESSAGE_ID, commands.u16(message)), (commands.DATA_SET_TYPE, commands.u16(commands.NO_DATA_SET)),
    ])  # fmt: skip


class Raw:
    """A connection on which PDUs are said and heard; use it in a `with` block."""

    def __init__(self, port: int, timeout_s: float = 20.0, source: str | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s, (source, 0) if source else None)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def hear(self) -> tuple[int, bytes]:
        """Give the next PDU; type 0 when the connection has ended."""
        try:
            head = self._exactly(6)
            kind, length = pdu.HEADER.unpack(head)
            return kind, self._exactly(length)
        except (ConnectionError, EOFError):
            return 0, b""

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def associate(self, calling: str = "A", called: str = "B", contexts: tuple[pdu.Context, ...] = CONTEXTS) -> Self:
        self.say(pdu.request(called, calling, contexts))
        kind, body = self.hear()
        assert kind == pdu.ASSOCIATE_AC, (kind, body)
        return self

    def store(self, uid: str, data: bytes, *, context: int = 1) -> int:
        self.say(pdu.p_data(context, pdu.COMMAND, store_request(uid)), pdu.p_data(context, 0, data, pdu.MAX_LENGTH))
        return self.status()

    def status(self) -> int:
        """Hear a response and give its status."""
        kind, body = self.hear()
        assert kind == pdu.P_DATA, (kind, body)
        value = commands.number(commands.parse(body[6:]), commands.STATUS)
        assert value is not None
        return value

    def echo(self) -> int:
        self.say(pdu.p_data(3, pdu.COMMAND, echo_request()))
        return self.status()

    def release(self) -> int:
        self.say(pdu.RELEASE_REQUEST)
        return self.hear()[0]

    def reset(self) -> None:
        """End the connection as a dead host's neighbour would: with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


@contextlib.contextmanager
def associated(port: int) -> Iterator[Raw]:
    with Raw(port) as peer:
        yield peer.associate()
