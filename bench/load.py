"""The load: associations that send framed instances as fast as they are answered. One process per association."""

from __future__ import annotations

import json
import os
import resource
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data import CONTEXTS, EXPLICIT, PDU_LENGTH, frames

from gateway.wire import pdu

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_RESPONSE = 6


@dataclass
class Load:
    """What one association came to: instances sent and failed, seconds, CPU, latencies in seconds."""

    sent: int = 0
    failed: int = 0
    begun: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0
    latencies: list[float] = field(default_factory=list)


def associate(port: int, called: str, calling: str = "SENDER") -> socket.socket:
    """Open an association for what there is to send."""
    return negotiate(port, called, calling)[0]


def negotiate(port: int, called: str, calling: str = "SENDER") -> tuple[socket.socket, int]:
    """Open an association for what there is to send; give the length of PDU to send as well."""
    connection = socket.create_connection(("127.0.0.1", port), 60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    contexts = [
        pdu.Context(id=number, abstract_syntax=one, transfer_syntaxes=(EXPLICIT,)) for one, number in CONTEXTS.items()
    ]
    connection.sendall(pdu.request(called, calling, contexts, max_length=PDU_LENGTH))
    kind, body = read_pdu(connection)
    if kind != pdu.ASSOCIATE_AC:
        raise SystemExit(f"association refused: PDU {kind} {body.hex()}")
    return connection, min(PDU_LENGTH, pdu.parse_accept(body).max_length or PDU_LENGTH)


def read_pdu(connection: socket.socket) -> tuple[int, bytes]:
    """Read one PDU."""
    kind, length = pdu.HEADER.unpack(_exactly(connection, 6))
    return kind, _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError("closed")
        data += more
    return data


def send(port: int, called: str, kind: str, series: int, first: int, count: int, gate: int) -> Load:
    """Send `count` instances, numbered from `first`; begins when the other end of `gate` closes."""
    load = Load()
    connection, length = negotiate(port, called)
    made = frames(kind, series, max_length=length)
    os.write(gate, b"r")
    os.read(gate, 1)
    cpu = time.process_time()
    load.begun = time.monotonic()
    for number in range(first, first + count):
        frame = made[number % len(made)].patch(number)
        connection.sendall(frame)
        handed = time.monotonic()
        kind_of, answer = read_pdu(connection)
        load.latencies.append(time.monotonic() - handed)
        load.sent += 1
        load.failed += not is_success(kind_of, answer)
    load.ended = time.monotonic()
    load.cpu = time.process_time() - cpu
    connection.sendall(pdu.RELEASE_REQUEST)
    read_pdu(connection)
    connection.close()
    return load


def is_success(kind: int, answer: bytes) -> bool:
    """Find the status in a response: the element (0000,0900)."""
    at = answer.find(struct.pack("<HHI", 0, 0x0900, 2))
    return kind == pdu.P_DATA and at > 0 and answer[at + 8 : at + 10] == b"\0\0"


def run(
    port: int,
    called: str,
    kind: str,
    counts: list[int],
    first: int,
    *,
    series: int = 0,
    began: Callable[[], object] = lambda: None,
) -> list[Load]:
    """Send over as many associations as there are counts, all beginning together; instances are numbered on.

    Each association has a study of its own, the first that with the number `series`. `began` is called when all
    are ready.
    """
    children = []
    for index, count in enumerate(counts):
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.close(read)
            status = 1
            try:
                load = send(port, called, kind, series + index, first + sum(counts[:index]), count, theirs.fileno())
                os.write(write, json.dumps(vars(load)).encode())
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        theirs.close()
        os.close(write)
        children.append((pid, ours, read))
    for _, ours, _ in children:
        ours.recv(1)
    began()
    for _, ours, _ in children:
        ours.send(b"g")
    loads = []
    for pid, ours, read in children:
        with os.fdopen(read, "rb") as pipe:
            said = pipe.read()
        os.waitpid(pid, 0)
        ours.close()
        loads.append(Load(**json.loads(said)) if said else Load(failed=1))
    return loads


def raise_limits() -> None:
    """Have as many descriptors as we may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def folder_bytes(path: Path) -> int:
    """Give what a folder holds."""
    return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
