"""Read the header of an encoded data set, make a Part 10 file of it, and order a series by true position."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from clarion.elements import Walker, plain_encoding
from clarion.errors import InvalidInstanceError, UnreadableSeriesError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom import Dataset

IMPLEMENTATION_CLASS_UID = "2.25.140943583029246063281230612302063497671"
IMPLEMENTATION_VERSION_NAME = "CLARION_0_1"

_LONGEST_UID = 130

_SOP_CLASS, _SOP_INSTANCE, _STUDY, _SERIES = 0x00080016, 0x00080018, 0x0020000D, 0x0020000E


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The identifying UIDs of a data set; one that is absent or empty is an empty text."""

    sop_class_uid: str
    sop_instance_uid: str
    study_uid: str
    series_uid: str
    fault: InvalidInstanceError | None


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
