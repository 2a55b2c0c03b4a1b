"""Which destinations cannot be reached, and until when they are left alone. Safe from several threads."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from clarion.ports import Clock

_FIRST = timedelta(seconds=5)
_LONGEST = timedelta(seconds=60)


class Circuits:
    """One for each destination: open after a failure, for longer with each, closed again by a success."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, tuple[datetime, timedelta]] = {}

    def failed(self, name: str) -> None:
        """Note that a destination could not be reached, or would not have us."""
        with self._lock:
            _, pause = self._open.get(name.lower(), (None, _FIRST / 2))
            pause = min(2 * pause, _LONGEST)
            self._open[name.lower()] = self._clock.now() + pause, pause

    def worked(self, name: str) -> None:
        """Note that it could."""
        with self._lock:
            self._open.pop(name.lower(), None)

    def is_closed(self, name: str) -> bool:
        """Tell whether a destination may be tried."""
        with self._lock:
            found = self._open.get(name.lower())
            return found is None or found[0] <= self._clock.now()

    def open_ones(self) -> dict[str, str]:
        """Give who is left alone, and until when."""
        now = self._clock.now()
        with self._lock:
            return {name: str(until) for name, (until, _) in self._open.items() if until > now}
