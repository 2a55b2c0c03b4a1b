"""What the result gate sees of a file: elements by tag, read by our own walker, never by the writers' library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clarion.elements import DEFLATED_LE, EXPLICIT_LE, Walker, plain_encoding
from clarion.errors import InvalidInstanceError
from clarion.texts import decode_text, encodings_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydicom import Dataset

    from clarion.elements import Element
    from clarion.labels import Labels
    from writers.identity import JobIdentity

    Item = dict[int, Element]

# Our own results have a few elements per contour and frame, and the gate walks them several times.
_MAX_ELEMENTS = 50_000_000
_TRANSFER_SYNTAX = 0x00020010
_SAYING = (0x0008103E, 0x00700081, 0x30060006, 0x00082111, 0x0040A492, 0x00204000)
_LONGEST_BLANK = 64
_CHARACTER_SET = 0x00080005
_REFERENCED_CLASS, _REFERENCED_INSTANCE = 0x00081150, 0x00081155
# Sequences of the objects we write, needed only where implicit VR hides what is one.
_SEQUENCES = frozenset(
    (0x30060010, 0x30060012, 0x30060014, 0x30060016, 0x30060020, 0x30060039, 0x30060040, 0x30060080)
    + (0x30060086, 0x0018A001, 0x0040A170, 0x00082112, 0x00081115, 0x00081199)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a result set is compared with: its source's headers, the labels it was made from, its job."""

    source: list[Dataset]
    labels: Labels | None
    job: JobIdentity


def is_placed(ds: Dataset) -> bool:
    """Tell whether a header says where its image lies."""
    return bool(ds.get("ImagePositionPatient")) and bool(ds.get("ImageOrientationPatient"))


class View:
    """One result: its data set and its file meta information; raises InvalidInstanceError where bytes do not nest.

    `kind` is the name of its file without `.dcm`, from which its UIDs are derived.
    """

    def __init__(self, output: str, kind: str, data: bytes, meta: dict[int, str]) -> None:
        self.output = output
        self.kind = kind
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

    def name_in(self, item: Item, tag: int) -> str:
        """Give a text of an item decoded by the result's character set; empty when it is not there."""
        element = item.get(tag)
        if element is None:
            return ""
        encodings = encodings_of(self.raw(_CHARACTER_SET))
        return decode_text(self.data[element.start : element.end], encodings)

    def text_in(self, item: Item, *tags: int) -> str:
        """Follow first items down from an item to an element; give its text, empty when it is not there."""
        element = self.inside(item, *tags)
        return "" if element is None else self._walker.text(element)

    def is_empty(self, element: Element) -> bool:
        """Tell whether an element has no value, or nothing but spaces."""
        size = element.end - element.start
        return size <= 0 or (size <= _LONGEST_BLANK and not self.data[element.start : element.end].strip(b" "))

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

    def items(self, tag: int) -> list[Item]:
        """Give the items of a top-level sequence."""
        element = self.top.get(tag)
        return [] if element is None else self.items_of(element)

    def items_of(self, element: Element) -> list[Item]:
        """Give the items of a sequence."""
        return [{one.tag: one for one in item} for item in self._walker.items(element)]

    def items_at(self, path: tuple[int, ...]) -> list[Item]:
        """Give all items of a nested sequence; the empty path is the data set itself."""
        found = [self.top]
        for tag in path:
            found = [inner for item in found if tag in item for inner in self.items_of(item[tag])]
        return found

    def inside(self, item: Item, *tags: int) -> Element | None:
        """Follow first items down from an item to an element."""
        for tag in tags[:-1]:
            element = item.get(tag)
            nested = self.items_of(element) if element is not None else []
            if not nested:
                return None
            item = nested[0]
        return item.get(tags[-1])

    def references(self) -> Iterator[tuple[str, str]]:
        """Give every (SOP Class UID, SOP Instance UID) that is referenced, at any depth."""
        for item in self._items_below(list(self.top.values())):
            if _REFERENCED_INSTANCE in item:
                yield self.text_in(item, _REFERENCED_CLASS), self.text_of(item[_REFERENCED_INSTANCE])

    def everywhere(self, tag: int) -> Iterator[Element]:
        """Give an element wherever it stands, at any depth."""
        if tag in self.top:
            yield self.top[tag]
        for item in self._items_below(list(self.top.values())):
            if tag in item:
                yield item[tag]

    def described(self) -> str:
        """Give the texts in which a result says what it is."""
        return " ".join(self.text(tag) for tag in _SAYING)

    def _items_below(self, elements: list[Element]) -> Iterator[Item]:
        for element in elements:
            if element.vr == "SQ" or element.tag in _SEQUENCES:
                for item in self._walker.items(element):
                    yield {one.tag: one for one in item}
                    yield from self._items_below(item)
