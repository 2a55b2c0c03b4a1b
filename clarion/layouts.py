"""Data sets that are laid out like one before are not walked again: their headers are compared all at once.

What a walk finds depends on the headers it reads and on where the bytes end. Of two data sets of one size, with the
same headers in the same places, it finds the same: the instances of a series are mostly like that. A data set is
scanned as ever (`clarion.scanning`) unless it is known that the scan could only say what it said before.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from clarion.elements import DEFLATED_LE, Walker
from clarion.errors import InvalidInstanceError
from clarion.scanning import LONGEST, MAX_ELEMENTS, WANTED, Scan, read_identity, scan

if TYPE_CHECKING:
    from clarion.elements import Bytes

# So many sizes are remembered; then all are forgotten.
_MOST = 512


class _Layout:
    """Where the headers of a data set stand, what they are, and where the values are that tell what it is."""

    __slots__ = ("_headers", "_places", "_read")

    def __init__(self, data: Bytes, syntax: str) -> None:
        """Walk a data set. Raises InvalidInstanceError where it has no such layout."""
        made, behind, at = ["<"], 0, 0
        self._places: dict[int, slice] = {}
        for element in Walker(data, syntax, MAX_ELEMENTS).elements():
            if element.undefined:
                # Where such a value ends is not said by its header.
                raise InvalidInstanceError("malformed", "of undefined length")
            made.append(f"{at - behind}x{element.start - at}s")
            behind, at = element.start, element.end
            if element.tag in WANTED:
                self._places[element.tag] = slice(element.start, min(element.end, element.start + LONGEST))
        if at != len(data):
            raise InvalidInstanceError("truncated", "bytes are left behind the last element")
        self._read = struct.Struct("".join(made)).unpack_from
        self._headers = self._read(data)

    def scan(self, data: Bytes) -> Scan | None:
        """Give what a scan would find; None when the data set is laid out differently."""
        if self._read(data) != self._headers:
            return None
        return read_identity({tag: bytes(data[place]) for tag, place in self._places.items()})


class Layouts:
    """Scans data sets, and remembers how they are laid out. Safe from several threads."""

    def __init__(self) -> None:
        # By syntax and size: None when one such data set has come, False when its like have no layout.
        self._known: dict[tuple[str, int], _Layout | bool | None] = {}

    def scan(self, data: Bytes, syntax: str) -> Scan:
        """Scan an encoded data set: what `clarion.scanning.scan` gives."""
        if syntax == DEFLATED_LE:
            return scan(data, syntax)
        key = syntax, len(data)
        layout = self._known.get(key, False)
        if isinstance(layout, _Layout) and (found := layout.scan(data)) is not None:
            return found
        seen = scan(data, syntax)
        if seen.checked and seen.fault is None:
            self._learn(key, data)
        return seen

    def _learn(self, key: tuple[str, int], data: Bytes) -> None:
        """Remember the layout of a size that comes for the second time: most that come once never do again."""
        if key not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[key] = None
        elif self._known[key] is not False:
            try:
                self._known[key] = _Layout(data, key[0])
            except InvalidInstanceError:
                self._known[key] = False
