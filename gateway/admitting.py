"""Whether an association is let in, in the order of the registry specification, 4.1.

Asked by whoever read the request: the guard, or a worker where TLS hides it from the guard.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from gateway.access import NO_SPACE, NOT_READY, OUR_FAULT, TOO_MANY, Admission, Rejection
from gateway.board import MALFORMED
from gateway.wire import pdu
from gateway.wire.acceptance import is_storage
from gateway.wire.pdu import PduError

if TYPE_CHECKING:
    import contextlib

    from clarion.config import ScpConfig
    from gateway.access import AccessList
    from gateway.board import Board
    from gateway.space import Space

log = structlog.get_logger()

# Of the associations allowed, this part is kept for known AE titles where unknown ones are let in.
_RESERVED = 0.2


class Admitting:
    """Judges association requests."""

    def __init__(self, *, config: ScpConfig, access: AccessList, space: Space, board: Board) -> None:
        self._config = config
        self._access = access
        self._space = space
        self._board = board

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Let nobody else in while it is decided whether somebody is: between `refusal` and the counting."""
        return self._board.alone()

    def malformed(self, request: pdu.Request) -> Rejection | None:
        """Tell what is wrong with a request itself. Raises PduError when it deserves an abort."""
        if 0 < request.max_length < pdu.SMALLEST_MAX_LENGTH:
            raise PduError(pdu.INVALID_PARAMETER, "a maximum length that no PDV fits into")
        if not request.version & 1:
            return Rejection(check=MALFORMED, result=1, source=2, reason=2)
        if request.application_context != pdu.APPLICATION_CONTEXT:
            return Rejection(check=MALFORMED, result=1, source=1, reason=2)
        return None

    def may_wait(self, request: pdu.Request) -> bool:
        """Tell whether `check` may wait for a name server."""
        return self._access.may_wait(request.calling)

    def check(self, request: pdu.Request, address: str) -> Admission | Rejection:
        """Check by the access list."""
        try:
            return self._access.check(request.calling, request.called, address, request.identity)
        except Exception:  # whatever we got wrong, nobody comes in by it
            log.exception("association.failed", address=address)
            return OUR_FAULT

    def refusal(self, request: pdu.Request, admission: Admission, *, has_its_share: bool) -> Rejection | None:
        """Tell why who is known is not let in now, or None. `has_its_share`: its address has as many as one may."""
        if self._board.draining:
            return NOT_READY
        if not any(one.ready for one in self._board.slots):
            return NOT_READY
        most = self._config.max_associations
        if not admission.known:
            most -= max(1, int(most * _RESERVED))
        if self._board.associations >= most or has_its_share:
            return TOO_MANY
        storage = any(is_storage(one.abstract_syntax) for one in request.contexts)
        return NO_SPACE if storage and not self._space.available() else None
