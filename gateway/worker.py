"""A receive worker: takes connections from the guard and gives each a thread. One log of the journal is its own."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING, Protocol

import structlog

from gateway.association import Association, Shared
from gateway.handover import MOST_BYTES, Handover, Told
from gateway.secured import Secured
from gateway.wire import pdu
from gateway.wire.pdu import PduError
from gateway.wire.sockets import readable

if TYPE_CHECKING:
    from gateway.access import Admission
    from gateway.admitting import Admitting
    from gateway.wire.secure import Renewed

log = structlog.get_logger()

# A process that has had so many associations makes way for a new one: whatever leaked leaves with it.
RECYCLE_AFTER = 10_000
_LOOK_S = 1.0
_ABORT_S = 2.0


class _Serving(Protocol):
    """A connection that is served: an association, or what may become one."""

    def run(self) -> None:
        """Serve it to its end. Never raises."""

    def stop(self, reason: str) -> None:
        """Have it aborted."""


class Worker:
    """Serves the connections that come over a channel, until `stop` or, recycled, until it is empty."""

    def __init__(
        self,
        channel: socket.socket,
        shared: Shared,
        *,
        drain_s: float,
        admitting: Admitting,
        tls: Renewed | None = None,
    ) -> None:
        self._shared = shared
        self._drain_s = drain_s
        self._admitting = admitting
        self._tls = tls
        self._channel = channel
        self._channel.setblocking(False)  # noqa: FBT003  as the standard library has it
        self._slot = shared.slot
        self._open: dict[_Serving, threading.Thread] = {}
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
        handed, secured = self._slot.handed, self._slot.secured
        first = self._take()
        if first is not None:
            handed, secured = first[0].number - 1, first[0].secured
        self._slot.begin_anew(ended=handed, opened=secured)
        if first is not None:
            self._start(*first)

    def _take(self) -> tuple[Handover, socket.socket | None] | None:
        """Take the next connection; a message without one when we may have no more descriptors."""
        try:
            message, descriptors, _, _ = socket.recv_fds(self._channel, MOST_BYTES, 1)
        except BlockingIOError:
            return None
        if not message:
            return None
        return Handover.decode(message), socket.socket(fileno=descriptors[0]) if descriptors else None

    def _start(self, handover: Handover, connection: socket.socket | None) -> None:
        if connection is None:
            log.error("association.failed", reason="too many open files", address=handover.address)
            if handover.admission is None:
                self._slot.opened()
            self._ended(handover.number)
            return
        self._open = {one: thread for one, thread in self._open.items() if thread.is_alive()}
        self._slot.take()
        try:
            serving = self._serving(handover, connection)
            thread = threading.Thread(
                target=self._serve, args=(serving, handover.number), name="association", daemon=True
            )
            self._open[serving] = thread
            thread.start()
        except (PduError, RuntimeError) as error:
            log.warning("association.failed", reason=str(error), address=handover.address)
            connection.close()
            if handover.admission is None:
                self._slot.opened()
            self._ended(handover.number)

    def _serving(self, handover: Handover, connection: socket.socket) -> _Serving:
        """Make what serves a connection. Raises PduError."""
        if handover.admission is not None:
            request = pdu.parse_request(handover.request)
            return self._association(connection, request, handover.admission, handover.address)
        if self._tls is None:
            raise RuntimeError("TLS is not configured")

        def begin(connection: socket.socket, request: pdu.Request, admission: Admission) -> Association:
            return self._association(connection, request, admission, handover.address)

        return Secured(
            connection,
            handover,
            tls=self._tls,
            admitting=self._admitting,
            shared=self._shared,
            begin=begin,
            tell=self._tell,
        )

    def _association(
        self, connection: socket.socket, request: pdu.Request, admission: Admission, address: str
    ) -> Association:
        return Association(
            connection,
            request,
            admission,
            address,
            self._shared,
        )

    def _serve(self, serving: _Serving, number: int) -> None:
        serving.run()
        self._tell(Told(number=number))

    def _ended(self, number: int) -> None:
        """An association has ended that never began."""
        self._slot.end()
        self._tell(Told(number=number))

    def _tell(self, told: Told) -> None:
        """Tell the guard, which counts per address; where it does not listen, it counts anew."""
        with contextlib.suppress(OSError):
            self._channel.send(told.encode())

    def _drain(self) -> None:
        for seconds, reason in ((self._drain_s, ""), (_ABORT_S, "draining")):
            if reason:
                for serving in self._open:
                    serving.stop(reason)
            _join(list(self._open.values()), seconds)


def _join(threads: list[threading.Thread], seconds: float) -> None:
    """Wait for threads, all of them together so long."""
    timer = threading.Event()
    step = 0.02
    while seconds > 0 and any(one.is_alive() for one in threads):
        timer.wait(step)
        seconds -= step
