"""Associations to destinations, kept open while work waits and a few seconds longer.

Each is used by one thread at a time. One that the peer has ended meanwhile is noticed before it is lent again; those
that nobody wants any more are released by a thread of the pool's, so that a peer that does not answer holds up nobody.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.errors import PeerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clarion.model import Destination
    from gateway.scu import Requestor

    Classes = frozenset[tuple[str, str]]
    Open = Callable[[Destination, Classes], Requestor]

IDLE_S = 5.0
_LOOK_S = 0.5


class UnreachedError(PeerUnavailableError):
    """No association could be made; whoever else wants one from this peer need not try now."""


@dataclass(slots=True)
class _Idle:
    name: str
    classes: Classes
    requestor: Requestor
    since: float


class Pool:
    """Lends associations. `open_` makes one, for SOP Classes each in a transfer syntax."""

    def __init__(self, open_: Open, *, idle_s: float = IDLE_S) -> None:
        self._open = open_
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._idle: list[_Idle] = []
        self._keeper: threading.Thread | None = None

    @contextmanager
    def lend(self, destination: Destination, classes: Classes) -> Iterator[Lent]:
        """Lend an association that was asked for these classes. After an error it is aborted, else kept.

        Raises UnreachedError, and PeerRefusedError, when none can be made.
        """
        lent = Lent(self, destination, classes)
        try:
            yield lent
        except BaseException:  # whatever it was, the association is in no state to be used again
            lent.abort()
            raise
        self._keep(destination.name, classes, lent.requestor)

    def take(self, destination: Destination, classes: Classes) -> Requestor | None:
        """Take an idle one that will do."""
        while True:
            with self._lock:
                found = next(
                    (one for one in self._idle if one.name == destination.name and one.classes >= classes), None
                )
                if found is None:
                    return None
                self._idle.remove(found)
            if found.requestor.is_there():
                return found.requestor
            found.requestor.abort()

    def open(self, destination: Destination, classes: Classes) -> Requestor:
        """Make a new one. Raises UnreachedError, PeerRefusedError."""
        try:
            return self._open(destination, classes)
        except PeerUnavailableError as error:
            raise UnreachedError(str(error)) from error

    def close(self, seconds: float) -> None:
        """Release all that are idle; those in use are their users' business."""
        self._idle_s = 0.0
        if self._keeper is not None:
            self._keeper.join(seconds)

    def _keep(self, name: str, classes: Classes, requestor: Requestor) -> None:
        with self._lock:
            self._idle.append(_Idle(name, classes, requestor, time.monotonic()))
            if self._keeper is None or not self._keeper.is_alive():
                self._keeper = threading.Thread(target=self._look_after, name="association-keeper", daemon=True)
                self._keeper.start()

    def _look_after(self) -> None:
        """Hear what idle peers say, and release those whose time is over, until there are none."""
        timer = threading.Event()
        while True:
            timer.wait(min(_LOOK_S, self._idle_s))
            for one in list(self._idle):
                with self._lock:
                    if one not in self._idle:
                        continue  # lent meanwhile
                    self._idle.remove(one)
                if not one.requestor.is_there():
                    one.requestor.abort()
                elif time.monotonic() - one.since >= self._idle_s:
                    one.requestor.release()
                else:
                    with self._lock:
                        self._idle.append(one)
            with self._lock:
                if not self._idle:
                    self._keeper = None
                    return


class Lent:
    """An association in use; `requestor` may change when it is renewed."""

    def __init__(self, pool: Pool, destination: Destination, classes: Classes) -> None:
        self._pool = pool
        self._destination = destination
        self._classes = classes
        found = pool.take(destination, classes)
        self._used_before = found is not None
        self.requestor = found or pool.open(destination, classes)

    def renew(self) -> bool:
        """Replace one that was idle and turns out to be gone; tell whether that was done. Raises as `lend` does."""
        if not self._used_before:
            return False
        self._used_before = False
        self.requestor.abort()
        self.requestor = self._pool.open(self._destination, self._classes)
        return True

    def proven(self) -> None:
        """It has been answered on: from now on a loss is a loss."""
        self._used_before = False

    def abort(self) -> None:
        """Abort it."""
        self.requestor.abort()
