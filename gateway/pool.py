"""Associations to destinations, kept open while work waits and a few seconds longer.

Each is used by one thread at a time. One that the peer has ended meanwhile is noticed before it is lent again; those
that nobody wants any more are released by a thread of the pool's, so that a peer that does not answer holds up nobody.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from clarion.errors import PeerUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clarion.model import Destination
    from gateway.scu import Requestor

    Classes = frozenset[tuple[str, str]]
    Open = Callable[[Destination, Classes], Requestor]

log = structlog.get_logger()

IDLE_S = 5.0
_LOOK_S = 0.5


class UnreachedError(PeerUnavailableError):
    """No association could be made; whoever else wants one from this peer need not try now."""


class TurnedAwayError(PeerUnavailableError):
    """It is there and takes nothing now; whoever else has something for this peer need not try now."""


@dataclass(slots=True)
class _Idle:
    name: str
    classes: Classes
    requestor: Requestor
    since: float


class Pool:
    """Lends associations. `open_` makes one, for SOP Classes each in a transfer syntax."""

    def __init__(self, open_: Open, *, most: int, idle_s: float = IDLE_S) -> None:
        self._open = open_
        self._most = most
        self._idle_s = idle_s
        self._lock = threading.Lock()
        # The one that has been idle for longest is first.
        self._idle: list[_Idle] = []
        self._used: Counter[str] = Counter()
        self._keeper: threading.Thread | None = None

    @contextmanager
    def lend(self, destination: Destination, classes: Classes) -> Iterator[Lent]:
        """Lend an association that was asked for these classes. After an error it is aborted, else kept.

        Raises UnreachedError, and PeerRefusedError, when none can be made.
        """
        with self._lock:
            self._used[destination.name] += 1
        lent: Lent | None = None
        try:
            lent = Lent(self, destination, classes)
            yield lent
        except BaseException:  # whatever it was, the association is in no state to be used again
            if lent is not None:
                lent.abort()
            with self._lock:
                self._used[destination.name] -= 1
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
        """Make a new one, for whom `lend` has counted it. Raises UnreachedError, PeerRefusedError."""
        for one in self._too_many(destination):
            one.requestor.release()
        try:
            return self._open(destination, classes)
        except PeerUnavailableError as error:
            raise UnreachedError(str(error)) from error

    def _too_many(self, destination: Destination) -> list[_Idle]:
        """Take out the idle ones that stand in the way of one more: a peer's own, or any."""
        with self._lock:
            ours = [one for one in self._idle if one.name == destination.name]
            over = self._used[destination.name] + len(ours) - destination.max_associations
            chosen = ours[: max(0, over)]
            left = [one for one in self._idle if one not in chosen]
            over = self._used.total() + len(left) - self._most
            chosen += left[: max(0, over)]
            self._idle = [one for one in self._idle if one not in chosen]
        return chosen

    def close(self, seconds: float) -> None:
        """Release all that are idle; those in use are their users' business."""
        self._idle_s = 0.0
        if self._keeper is not None:
            self._keeper.join(seconds)

    def _keep(self, name: str, classes: Classes, requestor: Requestor) -> None:
        with self._lock:
            self._used[name] -= 1
            self._idle.append(_Idle(name, classes, requestor, time.monotonic()))
            if self._keeper is None or not self._keeper.is_alive():
                self._keeper = threading.Thread(target=self._look_after, name="association-keeper", daemon=True)
                try:
                    self._keeper.start()
                except RuntimeError as error:
                    # The next one that is kept tries again; until then those that are lent are looked at.
                    log.warning("pool.unkept", reason=str(error))
                    self._keeper = None

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
                if self._is_wanted(one):
                    with self._lock:
                        self._idle.append(one)
            with self._lock:
                if not self._idle:
                    self._keeper = None
                    return

    def _is_wanted(self, one: _Idle) -> bool:
        """Tell whether an association stays; else it is ended."""
        try:
            if not one.requestor.is_there():
                one.requestor.abort()
                return False
            if time.monotonic() - one.since < self._idle_s:
                return True
            one.requestor.release()
        except Exception:  # the boundary to the wire: this association is lost, the others are looked after
            log.exception("association.failed", destination=one.name)
            one.requestor.abort()
        return False


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
