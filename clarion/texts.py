"""The values of elements as text: VRs, character sets (PS3.5 6.1.2), numbers."""

from __future__ import annotations

import functools
import struct

import pydicom.charset

# Values longer than this are not header text that a rule decides by.
MAX_ATTRIBUTE_BYTES = 256
CHARACTER_SET = 0x00080005
PIXEL_GROUP = 0x7FE0
ESCAPE = b"\x1b"
# As pydicom names them; what nearly every data set has.
_COMMON = {b"": "iso8859", b"ISO_IR 100": "latin_1", b"ISO_IR 192": "UTF8"}
ENCODED_TEXT = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
PLAIN_TEXT = frozenset(("AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI", "UR"))
NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}


@functools.lru_cache(4096)
def name_of(tag: int) -> str:
    """Name a tag: `GGGGEEEE`."""
    return f"{tag:08X}"


def decode_text(raw: bytes, encodings: list[str]) -> str:
    """Decode text of a VR that Specific Character Set applies to (PS3.5 6.1.2.3), without padding."""
    # ASCII is what it says in every repertoire but JIS X 0201, unless an escape says otherwise.
    if raw.isascii() and ESCAPE not in raw and "shift_jis" not in encodings:
        return raw.decode("ascii").strip(" \0")
    text = pydicom.charset.decode_bytes(raw, encodings, {0x0A, 0x0D, 0x09, 0x0C, 0x5C}).strip(" \0")
    return text.encode("utf-8", "replace").decode("utf-8")


def encodings_of(raw: bytes) -> list[str]:
    """Give the codecs of Specific Character Set; a term that PS3.3 C.12.1.1.2 does not define counts as absent."""
    if raw.strip(b" \0") in _COMMON:
        return [_COMMON[raw.strip(b" \0")]]
    terms = [one.strip(" ") for one in raw.decode("latin-1").strip(" \0").split("\\")]
    if not all(term in pydicom.charset.python_encoding for term in terms):
        return ["iso8859"]
    return pydicom.charset.convert_encodings(terms)


def decode_value(raw: bytes, vr: str, encodings: list[str], *, big_endian: bool) -> str | None:
    """Decode a value of a VR, several joined by a backslash; None for a VR that is not text and no number."""
    if vr in PLAIN_TEXT:
        return raw.decode("latin-1").strip(" \0")
    if vr in ENCODED_TEXT:
        return decode_text(raw, encodings)
    code = NUMBERS.get(vr.split(" ", maxsplit=1)[0])
    if code is None:
        return None
    size = struct.calcsize(code)
    numbers = struct.unpack_from((">" if big_endian else "<") + code * (len(raw) // size), raw)
    return "\\".join(str(number) for number in numbers)
