"""Walk an encoded data set without decoding it: where each element lies, and whether the bytes are complete.

The walk believes no length it has not compared with the bytes that are left, and bounds depth and count. It reads
the encodings of PS3.5: implicit and explicit VR little endian, explicit VR big endian, and deflated after `inflate`.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from clarion.errors import InvalidInstanceError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

Bytes: TypeAlias = "bytes | bytearray | memoryview | mmap.mmap"
"""An encoded data set, wherever it lies."""

IMPLICIT_LE = "1.2.840.10008.1.2"
EXPLICIT_LE = "1.2.840.10008.1.2.1"
DEFLATED_LE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BE = "1.2.840.10008.1.2.2"

MAX_DEPTH = 32
# An enhanced image of 2,000 frames with open sequences has about 100,000; a second of walking is the limit.
MAX_ELEMENTS = 500_000
# Deflate reaches 1,000:1; real data sets stay far below 100:1, and small ones are allowed any ratio.
MAX_INFLATE_RATIO = 100
INFLATE_FREE_BYTES = 64 * 2**20
MAX_INFLATED_BYTES = 256 * 2**20

UNDEFINED_LENGTH = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_PIXEL_DATA = 0x7FE00010
# PS3.5 7.1.2: these have two reserved bytes and a 32-bit length.
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
SHORT_VRS = frozenset(
    (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS")
    + (b"ST", b"TM", b"UI", b"UL", b"US")
)
_NAMES = {vr: vr.decode() for vr in SHORT_VRS}
_SHORT_HEAD = struct.Struct("<HH2sH").unpack_from
_DELIMITERS = 0xFFFE


class Element(NamedTuple):
    """One top-level element: its value is `data[start:end]`, what follows begins at `next`."""

    tag: int
    vr: str
    start: int
    end: int
    next: int
    undefined: bool


def inflate(data: bytes) -> bytes:
    """Inflate a deflated data set (PS3.5 A.5) within the ratio allowed."""
    limit = min(max(INFLATE_FREE_BYTES, len(data) * MAX_INFLATE_RATIO), MAX_INFLATED_BYTES)
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = stream.decompress(data, limit)
    except zlib.error as error:
        raise InvalidInstanceError("malformed", "the deflated data set cannot be inflated") from error
    if stream.unconsumed_tail:
        raise InvalidInstanceError("too-large", f"the data set inflates to more than {limit} bytes")
    if not stream.eof:
        raise InvalidInstanceError("truncated", "the deflated data set ends early")
    return inflated


def plain_encoding(data: bytes, transfer_syntax_uid: str) -> bytes:
    """Give the data set as a Walker reads it: inflated if it is deflated."""
    return inflate(data) if transfer_syntax_uid == DEFLATED_LE else data


class Walker:
    """Walks one data set; `data` is the plain, inflated encoding. All its walks together see `max_elements`.

    With `size`, `data` is only the beginning of so many bytes: a walk that goes beyond it raises struct.error.
    """

    def __init__(
        self,
        data: Bytes,
        transfer_syntax_uid: str,
        max_elements: int = MAX_ELEMENTS,
        size: int | None = None,
    ) -> None:
        self._max = max_elements
        self._data = data
        self._size = len(data) if size is None else size
        self._explicit = transfer_syntax_uid != IMPLICIT_LE
        order = self._order = ">" if transfer_syntax_uid == EXPLICIT_BE else "<"
        self._tag = struct.Struct(order + "HH")
        self._u16 = struct.Struct(order + "H")
        self._u32 = struct.Struct(order + "I")
        self._count = 0

    def elements(self) -> Iterator[Element]:
        """Give the top-level elements in the order of the bytes; raise InvalidInstanceError where they do not nest."""
        position, size = 0, self._size
        while position < size:
            element = self.element_at(position)
            yield element
            position = element.next

    def element_at(self, position: int) -> Element:
        """Give the top-level element that begins at a position."""
        return self._plain(position, self._size) or self._element(position, self._size, 0)

    @property
    def exhausted(self) -> bool:
        """Whether more elements were met than are allowed."""
        return self._count > self._max

    def end_of_undefined(self, start: int, tag: int, vr: str) -> int:
        """Find where a top-level value of undefined length ends that begins at `start`; its delimiter follows."""
        return self._end_of_undefined(start, self._size, 0, tag, vr)

    def items(self, element: Element) -> Iterator[list[Element]]:
        """Give the elements of each item of a sequence."""
        position = element.start
        while position < element.end:
            tag, length, body = self._item_head(position, element.end)
            if tag != _ITEM:
                return
            found: list[Element] = []
            position, limit = body, element.end if length == UNDEFINED_LENGTH else body + length
            while position < limit:
                if length == UNDEFINED_LENGTH and self._peek(position, limit) == _ITEM_END:
                    position += 8
                    break
                found.append(self._element(position, limit, 1))
                position = found[-1].next
            yield found

    def text(self, element: Element) -> str:
        """Give an element's value as Latin-1 text without padding: enough for UIDs, codes and numbers."""
        return bytes(self._data[element.start : element.end]).decode("latin-1").strip(" \0")

    def _peek(self, position: int, limit: int) -> int:
        if position + 8 > limit:
            raise InvalidInstanceError("truncated", f"{limit - position} bytes left where an element begins")
        group, number = self._tag.unpack_from(self._data, position)
        return int(group) << 16 | int(number)

    def _item_head(self, position: int, limit: int) -> tuple[int, int, int]:
        tag = self._peek(position, limit)
        length = self._u32.unpack_from(self._data, position + 4)[0]
        if length != UNDEFINED_LENGTH and position + 8 + length > limit:
            raise InvalidInstanceError("truncated", f"an item claims {length} bytes, {limit - position - 8} are left")
        return tag, length, position + 8

    def _head(self, position: int, limit: int) -> tuple[int, str, int, int]:
        """Read tag, VR, length and the position of the value."""
        tag = self._peek(position, limit)
        if not self._explicit:
            return tag, "", self._u32.unpack_from(self._data, position + 4)[0], position + 8
        vr = bytes(self._data[position + 4 : position + 6])
        if vr in LONG_VRS:
            if position + 12 > limit:
                raise InvalidInstanceError("truncated", f"the header of {tag:08X} is cut")
            return tag, vr.decode(), self._u32.unpack_from(self._data, position + 8)[0], position + 12
        if vr in SHORT_VRS:
            return tag, vr.decode(), self._u16.unpack_from(self._data, position + 6)[0], position + 8
        raise InvalidInstanceError("malformed", f"element {tag:08X} has no value representation of PS3.5 6.2")

    def _element(self, position: int, limit: int, depth: int) -> Element:
        self._count_one(depth)
        tag, vr, length, start = self._head(position, limit)
        if tag >> 16 == 0xFFFE:  # noqa: PLR2004  the group of items and delimiters, PS3.5 7.5
            raise InvalidInstanceError("malformed", f"delimiter {tag:08X} outside a sequence")
        if length != UNDEFINED_LENGTH:
            end = start + length
            if end > limit:
                raise InvalidInstanceError("truncated", f"{tag:08X} claims {length} bytes, {limit - start} are left")
            return Element(tag, vr, start, end, end, undefined=False)
        end = self._end_of_undefined(start, limit, depth, tag, vr)
        return Element(tag, vr or "SQ", start, end, end + 8, undefined=True)

    def _plain(self, position: int, limit: int) -> Element | None:
        """Read the commonest element quickly: explicit little endian, a short header; None for all others."""
        if not self._explicit or self._order != "<" or position + 8 > limit:
            return None
        group, number, vr, length = _SHORT_HEAD(self._data, position)
        end = position + 8 + length
        if vr not in SHORT_VRS or end > limit or group == _DELIMITERS or self._count >= self._max:
            return None
        self._count += 1
        return Element(group << 16 | number, _NAMES[vr], position + 8, end, end, False)  # noqa: FBT003  a tuple

    def _count_one(self, depth: int) -> None:
        self._count += 1
        if self.exhausted or depth > MAX_DEPTH:
            raise InvalidInstanceError("malformed", f"more than {self._max} elements or {MAX_DEPTH} levels")

    def _end_of_undefined(self, start: int, limit: int, depth: int, tag: int, vr: str) -> int:
        if tag == _PIXEL_DATA or vr in {"OB", "OW"}:
            return self._end_of_fragments(start, limit)
        return self._end_of_sequence(start, limit, depth, plain=vr == "UN")

    def _end_of_fragments(self, position: int, limit: int) -> int:
        while True:
            self._count_one(0)
            tag, length, body = self._item_head(position, limit)
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM or length == UNDEFINED_LENGTH:
                raise InvalidInstanceError("malformed", f"{tag:08X} among the fragments of pixel data")
            position = body + length

    def _end_of_sequence(self, position: int, limit: int, depth: int, *, plain: bool) -> int:
        # PS3.5 6.2.2: a sequence of unknown VR is encoded in implicit VR, whatever the data set is in.
        explicit, self._explicit = self._explicit, self._explicit and not plain
        try:
            while True:
                self._count_one(depth)
                tag, length, body = self._item_head(position, limit)
                if tag == _SEQUENCE_END:
                    return position
                if tag != _ITEM:
                    raise InvalidInstanceError("malformed", f"{tag:08X} where an item should begin")
                position = self._end_of_item(body, limit, depth + 1) if length == UNDEFINED_LENGTH else body + length
        finally:
            self._explicit = explicit

    def _end_of_item(self, position: int, limit: int, depth: int) -> int:
        while self._peek(position, limit) != _ITEM_END:
            position = self._element(position, limit, depth).next
        return position + 8
