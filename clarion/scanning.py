"""Scan a data set once, quickly: the four identifying UIDs, and whether the bytes end where the elements end.

What is odd or long is left to `clarion.dicom.read_header`, which bears more and takes longer: the scan then says that
it did not finish, and nobody waits for the other.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from clarion.elements import (
    DEFLATED_LE,
    EXPLICIT_BE,
    EXPLICIT_LE,
    IMPLICIT_LE,
    LONG_VRS,
    SHORT_VRS,
    UNDEFINED_LENGTH,
    Walker,
)
from clarion.errors import InvalidInstanceError

if TYPE_CHECKING:
    from clarion.elements import Bytes

# An image has about a hundred; what has more is read beside the path that a sender waits on.
MAX_ELEMENTS = 2000

_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E
WANTED = frozenset((_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES))
"""The elements that say what a data set is."""
_IMPLICIT = struct.Struct("<HHI").unpack_from
_EXPLICIT = struct.Struct("<HH2sH").unpack_from
_LENGTH = struct.Struct("<I").unpack_from
_DELIMITERS = 0xFFFE
# So much of a deflated data set is looked at, and so much of what it inflates to.
_HEAD_BYTES = 2**20
_HEAD = 8
# Of a value that is to be a UID so much is kept: more than any UID has.
LONGEST = 130


class Scan(NamedTuple):
    """What a data set says it is; an element that is absent is an empty text. `checked`: walked to the last byte."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    fault: InvalidInstanceError | None
    checked: bool


def scan(data: Bytes, transfer_syntax_uid: str) -> Scan:
    """Scan an encoded data set. Deflated ones, and those with very many elements, are left unchecked."""
    found: dict[int, bytes] = {}
    fault: InvalidInstanceError | None = None
    checked = transfer_syntax_uid != DEFLATED_LE
    try:
        if transfer_syntax_uid == EXPLICIT_BE:
            _walk_big_endian(data, found)
        elif transfer_syntax_uid == IMPLICIT_LE:
            _walk_implicit(data, found)
        elif transfer_syntax_uid == DEFLATED_LE:
            _walk_inflated_head(data, found)
        else:
            _walk_explicit(data, transfer_syntax_uid, found)
    except _TooManyElementsError:
        checked = False
        if len(found) < len(WANTED):
            _find_identity(data, transfer_syntax_uid, found)
    except InvalidInstanceError as error:
        fault = error
    return read_identity(found, fault, checked=checked)


def read_identity(found: dict[int, bytes], fault: InvalidInstanceError | None = None, *, checked: bool = True) -> Scan:
    """Give what the values of the wanted elements say."""
    return Scan(
        sop_class_uid=_text(found, _SOP_CLASS),
        sop_instance_uid=_text(found, _SOP_INSTANCE),
        study_uid=_text(found, _STUDY),
        series_uid=_text(found, _SERIES),
        fault=fault,
        checked=checked,
    )


def _find_identity(data: Bytes, transfer_syntax_uid: str, found: dict[int, bytes]) -> None:
    """Walk on to the UIDs, past what has so many elements: a long list of references, mostly."""
    with contextlib.suppress(InvalidInstanceError):
        for element in Walker(data, transfer_syntax_uid).elements():
            if element.tag > _SERIES:
                return
            if element.tag in WANTED:
                _keep(found, element.tag, data, element.start, element.end)


class _TooManyElementsError(Exception):
    """The budget is used up."""


class _Budgeted(Walker):
    """A walker that ends differently when its budget is used up."""

    def end_of(self, position: int, tag: int, vr: str) -> int:
        """Give the end of a value of undefined length, its delimiter included."""
        try:
            return self.end_of_undefined(position, tag, vr) + _HEAD
        except InvalidInstanceError:
            if self.exhausted:
                raise _TooManyElementsError from None
            raise


def _text(found: dict[int, bytes], tag: int) -> str:
    return found.get(tag, b"").decode("latin-1").strip(" \0")


def _keep(found: dict[int, bytes], tag: int, data: Bytes, start: int, end: int) -> None:
    """Keep a value that is wanted; of one that claims to be long, the beginning."""
    found[tag] = bytes(data[start : min(end, start + LONGEST)])


def _walk_explicit(data: Bytes, syntax: str, found: dict[int, bytes]) -> None:
    position, size, left = 0, len(data), MAX_ELEMENTS
    walker = _Budgeted(data, syntax, MAX_ELEMENTS)
    while position < size:
        left -= 1
        if left < 0:
            raise _TooManyElementsError
        if position + _HEAD > size:
            raise InvalidInstanceError("truncated", f"{size - position} bytes left where an element begins")
        group, number, vr, length = _EXPLICIT(data, position)
        if vr in SHORT_VRS and group != _DELIMITERS:
            start = position + _HEAD
        elif vr in LONG_VRS and group != _DELIMITERS:
            start = position + 12
            if start > size:
                raise InvalidInstanceError("truncated", f"the header of {group:04X}{number:04X} is cut")
            length = _LENGTH(data, start - 4)[0]
        else:
            raise InvalidInstanceError("malformed", f"element {group:04X}{number:04X} has no value representation")
        if length == UNDEFINED_LENGTH and start - position > _HEAD:
            position = walker.end_of(start, group << 16 | number, vr.decode())
            continue
        position = start + length
        if position > size:
            raise _beyond(group, number, length, size - start)
        if (tag := group << 16 | number) in WANTED:
            _keep(found, tag, data, start, position)


def _walk_implicit(data: Bytes, found: dict[int, bytes]) -> None:
    position, size, left = 0, len(data), MAX_ELEMENTS
    walker = _Budgeted(data, IMPLICIT_LE, MAX_ELEMENTS)
    while position < size:
        left -= 1
        if left < 0:
            raise _TooManyElementsError
        if position + _HEAD > size:
            raise InvalidInstanceError("truncated", f"{size - position} bytes left where an element begins")
        group, number, length = _IMPLICIT(data, position)
        start = position + _HEAD
        if group == _DELIMITERS:
            raise InvalidInstanceError("malformed", f"delimiter {group:04X}{number:04X} outside a sequence")
        if length == UNDEFINED_LENGTH:
            position = walker.end_of(start, group << 16 | number, "")
            continue
        position = start + length
        if position > size:
            raise _beyond(group, number, length, size - start)
        if (tag := group << 16 | number) in WANTED:
            _keep(found, tag, data, start, position)


def _walk_big_endian(data: Bytes, found: dict[int, bytes]) -> None:
    walker = Walker(data, EXPLICIT_BE, MAX_ELEMENTS)
    try:
        for element in walker.elements():
            if element.tag in WANTED:
                _keep(found, element.tag, data, element.start, element.end)
    except InvalidInstanceError:
        if walker.exhausted:
            raise _TooManyElementsError from None
        raise


def _walk_inflated_head(data: Bytes, found: dict[int, bytes]) -> None:
    """Find the UIDs in the beginning of a deflated data set; the rest is checked by whoever inflates it all."""
    try:
        head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(memoryview(data)[:_HEAD_BYTES], _HEAD_BYTES)
    except zlib.error as error:
        raise InvalidInstanceError("malformed", "the deflated data set cannot be inflated") from error
    with contextlib.suppress(InvalidInstanceError):
        _walk_explicit(head, EXPLICIT_LE, found)


def _beyond(group: int, number: int, length: int, left: int) -> InvalidInstanceError:
    return InvalidInstanceError("truncated", f"{group:04X}{number:04X} claims {length} bytes, {left} are left")
