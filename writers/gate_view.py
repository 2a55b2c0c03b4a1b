"""What the result gate sees of a file: elements by tag, read by our own walker, never by the writers' library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clarion.dicom import plain_encoding
from clarion.elements import DEFLATED_LE, EXPLICIT_LE, Walker
from clarion.errors import InvalidInstanceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clarion.elements import Element

# Our own results have a few elements per contour and frame, and the gate walks them several times.
_MAX_ELEMENTS = 50_000_000
_TRANSFER_SYNTAX = 0x00020010
_SAYING = (0x0008103E, 0x00700081, 0x30060006, 0x00082111, 0x0040A492, 0x00204000)
# Sequences of the objects we write, needed only where implicit VR hides what is one.
_SEQUENCES = frozenset(
    (0x30060010, 0x30060012, 0x30060014, 0x30060016, 0x30060020, 0x30060039, 0x30060040, 0x30060080)
    + (0x30060086, 0x0018A001, 0x0040A170, 0x00082112, 0x00081115, 0x00081199)
)


class View:
    """One result: its data set and its file meta information; raises InvalidInstanceError where bytes do not nest."""

    def __init__(self, output: str, data: bytes, meta: dict[int, str]) -> None:
        self.output = output
        self.meta = meta
        syntax = meta.get(_TRANSFER_SYNTAX, "")
        if not syntax:
            raise InvalidInstanceError("malformed", "the file meta information names no transfer syntax")
        self.data = plain_encoding(data, syntax)
        self.syntax = EXPLICIT_LE if syntax == DEFLATED_LE else syntax
        self._walker = Walker(self.data, self.syntax, _MAX_ELEMENTS)
        self.top = {element.tag: element for element in self._walker.elements()}

    def text(self, tag: int) -> str:
        """Give a top-level value as text; empty when it is absent."""
        element = self.top.get(tag)
        return "" if element is None else self._walker.text(element)

    def text_of(self, element: Element) -> str:
        """Give any element's value as text."""
        return self._walker.text(element)

    def raw(self, tag: int) -> bytes:
        """Give a top-level value's bytes; empty when it is absent."""
        element = self.top.get(tag)
        return b"" if element is None else self.data[element.start : element.end]

    def number(self, tag: int) -> int:
        """Give an unsigned 16-bit or an IS value; -1 when it is absent."""
        raw = self.raw(tag)
        if not raw:
            return -1
        text = raw.strip(b" \0")
        if self.top[tag].vr == "US" or not text.isdigit():
            return int.from_bytes(raw[:2], "little")
        return int(text)

    def items(self, tag: int) -> list[dict[int, Element]]:
        """Give the items of a top-level sequence."""
        element = self.top.get(tag)
        return [] if element is None else self.items_of(element)

    def items_of(self, element: Element) -> list[dict[int, Element]]:
        """Give the items of a sequence."""
        return [{one.tag: one for one in item} for item in self._walker.items(element)]

    def everywhere(self, tag: int) -> Iterator[Element]:
        """Give an element wherever it stands, at any depth."""
        return self._search(list(self.top.values()), tag)

    def described(self) -> str:
        """Give the texts in which a result says what it is."""
        return " ".join(self.text(tag) for tag in _SAYING)

    def _search(self, elements: list[Element], tag: int) -> Iterator[Element]:
        for element in elements:
            if element.tag == tag:
                yield element
            elif element.vr == "SQ" or element.tag in _SEQUENCES:
                for item in self._walker.items(element):
                    yield from self._search(item, tag)
