"""Data sets out of PDUs that are cut anywhere, some of them received straight to where they are to lie."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress

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


LONG = 40_000


def pdv(control: int, length: int = LONG, *, context: int = CONTEXT, said: int | None = None) -> bytes:
    value = pdu.PDV.pack(length + 2, context, control) + bytes(length)
    return pdu.HEADER.pack(pdu.P_DATA, len(value) if said is None else said) + value


def received(whole: bytes, *, piece: int) -> tuple[Taking, str]:
    """Give what a stream makes of bytes that come so many at a time, and how it ended."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)

    def feed() -> None:
        with suppress(OSError):  # who has refused something reads no more
            for at in range(0, len(whole), piece):
                theirs.sendall(whole[at : at + piece])
        theirs.close()

    sender = threading.Thread(target=feed)
    sender.start()
    sink = Taking()
    stream = Stream(ours, sink, Deadlines(stall_s=10, idle_s=10), max_length=10**5, stopping=lambda: False)
    stream._connection = _Quiet(ours)  # type: ignore[assignment]  # as above
    try:
        ending = stream.run()
    except pdu.PduError as error:
        ending = str(error)
    ours.close()
    sender.join(10)
    return sink, ending


COMMAND = pdu.p_data(CONTEXT, pdu.COMMAND, b"command", 16384)
ORDER = "a data set without a command set, or on another context"
# What comes behind two long PDVs of a data set, how the association ends, and how many bytes more the data set has.
BEHIND_LONG_ONES = {
    "another long one, and the last": (pdv(0) + pdv(pdu.LAST), "connection lost", 2 * LONG),
    "of another length": (pdv(0, LONG + 7) + pdv(pdu.LAST, 50_000), "connection lost", LONG + 50_007),
    "a short one": (pdv(0, 10) + pdv(pdu.LAST, 3), "connection lost", 13),
    "an empty one": (pdv(0, 0) + pdv(0) + pdv(pdu.LAST, 0), "connection lost", LONG),
    "two in a PDU": (
        pdu.HEADER.pack(pdu.P_DATA, 2 * (LONG + 6)) + pdv(0)[6:] + pdv(pdu.LAST)[6:],
        "connection lost",
        2 * LONG,
    ),
    "on another context": (pdv(0, context=3), ORDER, None),
    "the last, and one more": (pdv(pdu.LAST) + pdv(0), ORDER, LONG),
    "a command set": (pdv(pdu.COMMAND), "a command set within another message", None),
    "longer than announced": (pdv(0, 100_500), "a PDU longer than announced", None),
    "cut by its PDU": (pdv(0, said=LONG), "a PDV longer than its PDU, or without a header", None),
    "a release": (pdu.RELEASE_REQUEST, "released", None),
    "another PDU": (b"\x63" + pdv(0)[1:], "PDU type 99", None),
}


@pytest.mark.parametrize("piece", [1_000, 37_123, 10**6])
@pytest.mark.parametrize("name", BEHIND_LONG_ONES)
def test_behind_long_ones_anything_may_come(name: str, piece: int) -> None:
    """Bites: take the next header for one like the last."""
    behind, ended, more = BEHIND_LONG_ONES[name]
    sink, ending = received(COMMAND + pdv(0) + pdv(0) + behind, piece=piece)
    assert ending == ended
    assert [len(one) for one in sink.sets] == ([] if more is None else [2 * LONG + more])


class _Quiet:
    def __init__(self, connection: socket.socket) -> None:
        self.recv_into = connection.recv_into
        self.recvmsg_into = connection.recvmsg_into

    def setsockopt(self, *_: object) -> None:
        """A pair has none of TCP's options."""
