"""The header of a data set as rules see it: tag to text."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from pydicom.datadict import dictionary_VR

from clarion.elements import DEFLATED_LE, EXPLICIT_BE, IMPLICIT_LE, Walker, plain_encoding
from clarion.errors import InvalidInstanceError
from clarion.known import read_known
from clarion.texts import CHARACTER_SET, MAX_ATTRIBUTE_BYTES, PIXEL_GROUP, decode_value, encodings_of, name_of

if TYPE_CHECKING:
    from clarion.elements import Element

_PIXELS = PIXEL_GROUP.to_bytes(2, "little")
_OTHER_ENCODINGS = frozenset((IMPLICIT_LE, EXPLICIT_BE))


def read_attributes(data: bytes, transfer_syntax_uid: str) -> dict[str, str]:
    """Read the header for a rule: `GGGGEEEE` to decoded text, up to the pixels, as far as the bytes are sound.

    Left out: sequences, bulk data, private elements and values above MAX_ATTRIBUTE_BYTES.
    """
    attributes: dict[str, str] = {}
    try:
        plain = plain_encoding(data, transfer_syntax_uid)
        _read_attributes(plain, len(plain), transfer_syntax_uid, attributes)
    except InvalidInstanceError:
        return attributes
    return attributes


def read_head(head: bytes, size: int, transfer_syntax_uid: str) -> dict[str, str] | None:
    """Read what `read_attributes` reads of a data set of `size` bytes from its beginning; None where that ends before.

    Of a deflated data set nothing can be said by its head.
    """
    if len(head) >= size:
        return read_attributes(head, transfer_syntax_uid)
    if transfer_syntax_uid == DEFLATED_LE:
        return None
    attributes: dict[str, str] = {}
    try:
        _read_attributes(head, size, transfer_syntax_uid, attributes)
    except (struct.error, InvalidInstanceError):
        return None
    return attributes


def _read_attributes(data: bytes, size: int, transfer_syntax_uid: str, attributes: dict[str, str]) -> None:
    """Read the attributes of a data set of which `data` is the beginning; raises struct.error where that ends."""
    encodings = ["iso8859"]
    walker = Walker(data, transfer_syntax_uid, size=size)
    quick = transfer_syntax_uid not in _OTHER_ENCODINGS
    position = 0
    while position < size:
        if quick:
            position = read_known(data, position, attributes)
            if position >= size or data.startswith(_PIXELS, position):
                break
        element = walker.element_at(position)
        position = element.next
        if element.tag >> 16 >= PIXEL_GROUP:
            break
        if element.tag >> 16 & 1 or element.undefined or element.end - element.start > MAX_ATTRIBUTE_BYTES:
            continue
        if element.end > len(data):
            raise struct.error
        raw = data[element.start : element.end]
        if element.tag == CHARACTER_SET:
            encodings = encodings_of(raw)
            quick = quick and "shift_jis" not in encodings
        text = decode_value(raw, _vr_of(element), encodings, big_endian=transfer_syntax_uid == EXPLICIT_BE)
        if text is not None:
            attributes[name_of(element.tag)] = text


def _vr_of(element: Element) -> str:
    if element.vr and element.vr != "UN":
        return element.vr
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return "UN"
