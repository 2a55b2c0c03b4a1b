"""Buffers from which a record goes to the disk past the page cache: whole blocks, at addresses the disk can read from.

The pages of the cache are dear to touch first, above all in a virtual machine, and nobody reads a data set while more
of its study comes.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 4096
# In front of the data set: the head and body of nearly every record.
_FRONT_BYTES = 2 * BLOCK_BYTES


class BlockBuffer:
    """Room for a data set of up to `capacity` bytes, `data`, and for its record around it."""

    def __init__(self, capacity: int) -> None:
        self._all = memoryview(mmap.mmap(-1, _FRONT_BYTES + to_blocks(capacity)))
        self.data = self._all[_FRONT_BYTES : _FRONT_BYTES + capacity]

    def takes(self, front: int) -> bool:
        """Tell whether so many bytes have room in front of the data set."""
        return front <= _FRONT_BYTES

    def frame(self, front: Buffer, size: int) -> memoryview:
        """Give whole blocks: `front`, which is some, the first `size` bytes of `data`, and zeros."""
        begin = _FRONT_BYTES - len(front)  # type: ignore[arg-type]  # bytes
        self._all[begin:_FRONT_BYTES] = front
        end, whole = _FRONT_BYTES + size, _FRONT_BYTES + to_blocks(size)
        self._all[end:whole] = bytes(whole - end)
        return self._all[begin:whole]


def to_blocks(size: int) -> int:
    """Round up to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
