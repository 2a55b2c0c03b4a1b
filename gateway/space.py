"""The watermark: how much of the disk receiving leaves free (registry specification, 4.5)."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from clarion.adapters.files import free_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from clarion.config import IntakeConfig


class Space:
    """Tells whether the disk under `data` has room; bytes being received count as used. Thread-safe."""

    def __init__(
        self, data: Path, config: IntakeConfig, measure: Callable[[Path], tuple[int, int]] = free_bytes
    ) -> None:
        self._data = data
        self._config = config
        self._measure = measure
        self._lock = threading.Lock()
        self._reserved = 0

    def available(self, wanted: int = 0) -> bool:
        """Tell whether `wanted` more bytes leave the reserve untouched."""
        free, total = self._measure(self._data)
        reserve = max(total * (1 - self._config.watermark_percent / 100), self._config.reserve_gb * 1e9)
        return free - self._reserved - wanted > reserve

    @contextmanager
    def holding(self, size: int) -> Iterator[bool]:
        """Count `size` bytes as used for the block; gives whether there is room for them."""
        with self._lock:
            room = self.available(size)
            self._reserved += size
        try:
            yield room
        finally:
            with self._lock:
                self._reserved -= size
