"""Whether a sync is worth waiting for others: those who wrote lately are about to write again.

A sync costs the same for one as for all. With a few senders that are answered in turn each would have one of its own;
half a sync later they share it. Who writes alone never waits, and a sender that has stopped is waited for twice.
"""

from __future__ import annotations

import threading
import time

_LONGEST_S = 0.0005


class Gathering:
    """Knows which threads were in the last two syncs. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._came: set[int] = set()
        self._lately: tuple[set[int], set[int]] = (set(), set())
        self._missing: set[int] = set()
        self._complete: threading.Lock | None = None
        self._began = self._sync_s = 0.0

    def came(self) -> None:
        """The calling thread has written, and wants a sync."""
        me = threading.get_ident()
        with self._lock:
            self._came.add(me)
            self._missing.discard(me)
            if self._complete is not None and not self._missing:
                self._complete.release()
                self._complete = None

    def wait(self) -> None:
        """Wait for who wrote lately, for half as long as the last sync took at most."""
        with self._lock:
            self._missing = (self._lately[0] | self._lately[1]) - self._came - {threading.get_ident()}
            if not self._missing:
                return
            complete = self._complete = threading.Lock()
            complete.acquire()
        complete.acquire(timeout=min(_LONGEST_S, self._sync_s / 2))
        with self._lock:
            self._complete = None

    def begin(self, waiting: set[int]) -> None:
        """A sync begins, of all who came but those who wait on for what is still being written."""
        with self._lock:
            self._lately, self._came = (self._lately[1], self._came - waiting), waiting
        self._began = time.perf_counter()

    def end(self) -> None:
        """It has ended."""
        self._sync_s = time.perf_counter() - self._began
