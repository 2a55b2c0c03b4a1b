"""A receive worker: takes connections from the guard and gives each a thread. One log of the journal is its own."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway.access import Admission
from gateway.association import Association
from gateway.wire import pdu
from gateway.wire.pdu import PduError
from gateway.wire.sockets import readable

if TYPE_CHECKING:
    from clarion.config import ScpConfig
    from gateway.board import Board, Slot
    from gateway.intake import Intake
    from gateway.wire.stream import Deadlines

log = structlog.get_logger()

# A process that has had so many associations makes way for a new one: whatever leaked leaves with it.
RECYCLE_AFTER = 10_000
_LOOK_S = 1.0
_ABORT_S = 2.0
_HEAD = struct.Struct("<QBBB")
_MAX_MESSAGE = pdu.MAX_ASSOCIATE_BYTES + 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """A connection on its way from the guard to a worker: its number, who it is, and what it asked for."""

    number: int
    admission: Admission
    address: str
    request: bytes

    def encode(self) -> bytes:
        """Write it as a message."""
        address = self.address.encode()
        may = self.admission.may_store, self.admission.may_report
        return _HEAD.pack(self.number, *may, len(address)) + address + self.request

    @classmethod
    def decode(cls, data: bytes) -> Handover:
        """Read what `encode` wrote."""
        number, may_store, may_report, size = _HEAD.unpack_from(data)
        end = _HEAD.size + size
        return cls(
            number=number,
            admission=Admission(may_store=bool(may_store), may_report=bool(may_report)),
            address=data[_HEAD.size : end].decode(),
            request=data[end:],
        )


class Worker:
    """Serves the connections that come over a channel, until `stop` or, recycled, until it is empty."""

    def __init__(
        self,
        channel: socket.socket,
        *,
        config: ScpConfig,
        intake: Intake,
        board: Board,
        slot: Slot,
        deadlines: Deadlines,
        drain_s: float,
    ) -> None:
        self._drain_s = drain_s
        self._channel = channel
        self._channel.setblocking(False)  # noqa: FBT003  as the standard library has it
        self._config = config
        self._intake = intake
        self._board = board
        self._slot = slot
        self._deadlines = deadlines
        self._open: dict[Association, threading.Thread] = {}
        self._stopping = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopped = False

    def stop(self) -> None:
        """Take nothing more and return from `run` when the associations have ended. Callable from a signal handler."""
        self._stopped = True
        os.eventfd_write(self._stopping, 1)

    def run(self) -> None:
        """Serve; after `stop` wait for associations to end as long as is allowed, then abort the rest."""
        self._begin()
        while not self._stopped:
            if self._slot.taken >= RECYCLE_AFTER and not self._slot.open:
                return
            readable([self._channel.fileno(), self._stopping], _LOOK_S)
            while not self._stopped and (taken := self._take()) is not None:
                self._start(*taken)
        self._drain()

    def _begin(self) -> None:
        """Count as ended what the process had whose place this one takes; what waits in the channel has not been."""
        handed = self._slot.handed
        first = self._take()
        self._slot.begin_anew(handed if first is None else first[0].number - 1)
        if first is not None:
            self._start(*first)

    def _take(self) -> tuple[Handover, socket.socket | None] | None:
        """Take the next connection; a message without one when we may have no more descriptors."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._channel, _MAX_MESSAGE, 1)
        except BlockingIOError:
            return None
        if not message:
            return None
        return Handover.decode(message), socket.socket(fileno=descriptors[0]) if descriptors else None

    def _start(self, handover: Handover, connection: socket.socket | None) -> None:
        if connection is None:
            log.error("association.failed", reason="too many open files", address=handover.address)
            self._ended(handover.number)
            return
        self._open = {one: thread for one, thread in self._open.items() if thread.is_alive()}
        self._slot.take()
        try:
            association = Association(
                connection,
                pdu.parse_request(handover.request),
                handover.admission,
                handover.address,
                config=self._config,
                intake=self._intake,
                deadlines=self._deadlines,
                slot=self._slot,
            )
            serve = self._serve
            thread = threading.Thread(
                target=serve, args=(association, handover.number), name="association", daemon=True
            )
            self._open[association] = thread
            thread.start()
        except (PduError, RuntimeError) as error:
            log.warning("association.failed", reason=str(error), address=handover.address)
            connection.close()
            self._ended(handover.number)

    def _serve(self, association: Association, number: int) -> None:
        association.run()
        self._tell(number)

    def _ended(self, number: int) -> None:
        """An association has ended that never began."""
        self._slot.end()
        self._tell(number)

    def _tell(self, number: int) -> None:
        """Tell the guard, which counts per address; where it does not listen, it counts anew."""
        with contextlib.suppress(OSError):
            self._channel.send(number.to_bytes(8, "little"))

    def _drain(self) -> None:
        for seconds, reason in ((self._drain_s, ""), (_ABORT_S, "draining")):
            if reason:
                for association in self._open:
                    association.stop(reason)
            _join(list(self._open.values()), seconds)


def _join(threads: list[threading.Thread], seconds: float) -> None:
    """Wait for threads, all of them together so long."""
    timer = threading.Event()
    step = 0.02
    while seconds > 0 and any(one.is_alive() for one in threads):
        timer.wait(step)
        seconds -= step
