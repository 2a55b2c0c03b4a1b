"""The commonest elements, explicit VR little endian and short, read fast.

Half of what the grouping owner did was reading headers. Instances of a series say mostly the same: an element that was
read lately is known by its bytes, and what stands between two elements that change is known as one.
"""

from __future__ import annotations

import struct

from clarion.texts import (
    CHARACTER_SET,
    ENCODED_TEXT,
    ESCAPE,
    MAX_ATTRIBUTE_BYTES,
    NUMBERS,
    PIXEL_GROUP,
    PLAIN_TEXT,
    decode_value,
    name_of,
)

_SHORT_HEAD = struct.Struct("<HH2sH").unpack_from
_SHORT_LENGTH = struct.Struct("<H").unpack_from
_SHORT_HEAD_BYTES = 8
_QUICK = (PLAIN_TEXT | ENCODED_TEXT) - {"UC", "UT", "UR"}
# Elements that were read lately, by their bytes: tag and text.
_KNOWN: dict[bytes, tuple[str, str]] = {}
_MOST_KNOWN = 4096
# Elements that followed each other, by the bytes of the first: all of their bytes, and what they say. There are several
# of one beginning, for series that come side by side.
_RUNS: dict[bytes, list[tuple[bytes, dict[str, str]]]] = {}
_MOST_BEGINNINGS, _SIDE_BY_SIDE, _LONGEST_RUN = 256, 16, 4096


def read_known(data: bytes, position: int, attributes: dict[str, str]) -> int:
    """Read elements from a position on, as far as they are of the commonest kind; give how far."""
    end = len(data) - _SHORT_HEAD_BYTES
    run = _Run()
    while position <= end:
        after = position + _SHORT_HEAD_BYTES + _SHORT_LENGTH(data, position + 6)[0]
        element = data[position:after]
        followed = _followed(data, position, element)
        if followed is not None:
            run.end(data, position)
            attributes.update(followed[1])
            position += len(followed[0])
            continue
        known = _KNOWN.get(element)
        if known is None:
            run.end(data, position)
            known = _quick(element) if after <= len(data) else None
            if known is None:
                return position
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[element] = known
        else:
            run.add(position, element, known)
        attributes[known[0]] = known[1]
        position = after
    run.end(data, position)
    return position


def _followed(data: bytes, position: int, element: bytes) -> tuple[bytes, dict[str, str]] | None:
    """Give the run that begins with an element and stands here, if one is known."""
    for run in _RUNS.get(element, ()):
        if data.startswith(run[0], position):
            return run
    return None


class _Run:
    """Known elements that follow each other, while they are read one by one: from now on they are known as one."""

    __slots__ = ("_begin", "_first", "_said")

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def add(self, position: int, element: bytes, known: tuple[str, str]) -> None:
        """Note the next element."""
        if not self._said:
            self._begin, self._first = position, element
        self._said[known[0]] = known[1]

    def end(self, data: bytes, position: int) -> None:
        """Something else stands here."""
        if len(self._said) > 1 and position - self._begin <= _LONGEST_RUN:
            if len(_RUNS) >= _MOST_BEGINNINGS:
                _RUNS.clear()
            runs = _RUNS.setdefault(self._first, [])
            runs.insert(0, (data[self._begin : position], self._said))
            del runs[_SIDE_BY_SIDE:]
        if self._said:
            self._said = {}


def _quick(element: bytes) -> tuple[str, str] | None:
    """Read a whole element, explicit VR little endian with a short head; None for what needs more care."""
    group, number, raw_vr, length = _SHORT_HEAD(element)
    vr, raw = raw_vr.decode("latin-1"), element[_SHORT_HEAD_BYTES:]
    tag = group << 16 | number
    if group & 1 or group >= PIXEL_GROUP or length > MAX_ATTRIBUTE_BYTES or tag == CHARACTER_SET:
        return None
    if vr in NUMBERS:
        return name_of(tag), decode_value(raw, vr, [], big_endian=False) or ""
    # What ASCII says, it says in every repertoire but JIS X 0201, and that is asked for by name.
    if vr not in _QUICK or not raw.isascii() or ESCAPE in raw:
        return None
    return name_of(tag), raw.decode("ascii").strip(" \0")
