"""The guard: owns the port, hears every connection out as far as its association request, and lets in or turns away.

One selector, no thread per peer, nothing that blocks: silent and half-spoken connections cost a descriptor and end at
their deadline. Whoever is let in is handed to the worker with the fewest associations, socket and request together.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from gateway.access import TOO_MANY, UNRESOLVED, Admission, Rejection
from gateway.association_log import REJECTED
from gateway.board import MALFORMED, NO_TLS
from gateway.handover import MOST_SAID_BYTES, Handover, Told
from gateway.wire import pdu
from gateway.wire.pdu import PduError
from gateway.worker import RECYCLE_AFTER

if TYPE_CHECKING:
    from concurrent.futures import Future

    from clarion.config import ScpConfig
    from gateway.admitting import Admitting
    from gateway.association_log import AssociationLog
    from gateway.board import Board

log = structlog.get_logger()

BACKLOG = 1024
# Connections that have not asked yet or are being turned away; when there are more, the oldest must go.
MAX_PENDING = 4096
_MAX_PENDING_BYTES = 32 * 2**20
_MOST_RESOLVING = 64
_LOOK_S = 1.0
_ACCEPTED_AT_ONCE = 64
_READ = 65536
_RESOLVERS = 4
# While no worker is there, so long nobody is told so: a worker that died is replaced by then.
_PATIENCE_S = 5.0
# Under TLS a worker has to hear who somebody is: a thread and a few seconds each, for so many at once.
_MOST_OPENING = 64


@dataclass(slots=True, eq=False)
class _Pending:
    """A connection that has not been let in; `closing` once it was answered and the peer is to close.

    `waiting`: nothing is read from it meanwhile.
    """

    connection: socket.socket
    address: str
    since: float
    data: bytearray
    closing: bool = False
    waiting: bool = False
    secure: bool = False


class Guard:
    """Serves the listening sockets until `stop`. `channels` lead to the workers, in the order of the board's slots."""

    def __init__(
        self,
        listener: socket.socket,
        channels: list[socket.socket],
        *,
        config: ScpConfig,
        admitting: Admitting,
        board: Board,
        stall_s: float,
        written: AssociationLog,
        secure: socket.socket | None = None,
    ) -> None:
        self._written = written
        self._secure = secure
        self._listeners = [one for one in (listener, secure) if one is not None]
        self._channels = channels
        self._config = config
        self._admitting = admitting
        self._board = board
        self._stall_s = stall_s
        self._stopping = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopped = False
        self._selector = selectors.DefaultSelector()
        for one in self._listeners:
            one.setblocking(False)  # noqa: FBT003  as the standard library has it
            self._selector.register(one, selectors.EVENT_READ, None)
        self._selector.register(self._stopping, selectors.EVENT_READ, None)
        for worker, channel in enumerate(channels):
            channel.setblocking(False)  # noqa: FBT003  as above
            self._selector.register(channel, selectors.EVENT_READ, worker)
        self._timer = threading.Event()
        # In the order in which they came; the oldest is first.
        self._pending: dict[_Pending, None] = {}
        self._resolving: dict[Future[Admission | Rejection], tuple[_Pending, pdu.Request]] = {}
        self._resolvers: ThreadPoolExecutor | None = None
        # Under TLS, for want of room with the workers.
        self._queued: list[_Pending] = []
        # Who has associations: per worker, addresses by the number handed over; how often that worker was replaced.
        self._addresses: list[dict[int, str]] = [{} for _ in channels]
        self._opening: list[dict[int, str]] = [{} for _ in channels]
        self._restarts = [0 for _ in channels]
        self._unready_since = time.monotonic()
        self._held = 0
        self.max_pending = MAX_PENDING

    def stop(self) -> None:
        """Return from `run`. Callable from a signal handler."""
        self._stopped = True
        os.eventfd_write(self._stopping, 1)

    def run(self) -> None:
        """Serve until stopped; closes what is pending then."""
        swept = 0.0
        while not self._stopped:
            if self._waits_for_workers():
                self._timer.wait(0.01)
                continue
            for key, _ in self._selector.select(0.05 if self._resolving or self._queued else _LOOK_S):
                if isinstance(key.data, _Pending):
                    self._heard(key.data)
                elif key.data is not None:
                    self._note_told(key.data)
                elif isinstance(key.fileobj, socket.socket):
                    self._accept(key.fileobj)
            self._take_resolved()
            self._take_queued()
            if time.monotonic() - swept > min(_LOOK_S, self._stall_s / 4):
                swept = time.monotonic()
                self._sweep(swept)
            self._board.pending = len(self._pending)
        for one in list(self._pending):
            self._forget(one)
        self._board.pending = 0

    def _waits_for_workers(self) -> bool:
        """Tell whether nobody can be served now, but soon: until then who comes waits in the port's queue."""
        if any(one.ready for one in self._board.slots):
            self._unready_since = 0.0
            return False
        self._unready_since = self._unready_since or time.monotonic()
        return time.monotonic() - self._unready_since < _PATIENCE_S

    def _note_told(self, worker: int) -> None:
        """Hear from a worker which connections have ended, and whom it has rejected."""
        with contextlib.suppress(BlockingIOError):
            while True:
                told = Told.decode(self._channels[worker].recv(MOST_SAID_BYTES + 8))
                self._opening[worker].pop(told.number, None)
                if told.check:
                    self._board.refused(told.check, told.said)
                elif not told.opened:
                    self._addresses[worker].pop(told.number, None)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("connection.refused", reason=error.strerror)
                self._cut_oldest()
                return
            connection.setblocking(False)  # noqa: FBT003  as above
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            one = _Pending(connection, str(peer[0]), time.monotonic(), bytearray())
            one.secure = listener is self._secure
            self._pending[one] = None
            self._selector.register(connection, selectors.EVENT_READ, one)
            if len(self._pending) > self.max_pending:
                self._cut_oldest()

    def _cut_oldest(self) -> None:
        """Make room: whoever has waited longest without asking goes first."""
        oldest = next(iter(self._pending), None)
        if oldest is not None:
            log.warning("connection.cut", reason="too-many-connections", address=oldest.address)
            self._forget(oldest)

    def _cut_largest(self) -> _Pending:
        """Make room: who has said most without having asked goes first."""
        largest = max(self._pending, key=lambda one: len(one.data))
        log.warning("connection.cut", reason="too-many-bytes", address=largest.address)
        self._forget(largest)
        return largest

    def _sweep(self, now: float) -> None:
        for one in list(self._pending):
            if now - one.since <= self._stall_s:
                return
            if not one.closing:
                log.info("connection.ended", reason="no association was asked for", address=one.address)
            self._forget(one)

    def _heard(self, one: _Pending) -> None:
        if one not in self._pending or one.waiting:
            return  # cut to make room since the selector spoke of it
        if one.secure and not one.closing:
            self._heard_secure(one)
            return
        try:
            data = one.connection.recv(_READ if one.closing else self._wanted(one))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._forget(one)
        elif not one.closing:
            one.data += data
            self._held += len(data)
            if self._held > _MAX_PENDING_BYTES and self._cut_largest() is one:
                return
            try:
                if self._wanted(one) == 0:
                    self._asked(one, bytes(one.data[pdu.HEADER.size :]))
            except PduError as error:
                self._refuse(one, pdu.abort(error.reason), MALFORMED, str(error))

    def _wanted(self, one: _Pending) -> int:
        """Tell how many bytes of the request are missing; never more is read, for what follows is the worker's."""
        if len(one.data) < pdu.HEADER.size:
            return pdu.HEADER.size - len(one.data)
        return pdu.HEADER.size + pdu.length_of_request(one.data) - len(one.data)

    def _heard_secure(self, one: _Pending) -> None:
        """A peer begins to speak TLS: a worker goes on, as soon as there is room."""
        try:
            first = one.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError:
            first = b""
        if not first:
            self._forget(one)
        elif first[0] != pdu.TLS_HANDSHAKE:
            self._refuse(one, pdu.abort(pdu.UNRECOGNISED_PDU), NO_TLS, "no TLS on the port that speaks it")
        else:
            one.waiting = True
            self._selector.unregister(one.connection)
            self._queued.append(one)

    def _take_queued(self) -> None:
        """Hand over who speaks TLS, of each address in turn; who was cut meanwhile is not there.

        An address that has its half of the places waits, however many others there are: it may be silent in all.
        """
        self._queued = [one for one in self._queued if one in self._pending]
        room = _MOST_OPENING - sum(one.opening for one in self._board.slots)
        while self._queued and room > 0:
            opening = self._opening_by_address()
            one = min(self._queued, key=lambda one: opening[one.address])
            if opening[one.address] >= _MOST_OPENING // 2:
                return
            self._queued.remove(one)
            if self._hand_over(one, None, crowded=self._has_its_share(one.address)):
                room -= 1
            else:
                self._forget(one)

    def _opening_by_address(self) -> Counter[str]:
        """Count who was handed over under TLS and has not said yet who it is."""
        self._notice_replaced()
        return sum((Counter(one.values()) for one in self._opening), Counter[str]())

    def _asked(self, one: _Pending, body: bytes) -> None:
        request = pdu.parse_request(body)
        malformed = self._admitting.malformed(request)
        if malformed is not None:
            self._reject(one, request, malformed)
        elif not self._admitting.may_wait(request):
            self._decide(one, request, self._admitting.check(request, one.address))
        elif len(self._resolving) >= _MOST_RESOLVING:
            self._reject(one, request, UNRESOLVED)
        else:
            self._resolve(one, request)

    def _resolve(self, one: _Pending, request: pdu.Request) -> None:
        """Check by host name, which may wait for a name server: beside the loop."""
        if self._resolvers is None:
            self._resolvers = ThreadPoolExecutor(_RESOLVERS, thread_name_prefix="resolver")
        one.waiting = True
        self._selector.unregister(one.connection)
        self._resolving[self._resolvers.submit(self._admitting.check, request, one.address)] = one, request

    def _take_resolved(self) -> None:
        for future in [one for one in self._resolving if one.done()]:
            one, request = self._resolving.pop(future)
            if one in self._pending:
                one.waiting = False
                self._selector.register(one.connection, selectors.EVENT_READ, one)
                self._decide(one, request, future.result())

    def _decide(self, one: _Pending, request: pdu.Request, checked: Admission | Rejection) -> None:
        """Let in or turn away, in the order of the registry specification, 4.1."""
        if isinstance(checked, Admission):
            share = self._has_its_share(one.address)
            with self._admitting.alone():
                refusal = self._admitting.refusal(request, checked, has_its_share=share)
                if refusal is None and self._hand_over(one, checked, crowded=share):
                    return
            checked = refusal or TOO_MANY
        self._reject(one, request, checked)

    def _has_its_share(self, address: str) -> bool:
        """Tell whether an address has as many associations as one may have."""
        most = self._config.max_associations_per_address
        if most is None:
            return False
        self._notice_replaced()
        return sum(Counter(held.values())[address] for held in self._addresses) >= most

    def _notice_replaced(self) -> None:
        """What a dead worker had has ended, and it can no longer say so."""
        for worker, slot in enumerate(self._board.slots):
            if slot.restarts != self._restarts[worker]:
                self._restarts[worker] = slot.restarts
                self._addresses[worker].clear()
                self._opening[worker].clear()

    def _hand_over(self, one: _Pending, admission: Admission | None, *, crowded: bool) -> bool:
        """Give a connection to the worker with the fewest; tell whether one took it."""
        slots = list(self._board.slots)
        ready = [at for at in range(len(slots)) if slots[at].ready]
        order = sorted(ready, key=lambda at: (slots[at].taken >= RECYCLE_AFTER, slots[at].open))
        for at in order:
            number = slots[at].handed + 1
            handover = Handover(
                number=number,
                secured=slots[at].secured,
                address=one.address,
                admission=admission,
                request=bytes(one.data[pdu.HEADER.size :]),
                crowded=crowded,
            )
            try:
                socket.send_fds(self._channels[at], [handover.encode()], [one.connection.fileno()])
            except OSError:
                continue
            slots[at].hand()
            if admission is None:
                slots[at].hand_secured()
                self._opening[at][number] = one.address
            self._addresses[at][number] = one.address
            self._forget(one)
            return True
        return False

    def _reject(self, one: _Pending, request: pdu.Request, rejection: Rejection) -> None:
        who = {"calling_ae": request.calling, "called_ae": request.called, "address": one.address}
        log.warning("association.rejected", check=rejection.check, **who)
        self._written.write(REJECTED, check=rejection.check, tls=False, **who)
        said = f"{rejection.check}: {request.calling} at {one.address} to {request.called}"
        answer = pdu.reject(rejection.result, rejection.source, rejection.reason)
        self._answer(one, answer, rejection.check, said)

    def _refuse(self, one: _Pending, answer: bytes, check: str, reason: str) -> None:
        log.warning("connection.refused", reason=reason, address=one.address)
        self._written.write(REJECTED, check=check, tls=one.secure, reason=reason, address=one.address)
        self._answer(one, answer, check, f"{reason}: {one.address}")

    def _answer(self, one: _Pending, answer: bytes, check: str, said: str) -> None:
        """Answer, and wait for the peer to close (ARTIM, PS3.8 9.1.5)."""
        self._board.refused(check, said)
        one.closing = True
        one.since = time.monotonic()
        self._pending.pop(one)
        self._pending[one] = None  # to the end: it is the newest
        try:
            one.connection.send(answer)
            one.connection.shutdown(socket.SHUT_WR)
        except OSError:
            self._forget(one)

    def _forget(self, one: _Pending) -> None:
        del self._pending[one]
        self._held -= len(one.data)
        if not one.waiting:
            self._selector.unregister(one.connection)
        one.connection.close()
