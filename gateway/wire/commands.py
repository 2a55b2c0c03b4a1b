"""DIMSE command sets (PS3.7 6.3, E.1): always implicit VR little endian, read and made without a library."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from gateway.wire.pdu import INVALID_PARAMETER, PduError, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

C_STORE_RQ, C_FIND_RQ, C_ECHO_RQ, N_EVENT_REPORT_RQ, N_ACTION_RQ, C_CANCEL_RQ = (
    0x0001, 0x0020, 0x0030, 0x0100, 0x0130, 0x0FFF,
)  # fmt: skip
RESPONSE = 0x8000
"""Set in the command field of a response."""
NO_DATA_SET, WITH_DATA_SET = 0x0101, 0x0000
MEDIUM = 0x0000

AFFECTED_CLASS, REQUESTED_CLASS, FIELD, MESSAGE_ID, RESPONDED_TO, PRIORITY, DATA_SET_TYPE, STATUS, COMMENT = (
    0x0002, 0x0003, 0x0100, 0x0110, 0x0120, 0x0700, 0x0800, 0x0900, 0x0902,
)  # fmt: skip
AFFECTED_INSTANCE, REQUESTED_INSTANCE, EVENT_TYPE, ACTION_TYPE = 0x1000, 0x1001, 0x1002, 0x1008
"""Element numbers of group 0000."""

MAX_COMMAND_BYTES = 64 * 1024
MAX_COMMENT = 64

_ELEMENT = struct.Struct("<HHI")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
# Layouts that a Reader remembers: of commands as they are, and of so many sizes at a time.
_MOST_ELEMENTS = 32
_MOST_SIZES = 32


class _Place(NamedTuple):
    """An element of a command set, and where its value lies."""

    group: int
    number: int
    begin: int
    end: int


def parse(data: bytes) -> dict[int, bytes]:
    """Read a command set: element number to value, as it came. Elements of other groups are passed over.

    Raises PduError where the elements do not end with the bytes, or the command field is missing.
    """
    return _values(data, _walk(data))


def _walk(data: bytes) -> list[_Place]:
    places: list[_Place] = []
    position, size = 0, len(data)
    while position + _ELEMENT.size <= size:
        group, number, length = _ELEMENT.unpack_from(data, position)
        begin = position + _ELEMENT.size
        position = begin + length
        places.append(_Place(group, number, begin, position))
    if position != size:
        raise PduError(INVALID_PARAMETER, "a command set that cannot be read")
    return places


def _values(data: bytes, places: list[_Place]) -> dict[int, bytes]:
    found = {number: data[begin:end] for group, number, begin, end in places if group == 0}
    if len(found.get(FIELD, b"")) != _U16.size:
        raise PduError(INVALID_PARAMETER, "a command set without a command field")
    return found


class Reader:
    """Reads the command sets of one association; one whose headers are those of one before is not walked again."""

    def __init__(self) -> None:
        # By size: how to take the headers out, what they are, and where the values lie.
        self._known: dict[int, tuple[struct.Struct, tuple[bytes, ...], list[_Place]]] = {}

    def parse(self, data: bytes) -> dict[int, bytes]:
        """Read a command set: what `parse` gives, and raises."""
        known = self._known.get(len(data))
        if known is not None and known[0].unpack(data) == known[1]:
            return _values(data, known[2])
        places = _walk(data)
        found = _values(data, places)
        if len(places) <= _MOST_ELEMENTS:
            if len(self._known) >= _MOST_SIZES:
                self._known.clear()
            headers = struct.Struct("".join(f"{_ELEMENT.size}s{one.end - one.begin}x" for one in places))
            self._known[len(data)] = headers, headers.unpack(data), places
        return found


def number(command: Mapping[int, bytes], element: int) -> int | None:
    """Give an unsigned 16-bit value; None when it is absent or of another length."""
    value = command.get(element, b"")
    return int(_U16.unpack(value)[0]) if len(value) == _U16.size else None


def uid(command: Mapping[int, bytes], element: int) -> str:
    """Give a UID without its padding; empty when it is absent. What cannot be printed becomes a question mark."""
    return plain(command.get(element, b""))


def make(elements: Iterable[tuple[int, bytes]]) -> bytes:
    """Make a command set of elements in ascending order, their group length in front."""
    body = b"".join(_ELEMENT.pack(0, number, len(value)) + value for number, value in elements)
    return _ELEMENT.pack(0, 0, 4) + _U32.pack(len(body)) + body


def u16(value: int) -> bytes:
    """Encode an unsigned 16-bit value."""
    return _U16.pack(value)


def ui(text: str) -> bytes:
    """Encode a UID, padded to even length."""
    raw = text.encode("ascii", "replace")
    return raw + b"\0" * (len(raw) % 2)


def lo(text: str) -> bytes:
    """Encode an Error Comment of at most 64 characters, padded to even length."""
    raw = text.encode("ascii", "replace")[:MAX_COMMENT]
    return raw + b" " * (len(raw) % 2)


def respond(request: Mapping[int, bytes], status: int, comment: str = "") -> bytes:
    """Make the response to a request; the UIDs go back as they came, padding included."""
    field = (number(request, FIELD) or 0) | RESPONSE
    sop_class = request.get(AFFECTED_CLASS) or request.get(REQUESTED_CLASS)
    instance = request.get(AFFECTED_INSTANCE) or request.get(REQUESTED_INSTANCE)
    elements = [(AFFECTED_CLASS, sop_class)] if sop_class else []
    elements += [
        (FIELD, _U16.pack(field)),
        (RESPONDED_TO, request[MESSAGE_ID]),
        (DATA_SET_TYPE, _U16.pack(NO_DATA_SET)),
        (STATUS, _U16.pack(status)),
    ]
    elements += [(COMMENT, lo(comment))] if comment else []
    elements += [(AFFECTED_INSTANCE, instance)] if instance else []
    elements += [(one, request[one]) for one in (EVENT_TYPE, ACTION_TYPE) if one in request]
    return make((one, _even(value)) for one, value in elements)


_STORED_HEAD = _ELEMENT.pack(0, FIELD, 2) + _U16.pack(C_STORE_RQ | RESPONSE) + _ELEMENT.pack(0, RESPONDED_TO, 2)
_STORED_TAIL = (
    _ELEMENT.pack(0, DATA_SET_TYPE, 2) + _U16.pack(NO_DATA_SET) + _ELEMENT.pack(0, STATUS, 2) + _U16.pack(0)
)  # fmt: skip


def stored(request: Mapping[int, bytes]) -> bytes:
    """Make the C-STORE-RSP of a success: what `respond` makes, from a template."""
    sop_class, instance = _even(request[AFFECTED_CLASS]), _even(request[AFFECTED_INSTANCE])
    body = b"".join((
        _ELEMENT.pack(0, AFFECTED_CLASS, len(sop_class)), sop_class, _STORED_HEAD, request[MESSAGE_ID], _STORED_TAIL,
        _ELEMENT.pack(0, AFFECTED_INSTANCE, len(instance)), instance,
    ))  # fmt: skip
    return _ELEMENT.pack(0, 0, 4) + _U32.pack(len(body)) + body


def _even(value: bytes) -> bytes:
    return value + b"\0" * (len(value) % 2)
