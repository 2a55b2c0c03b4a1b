"""The watermark: how much of the disk receiving leaves free (registry specification, 4.5)."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from clarion.adapters.files import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from clarion.config import IntakeConfig

# Within it a disk takes less than any reserve that protects anything.
_MEASURED_FOR_S = 0.05
_LOOK_S = 0.1
PATIENCE_S = 10.0
"""For so long after the disk ran short senders are kept waiting; then they are refused until there is room."""


class Held(Protocol):
    """The bytes being received now: ours are added and taken, those of all processes counted."""

    def add(self, count: int) -> None:
        """Count some of ours more; fewer if negative."""

    def total(self) -> int:
        """Give those of everybody."""


class HeldHere:
    """The bytes being received by this process alone."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int) -> None:
        """Count some more; fewer if negative."""
        self._count += count

    def total(self) -> int:
        """Give what was counted."""
        return self._count


class Space:
    """Tells whether the disk under `data` has room; bytes being received count as used. Thread-safe."""

    def __init__(
        self,
        data: Path,
        config: IntakeConfig,
        measure: Callable[[Path], tuple[int, int]] = free_bytes,
        held: Held | None = None,
    ) -> None:
        self._data = data
        self._config = config
        self._measure = measure
        self._lock = threading.Lock()
        self._held = held or HeldHere()
        self._spare, self._measured = 0.0, -1.0
        self._short_since = 0.0
        self._timer = threading.Event()
        self.patience_s = PATIENCE_S

    def available(self, wanted: int = 0) -> bool:
        """Tell whether `wanted` more bytes leave the reserve untouched. The disk is asked twenty times a second."""
        now = time.monotonic()
        if now - self._measured > _MEASURED_FOR_S:
            free, total = self._measure(self._data)
            reserve = max(total * (1 - self._config.watermark_percent / 100), self._config.reserve_gb * 1e9)
            self._spare, self._measured = free - reserve, now
        return self._spare - self._held.total() > wanted

    def wait_for(self, wanted: int) -> bool:
        """Wait for room as long as a sender may be kept waiting: a few seconds from when it ran short.

        Tell whether there is room. A thread that waits reads nothing, so its sender is slowed first, then told.
        """
        while not self.available(wanted):
            now = time.monotonic()
            with self._lock:
                self._short_since = self._short_since or now
                patience = self._short_since + self.patience_s - now
            if patience <= 0:
                return False
            self._timer.wait(min(_LOOK_S, patience))
        if self._short_since:
            with self._lock:
                self._short_since = 0.0
        return True

    def holding(self, size: int) -> _Holding:
        """Count `size` bytes as used for the block; gives whether there is room for them."""
        return _Holding(self, size)

    def hold(self, size: int) -> bool:
        """Count `size` bytes as being received, until `let_go`; tell whether there is room for them."""
        with self._lock:
            room = self.available(size)
            if room:
                self._short_since = 0.0
            self._held.add(size)
        return room

    def let_go(self, size: int) -> None:
        """What was held has been written."""
        with self._lock:
            self._held.add(-size)
            self._spare -= size

    def spend(self, size: int) -> None:
        """Count bytes that were just written, until the disk is asked again."""
        with self._lock:
            self._spare -= size


class _Holding:
    """A block for which bytes are held: for every instance that comes, so no generator."""

    __slots__ = ("_size", "_space")

    def __init__(self, space: Space, size: int) -> None:
        self._space = space
        self._size = size

    def __enter__(self) -> bool:
        return self._space.hold(self._size)

    def __exit__(self, *_: object) -> None:
        self._space.let_go(self._size)
