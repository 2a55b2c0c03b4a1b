"""When the grouping owner works: in a lull of what is received, or when it has waited long enough.

While instances stream in, senders wait for every answer and for the processors it takes; nobody waits for a group
before its last instance has come. So the owner lets intake go first. What it then takes at once costs about half of
what it costs beside intake, and intake two thirds (docs/performance.md). A stream that never ends is worked off too.
"""

from __future__ import annotations

import threading
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
        monotonic: Callable[[], float],
        wait: Callable[[float], object] = lambda seconds: threading.Event().wait(seconds),
    ) -> None:
        self._ends = ends
        self._monotonic = monotonic
        self._wait = wait
        self._since: float | None = None
        self._seen: object = None

    def all_taken(self) -> None:
        """Everything that was in the journal has been taken: from now on records come together."""
        self._since, self._seen = self._monotonic(), None

    def is_here(self) -> bool:
        """Wait a moment unless it is time to work; tell whether it is."""
        if self._since is None or self._monotonic() - self._since >= LONGEST_S:
            return True
        self._wait(_LOOK_S)
        ends = self._ends()
        still, self._seen = ends == self._seen, ends
        return still and self._monotonic() - self._since >= _SHORTEST_S
