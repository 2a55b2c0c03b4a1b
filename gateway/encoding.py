"""Encode small data sets: what a query or a commitment request says (PS3.5 7.1), little endian, without a library."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from clarion.elements import IMPLICIT_LE

if TYPE_CHECKING:
    from collections.abc import Sequence

_ITEM = 0xFFFEE000


def encode(elements: Sequence[tuple[int, str, object]], transfer_syntax_uid: str) -> bytes:
    """Encode elements (tag, VR, value) in ascending order; a value of VR SQ is a sequence of such lists."""
    return b"".join(_element(*one, implicit=transfer_syntax_uid == IMPLICIT_LE) for one in elements)


def _element(tag: int, vr: str, value: object, *, implicit: bool) -> bytes:
    raw = _sequence(value, implicit=implicit) if vr == "SQ" else _text(str(value), vr)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack("<I", len(raw)) + raw
    if vr == "SQ":
        return head + b"SQ" + struct.pack("<HI", 0, len(raw)) + raw
    return head + vr.encode() + struct.pack("<H", len(raw)) + raw


def _sequence(items: object, *, implicit: bool) -> bytes:
    encoded = [b"".join(_element(*one, implicit=implicit) for one in item) for item in items]  # type: ignore[attr-defined]  # lists of elements
    return b"".join(struct.pack("<HHI", _ITEM >> 16, _ITEM & 0xFFFF, len(one)) + one for one in encoded)


def _text(value: str, vr: str) -> bytes:
    if vr == "US":
        return struct.pack("<H", int(value))
    raw = value.encode("ascii", "replace")
    return raw + (b"" if len(raw) % 2 == 0 else b"\0" if vr == "UI" else b" ")
