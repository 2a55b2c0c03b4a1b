"""A connection under TLS, as its worker finds it: shake hands, read the association request, let in or turn away.

The guard cannot look into it and has only counted it. Both steps have a deadline for the whole of them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog

from gateway.access import Rejection
from gateway.association import LINGER_S, Shared
from gateway.association_log import REJECTED
from gateway.board import MALFORMED, NO_TLS
from gateway.handover import Told
from gateway.wire import pdu, secure
from gateway.wire.pdu import PduError
from gateway.wire.sockets import close_gently

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from gateway.access import Admission
    from gateway.admitting import Admitting
    from gateway.association import Association
    from gateway.handover import Handover
    from gateway.wire.secure import Renewed

log = structlog.get_logger()

HANDSHAKE_S = 5.0
_REQUEST_S = 10.0


class Secured:
    """One such connection, in a thread of its own. `stop` may be called by any thread."""

    def __init__(
        self,
        connection: socket.socket,
        handover: Handover,
        *,
        tls: Renewed,
        admitting: Admitting,
        shared: Shared,
        begin: Callable[[socket.socket, pdu.Request, Admission], Association],
        tell: Callable[[Told], None],
    ) -> None:
        self._connection = connection
        self._handover = handover
        self._tls = tls
        self._admitting = admitting
        self._slot = shared.slot
        self._written = shared.written
        self._begin = begin
        self._tell = tell
        self._let = False
        self._association: Association | None = None
        self._stopped = ""

    def run(self) -> None:
        """Serve the connection to its end. Never raises."""
        association = None
        try:
            association = self._open()
        except Exception:  # the boundary to the wire: this peer's connection is lost, nobody else's
            log.exception("association.failed", address=self._handover.address)
        if association is None:
            # Its place is free before it has closed: whoever was turned away must not keep out the next.
            self._turned_away()
            close_gently(self._connection, LINGER_S)
            return
        self._association = association
        if self._stopped:
            association.stop(self._stopped)
        association.run()

    def stop(self, reason: str) -> None:
        """Have it aborted, because we end."""
        self._stopped = reason
        if self._association is not None:
            self._association.stop(reason)

    def _open(self) -> Association | None:
        address = self._handover.address
        try:
            self._connection = secure.accept(self._connection, self._tls.context(), HANDSHAKE_S)
        except (OSError, ValueError) as error:
            self._refuse(NO_TLS, f"no TLS: {secure.reason_of(error)}")
            return None
        try:
            request = pdu.parse_request(self._read_request())
            rejection = self._admitting.malformed(request)
            admission = rejection or self._admitting.check(request, address)
        except PduError as error:
            self._refuse(MALFORMED, str(error))
            self._say(pdu.abort(error.reason))
            return None
        except OSError:
            log.info("connection.ended", reason="no association was asked for", address=address)
            return None
        if not isinstance(admission, Rejection):
            admission = self._let_in(request, admission)
        if isinstance(admission, Rejection):
            self._reject(request, admission)
            return None
        return self._begin(self._connection, request, admission)

    def _let_in(self, request: pdu.Request, admission: Admission) -> Admission | Rejection:
        """Count it as an association, unless there are too many: one at a time, of all who let in."""
        with self._admitting.alone():
            refusal = self._admitting.refusal(request, admission, has_its_share=self._handover.crowded)
            if refusal is None:
                self._slot.opened()
                self._let = True
                self._tell(Told(number=self._handover.number, opened=True))
        return refusal or admission

    def _turned_away(self) -> None:
        if not self._let:
            self._slot.opened()
        self._slot.end()
        self._tell(Told(number=self._handover.number))

    def _read_request(self) -> bytes:
        """Read an A-ASSOCIATE-RQ and nothing after it. Raises PduError, OSError."""
        end = time.monotonic() + _REQUEST_S
        length = pdu.length_of_request(self._exactly(pdu.HEADER.size, end))
        return self._exactly(length, end)

    def _exactly(self, count: int, end: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            more = self._connection.recv(count - len(data))
            if not more:
                raise ConnectionError
            data += more
        return bytes(data)

    def _reject(self, request: pdu.Request, rejection: Rejection) -> None:
        address = self._handover.address
        who = {"calling_ae": request.calling, "called_ae": request.called, "address": address}
        log.warning("association.rejected", check=rejection.check, **who)
        self._written.write(REJECTED, check=rejection.check, tls=True, **who)
        self._say_rejected(rejection.check, f"{rejection.check}: {request.calling} at {address} to {request.called}")
        self._say(pdu.reject(rejection.result, rejection.source, rejection.reason))

    def _refuse(self, check: str, reason: str) -> None:
        log.warning("connection.refused", reason=reason, address=self._handover.address)
        self._written.write(REJECTED, check=check, tls=True, reason=reason, address=self._handover.address)
        self._say_rejected(check, f"{reason}: {self._handover.address}")

    def _say_rejected(self, check: str, said: str) -> None:
        self._tell(Told(number=self._handover.number, check=check, said=said))

    def _say(self, data: bytes) -> None:
        try:
            self._connection.sendall(data)
        except OSError:
            return
