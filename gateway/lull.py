"""When the grouping owner works: in a lull of what is received, or when it has waited long enough.

While instances stream in, senders wait for every answer and for the processors it takes; nobody waits for a group
before its last instance has come. So the owner lets intake go first. What it then takes at once costs about half of
what it costs beside intake, and intake two thirds (docs/performance.md). A stream that never ends is worked off too.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_S = 0.05
# Two transactions a second at most while few records arrive.
_SHORTEST_S = 0.5
# Nothing is taken later than this because other things are received.
LONGEST_S = 5.0


class Lull:
    """Knows since when records have come together. `ends` says how far the journal is committed."""

    def __init__(
        self,
        ends: Callable[[], object],
        monotonic: Callable[[], float] = time.monotonic,
        wait: Callable[[float], object] = lambda seconds: threading.Event().wait(seconds),
    ) -> None:
        self._ends = ends
        self._monotonic = monotonic
        self._wait = wait
        self._since: float | None = None
        # How far the journal was when it was last seen to move, and when that was.
        self._seen: object = None
        self._moved = 0.0

    def all_taken(self) -> None:
        """Everything that was in the journal has been taken: from now on records come together."""
        self._since = self._monotonic()

    def is_here(self) -> bool:
        """Tell whether it is time to work; waits a moment if it is not."""
        now = self._monotonic()
        if self._since is None or now - self._since >= LONGEST_S:
            return True
        ends = self._ends()
        if ends != self._seen:
            self._seen, self._moved = ends, now
        if now - self._moved >= _LOOK_S and now - self._since >= _SHORTEST_S:
            return True
        self._wait(_LOOK_S)
        return False
