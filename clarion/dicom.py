"""Read the header of an encoded data set, make a Part 10 file of it, and order a series by true position."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pydicom.charset
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.errors import InvalidDicomError

from clarion.elements import DEFLATED_LE, EXPLICIT_BE, IMPLICIT_LE, Walker, inflate
from clarion.errors import InvalidInstanceError, UnreadableSeriesError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom import Dataset

    from clarion.elements import Element

IMPLEMENTATION_CLASS_UID = "2.25.140943583029246063281230612302063497671"
IMPLEMENTATION_VERSION_NAME = "CLARION_0_1"

# Values longer than this are not header text that a rule decides by.
MAX_ATTRIBUTE_BYTES = 256
_PIXEL_GROUP = 0x7FE0
_LONGEST_UID = 130
_ESCAPE = b"\x1b"
_CHARACTER_SET = 0x00080005
# As pydicom names them; what nearly every data set has.
_COMMON = {b"": "iso8859", b"ISO_IR 100": "latin_1", b"ISO_IR 192": "UTF8"}
_ENCODED_TEXT = frozenset(("LO", "LT", "PN", "SH", "ST", "UC", "UT"))
_PLAIN_TEXT = frozenset(("AE", "AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI", "UR"))
_SHORT_HEAD = struct.Struct("<HH2sH").unpack_from
_SHORT_LENGTH = struct.Struct("<H").unpack_from
_SHORT_HEAD_BYTES = 8
_QUICK = (_PLAIN_TEXT | _ENCODED_TEXT) - {"UC", "UT", "UR"}
# Elements that were read lately, by their bytes: tag and text.
_KNOWN: dict[bytes, tuple[str, str]] = {}
_MOST_KNOWN = 4096
_OTHER_ENCODINGS = frozenset((IMPLICIT_LE, EXPLICIT_BE))
_NUMBERS = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}

_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The identifying UIDs of a data set; one that is absent or empty is an empty text."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    fault: InvalidInstanceError | None


def plain_encoding(data: bytes, transfer_syntax_uid: str) -> bytes:
    """Give the data set as a Walker reads it: inflated if it is deflated."""
    return inflate(data) if transfer_syntax_uid == DEFLATED_LE else data


def read_header(data: bytes, transfer_syntax_uid: str) -> Header:
    """Read the identifying UIDs and walk to the last byte; `fault` says why the data set is not whole, if it is not."""
    found = dict.fromkeys((_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES), "")
    fault: InvalidInstanceError | None = None
    try:
        walker = Walker(plain_encoding(data, transfer_syntax_uid), transfer_syntax_uid)
        for element in walker.elements():
            if element.tag in found:
                # Whoever claims a UID of megabytes gets what is no UID.
                found[element.tag] = walker.text(element._replace(end=min(element.end, element.start + _LONGEST_UID)))
    except InvalidInstanceError as error:
        fault = error
    return Header(
        sop_class_uid=found[_SOP_CLASS],
        sop_instance_uid=found[_SOP_INSTANCE],
        study_uid=found[_STUDY],
        series_uid=found[_SERIES],
        fault=fault,
    )


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
            position = _read_plain(data, position, attributes)
            if position >= size:
                break
        element = walker.element_at(position)
        position = element.next
        if element.tag >> 16 >= _PIXEL_GROUP:
            break
        if element.tag >> 16 & 1 or element.undefined or element.end - element.start > MAX_ATTRIBUTE_BYTES:
            continue
        if element.end > len(data):
            raise struct.error
        raw = data[element.start : element.end]
        if element.tag == _CHARACTER_SET:
            encodings = encodings_of(raw)
            quick = quick and "shift_jis" not in encodings
        text = _decode(raw, _vr_of(element), encodings, big_endian=transfer_syntax_uid == EXPLICIT_BE)
        if text is not None:
            attributes[_name_of(element.tag)] = text


def _read_plain(data: bytes, position: int, attributes: dict[str, str]) -> int:
    """Read the commonest elements, explicit VR little endian and short, as far as they go; give how far.

    Half of what the grouping owner did was this. Instances of a series say mostly the same: what was read once is
    known by its bytes.
    """
    end = len(data) - _SHORT_HEAD_BYTES
    while position <= end:
        after = position + _SHORT_HEAD_BYTES + _SHORT_LENGTH(data, position + 6)[0]
        element = data[position:after]
        known = _KNOWN.get(element)
        if known is None:
            known = _quick(element) if after <= len(data) else None
            if known is None:
                break
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[element] = known
        attributes[known[0]] = known[1]
        position = after
    return position


def _quick(element: bytes) -> tuple[str, str] | None:
    """Read a whole element, explicit VR little endian with a short head; None for what needs more care."""
    group, number, raw_vr, length = _SHORT_HEAD(element)
    vr, raw = raw_vr.decode("latin-1"), element[_SHORT_HEAD_BYTES:]
    tag = group << 16 | number
    if group & 1 or group >= _PIXEL_GROUP or length > MAX_ATTRIBUTE_BYTES or tag == _CHARACTER_SET:
        return None
    if vr in _NUMBERS:
        return _name_of(tag), _decode(raw, vr, [], big_endian=False) or ""
    # What ASCII says, it says in every repertoire but JIS X 0201, and that is asked for by name.
    if vr not in _QUICK or not raw.isascii() or _ESCAPE in raw:
        return None
    return _name_of(tag), raw.decode("ascii").strip(" \0")


@functools.lru_cache(4096)
def _name_of(tag: int) -> str:
    return f"{tag:08X}"


def decode_text(raw: bytes, encodings: list[str]) -> str:
    """Decode text of a VR that Specific Character Set applies to (PS3.5 6.1.2.3), without padding."""
    # ASCII is what it says in every repertoire but JIS X 0201, unless an escape says otherwise.
    if raw.isascii() and _ESCAPE not in raw and "shift_jis" not in encodings:
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


def _vr_of(element: Element) -> str:
    if element.vr and element.vr != "UN":
        return element.vr
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return "UN"


def _decode(raw: bytes, vr: str, encodings: list[str], *, big_endian: bool) -> str | None:
    if vr in _PLAIN_TEXT:
        return raw.decode("latin-1").strip(" \0")
    if vr in _ENCODED_TEXT:
        return decode_text(raw, encodings)
    code = _NUMBERS.get(vr.split(" ", maxsplit=1)[0])
    if code is None:
        return None
    size = struct.calcsize(code)
    numbers = struct.unpack_from((">" if big_endian else "<") + code * (len(raw) // size), raw)
    return "\\".join(str(number) for number in numbers)


def part10(data: bytes, *, sop_class_uid: str, sop_instance_uid: str, transfer_syntax_uid: str) -> bytes:
    """Put preamble and file meta information (PS3.10 7.1) before a data set; the preamble is zero."""
    version = struct.pack("<HH2sHI", 2, 1, b"OB", 0, 2) + b"\x00\x01"
    meta = version + b"".join(
        _meta_element(number, vr, text)
        for number, vr, text in (
            (0x0002, b"UI", sop_class_uid),
            (0x0003, b"UI", sop_instance_uid),
            (0x0010, b"UI", transfer_syntax_uid),
            (0x0012, b"UI", IMPLEMENTATION_CLASS_UID),
            (0x0013, b"SH", IMPLEMENTATION_VERSION_NAME),
        )
    )
    return bytes(128) + b"DICM" + struct.pack("<HH2sHI", 2, 0, b"UL", 4, len(meta)) + meta + data


def _meta_element(number: int, vr: bytes, text: str) -> bytes:
    value = text.encode("ascii", "replace")
    value += b"" if len(value) % 2 == 0 else (b"\0" if vr == b"UI" else b" ")
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value


def split_part10(data: bytes) -> tuple[bytes, str]:
    """Cut preamble and file meta information off a Part 10 file; give the data set and its transfer syntax."""
    meta, end = read_file_meta(data)
    syntax = meta.get(0x00020010, "")
    if not syntax:
        raise InvalidInstanceError("malformed", "the file meta information names no transfer syntax")
    return data[end:], syntax


def read_file_meta(data: bytes) -> tuple[dict[int, str], int]:
    """Read the file meta information (PS3.10 7.1): Latin-1 text by tag, and the position of the data set."""
    if data[128:132] != b"DICM":
        raise InvalidInstanceError("not-dicom", "the file has no DICM at byte 128")
    position, meta = 132, {}
    while data[position : position + 2] == b"\x02\x00":
        long = data[position + 4 : position + 6] in {b"OB", b"UN", b"OW", b"SQ", b"UT"}
        head = 12 if long else 8
        if position + head > len(data):
            raise InvalidInstanceError("truncated", "the file meta information is cut")
        length = struct.unpack_from("<I" if long else "<H", data, position + head - (4 if long else 2))[0]
        tag = 0x00020000 | int(struct.unpack_from("<H", data, position + 2)[0])
        meta[tag] = data[position + head : position + head + length].decode("latin-1").strip(" \0")
        position += head + length
    return meta, position


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordering:
    """A series in spatial order: `order[k]` is the index of slice k, `positions_mm` is `[slice, xyz]` in that order."""

    order: tuple[int, ...]
    positions_mm: NDArray[np.float64]
    row_cosines: NDArray[np.float64]
    column_cosines: NDArray[np.float64]


# Cosines may be off by this much; more is not an orientation. PS3.3 C.7.6.2.1.1 wants them exact.
COSINE_TOLERANCE = 1e-3
# Two slices closer than this are at one position.
SAME_POSITION_MM = 0.01


def order_series(slices: Sequence[Dataset]) -> Ordering:
    """Order slices along the normal of Image Orientation (Patient), whatever their numbers and names say.

    Raises UnreadableSeriesError: `no-position`, `mixed-orientation`, `bad-orientation` or `duplicate-position`.
    """
    orientation = [_floats(ds, "ImageOrientationPatient", 6) for ds in slices]
    positions = np.array([_floats(ds, "ImagePositionPatient", 3) for ds in slices], dtype=np.float64)
    first = np.array(orientation[0], dtype=np.float64)
    if np.abs(np.array(orientation) - first).max() > COSINE_TOLERANCE:
        raise UnreadableSeriesError("mixed-orientation", "the slices do not share one orientation")
    rows, columns = first[:3], first[3:]
    lengths = np.array([np.linalg.norm(rows), np.linalg.norm(columns)])
    if np.abs(lengths - 1).max() > COSINE_TOLERANCE or abs(float(rows @ columns)) > COSINE_TOLERANCE:
        raise UnreadableSeriesError("bad-orientation", "the direction cosines are not unit and orthogonal")
    rows, columns = rows / lengths[0], columns / lengths[1]
    depths = positions @ np.cross(rows, columns)
    order = np.argsort(depths, kind="stable")
    if len(order) > 1 and float(np.diff(depths[order]).min()) < SAME_POSITION_MM:
        raise UnreadableSeriesError("duplicate-position", "two slices lie at one position")
    return Ordering(
        order=tuple(int(index) for index in order),
        positions_mm=positions[order],
        row_cosines=rows,
        column_cosines=columns,
    )


def _floats(ds: Dataset, keyword: str, count: int) -> list[float]:
    value = ds.get(keyword)
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        raise UnreadableSeriesError("no-position", f"a slice has no usable {keyword}")
    numbers = [float(one) for one in value]
    if not np.isfinite(numbers).all():
        raise UnreadableSeriesError("no-position", f"{keyword} is not finite")
    return numbers


def read_headers(folder: Path) -> list[tuple[Path, Dataset]]:
    """Read every Part 10 file below a folder without its pixels, in the order of the paths.

    Raises UnreadableSeriesError naming the file that is not DICOM.
    """
    found: list[tuple[Path, Dataset]] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            try:
                found.append((path, dcmread(path, stop_before_pixels=True)))
            except (InvalidDicomError, OSError, ValueError) as error:
                raise UnreadableSeriesError("unreadable-instance", f"{path.name}: {error}") from error
    return found
