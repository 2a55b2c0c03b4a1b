"""Which destinations cannot be reached, and until when they are left alone. Safe from several threads.

By the monotonic clock: one that is set back must not leave a destination alone for longer.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clarion.ports import Clock

_FIRST_S = 5.0
_LONGEST_S = 60.0


class Circuits:
    """One for each destination: open after a failure, for longer with each, closed again by a success."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, tuple[float, float]] = {}

    def failed(self, name: str) -> None:
        """Note that a destination could not be reached, or would not have us."""
        with self._lock:
            _, pause = self._open.get(name.lower(), (0.0, _FIRST_S / 2))
            pause = min(2 * pause, _LONGEST_S)
            self._open[name.lower()] = self._clock.monotonic() + pause, pause

    def worked(self, name: str) -> None:
        """Note that it could."""
        with self._lock:
            self._open.pop(name.lower(), None)

    def is_closed(self, name: str) -> bool:
        """Tell whether a destination may be tried."""
        with self._lock:
            found = self._open.get(name.lower())
            return found is None or found[0] <= self._clock.monotonic()

    def open_ones(self) -> dict[str, float]:
        """Give who is left alone, and for how many seconds more."""
        now = self._clock.monotonic()
        with self._lock:
            return {name: round(until - now, 1) for name, (until, _) in self._open.items() if until > now}
