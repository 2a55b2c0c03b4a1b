"""How fast a peer has to be: so much progress within each deadline, whatever it is that it sends or takes.

A deadline for each byte alone would let a peer that drips hold a place for ever; one for the whole would cut honest
peers on slow lines.
"""

from __future__ import annotations

import time

PROGRESS_BYTES = 64 * 1024


class Pace:
    """Counts progress; one thread uses it. `begin` it when something is unfinished, `end` it when that is over."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._begun = 0.0
        self._progress = 0

    def begin(self) -> None:
        """Begin, unless it has begun."""
        if not self._begun:
            self._begun, self._progress = time.monotonic(), 0

    def end(self) -> None:
        """Nothing is unfinished any more."""
        self._begun = 0.0

    def is_slow(self, count: int) -> bool:
        """Count some bytes that came or went; tell whether there were too few in too long."""
        self._progress += count
        now = time.monotonic()
        if self._progress >= PROGRESS_BYTES:
            self._begun, self._progress = now, 0
        return now - self._begun > self._stall_s
