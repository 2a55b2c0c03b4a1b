"""Data sets out of PDUs that are cut anywhere, some of them received straight to where they are to lie."""

from __future__ import annotations

import random
import socket
import threading

import pytest

from gateway.wire import pdu
from gateway.wire.stream import Deadlines, Stream

CONTEXT = 1
ROOM = 300_000


class Taking:
    """A sink with room for the beginning of each data set."""

    def __init__(self) -> None:
        self.room_for = bytearray(ROOM)
        self.data = bytearray()
        self.placed_bytes = 0
        self.sets: list[bytes] = []

    def begin(self, context: int, command: bytes) -> bool:
        assert (context, command) == (CONTEXT, b"command")
        return True

    def room(self) -> memoryview | None:
        return memoryview(self.room_for)[len(self.data) :] if len(self.data) < ROOM else None

    def placed(self, count: int) -> None:
        at = len(self.data)
        self.data += self.room_for[at : at + count]
        self.placed_bytes += count

    def take_data(self, piece: memoryview) -> None:
        self.data += piece

    def end_data(self) -> None:
        self.sets.append(bytes(self.data))
        self.data = bytearray()


def fragmented(data: bytes, rng: random.Random, longest: int) -> bytes:
    """Cut a data set into PDUs of one PDV or of several, some of them empty."""
    out, at, values = bytearray(), 0, bytearray()
    while at < len(data):
        size = rng.randint(0, longest)
        piece, at = data[at : at + size], at + size
        control = pdu.LAST if at >= len(data) else 0
        values += pdu.PDV.pack(len(piece) + 2, CONTEXT, control) + piece
        if control or rng.random() < 0.7:
            out += pdu.HEADER.pack(pdu.P_DATA, len(values)) + values
            values.clear()
    return bytes(out)


def send(connection: socket.socket, data: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(data):
        size = rng.choice((1, 7, 100, 4096, 70_000, 200_000))
        connection.sendall(data[at : at + size])
        at += size
    connection.close()


@pytest.mark.parametrize("longest", [200, 20_000, 120_000])
@pytest.mark.parametrize("seed", range(8))
def test_data_sets_are_what_was_sent(seed: int, longest: int) -> None:
    """Bites: count what came behind the present PDV as if it were in its place."""
    rng = random.Random(seed)
    sets = [rng.randbytes(rng.choice((10, 3_000, 40_000, 250_000, 400_000))) for _ in range(12)]
    command = pdu.p_data(CONTEXT, pdu.COMMAND, b"command", 16384)
    whole = b"".join(command + fragmented(one, rng, longest) for one in sets)
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    sender = threading.Thread(target=send, args=(theirs, whole, rng))
    sender.start()
    sink = Taking()
    stream = Stream(ours, sink, Deadlines(stall_s=10, idle_s=10), max_length=10**6, stopping=lambda: False)
    stream._connection = _Quiet(ours)  # type: ignore[assignment]  # a pair has no TCP options
    assert stream.run() == "connection lost"
    sender.join(10)
    ours.close()
    assert sink.sets == sets
    assert bool(sink.placed_bytes) == (longest > 32 * 1024)


class _Quiet:
    def __init__(self, connection: socket.socket) -> None:
        self.recv_into = connection.recv_into
        self.recvmsg_into = connection.recvmsg_into

    def setsockopt(self, *_: object) -> None:
        """A pair has none of TCP's options."""
