"""The result gate's checks of a BINARY segmentation: geometry, frames, segments, voxels. Yields (rule, what)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from writers.gate_view import is_placed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from pydicom import Dataset

    from clarion.labels import Labels
    from writers.gate_view import Expected, Item, View

_ROWS, _COLUMNS, _FRAMES, _PIXELS = 0x00280010, 0x00280011, 0x00280008, 0x7FE00010
_SEGMENTS, _PER_FRAME, _SEGMENT_NUMBER, _TYPE = 0x00620002, 0x52009230, 0x00620004, 0x00620001
_SEGMENT_ID, _REFERENCED_SEGMENT = 0x0062000A, 0x0062000B
_TRACKING_UID, _LABEL = 0x00620021, 0x00620005
_DERIVATION, _SOURCE_IMAGE, _REFERENCED = 0x00089124, 0x00082112, 0x00081155
_PLANE, _POSITION = 0x00209113, 0x00200032
_SHARED, _ORIENTATIONS, _ORIENTATION, _MEASURES, _SPACING = 0x52009229, 0x00209116, 0x00200037, 0x00289110, 0x00280030
_PLANE_MM, _COSINE, _SPACING_PART = 1e-3, 1e-4, 1e-4
_MOST_SAID = 5


def check_segmentation(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    """Check geometry, frames and voxels of a BINARY segmentation."""
    source, labels = expected.source, expected.labels
    rows, columns, frames = view.number(_ROWS), view.number(_COLUMNS), view.number(_FRAMES)
    if (rows, columns) != (int(source[0].Rows), int(source[0].Columns)):
        yield "G07", f"{rows} x {columns} pixels; the source has {source[0].Rows} x {source[0].Columns}"
        return
    if view.text(_TYPE) != "BINARY":
        yield "G08", f"segmentation type {view.text(_TYPE)[:16]!r}; BINARY is what this version writes"
        return
    items, pixels = view.items(_PER_FRAME), view.raw(_PIXELS)
    wanted = (frames * rows * columns + 7) // 8
    if frames < 1 or len(items) != frames or len(pixels) not in {wanted, wanted + 1}:
        yield "G08", f"{frames} frames, {len(items)} items, {len(pixels)} bytes of pixels"
        return
    yield from _grid(view, source[0])
    planes, said = _frames(view, items, source)
    yield from said
    packed = np.frombuffer(pixels, dtype=np.uint8)
    yield from _segments(view, expected)
    if any(not _frame(packed, index, (rows, columns)).any() for index in range(frames)):
        yield "G08", "an empty frame"
    elif labels is not None and len(planes) == frames:
        yield from _voxels(planes, packed, labels)


def _frame(packed: NDArray[np.uint8], index: int, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Unpack one frame `[row, column]`; frames follow each other bit by bit (PS3.5 8.1.1)."""
    size = shape[0] * shape[1]
    start = index * size
    span = packed[start // 8 : (start + size + 7) // 8]
    return np.unpackbits(span, bitorder="little")[start % 8 : start % 8 + size].reshape(shape)


def _grid(view: View, first: Dataset) -> Iterator[tuple[str, str]]:
    """Compare the orientation and the pixel spacing that all frames share with those of the source."""
    shared = view.items(_SHARED)[:1]
    for name, tags, wanted, tolerance in (
        ("orientation", (_ORIENTATIONS, _ORIENTATION), first.get("ImageOrientationPatient"), _COSINE),
        ("pixel spacing", (_MEASURES, _SPACING), first.get("PixelSpacing"), _SPACING_PART),
    ):
        text = view.text_in(shared[0], *tags) if shared else ""
        found = [float(one) for one in text.split("\\")] if text else []
        there = [float(one) for one in wanted or ()]
        if len(found) != len(there) or not np.allclose(found, there, rtol=0, atol=tolerance):
            yield "G07", f"the {name} is not that of the source"


def _segments(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    """Check that segments are numbered 1 to n and are those of the labels, tracked as every result tracks them."""
    items = view.items(_SEGMENTS)
    numbers = [int.from_bytes(view.data[one[_SEGMENT_NUMBER].start :][:2], "little") for one in items]
    if numbers != list(range(1, len(numbers) + 1)):
        yield "G09", f"segment numbers {numbers} are not 1 to n"
    if expected.labels is None:
        return
    written = expected.labels.written()
    if [view.name_in(one, _LABEL) for one in items] != [one.name for one in written]:
        yield "G09", "the segments are not those of the labels"
    if [view.text_in(one, _TRACKING_UID) for one in items] != [expected.job.tracking_uid(one) for one in written]:
        yield "G09", "a tracking UID is not derived from the job"


def _frames(
    view: View, items: list[Item], source: list[Dataset]
) -> tuple[list[tuple[int, str]], list[tuple[str, str]]]:
    """Read each frame's segment and cited slice, and compare its position with that of the slice."""
    positions = {str(ds.SOPInstanceUID): [float(one) for one in ds.ImagePositionPatient] for ds in source
                 if is_placed(ds)}  # fmt: skip
    planes: list[tuple[int, str]] = []
    said: list[tuple[str, str]] = []
    seen: set[tuple[int, str]] = set()
    for item in items:
        number = view.inside(item, _SEGMENT_ID, _REFERENCED_SEGMENT)
        position = view.inside(item, _PLANE, _POSITION)
        cited = view.inside(item, _DERIVATION, _SOURCE_IMAGE, _REFERENCED)
        if number is None or position is None or cited is None:
            return planes, [("G06", "a frame without segment, position or source image")]
        segment = int.from_bytes(view.data[number.start : number.start + 2], "little")
        uid = view.text_of(cited)
        here = [float(one) for one in view.text_of(position).split("\\")]
        there = positions.get(uid)
        if there is None or max(abs(a - b) for a, b in zip(here, there, strict=True)) > _PLANE_MM:
            said.append(("G07", f"a frame does not lie where its source {uid} lies"))
        if (segment, uid) in seen:
            said.append(("G08", f"segment {segment} has two frames on {uid}"))
        seen.add((segment, uid))
        planes.append((segment, uid))
    return planes, said[:_MOST_SAID]


def _voxels(planes: list[tuple[int, str]], packed: NDArray[np.uint8], labels: Labels) -> Iterator[tuple[str, str]]:
    """Compare every frame `[row, column]` with the labels of its slice, and the totals, so that no frame is missing."""
    written = labels.written()
    slices = {source.sop_instance_uid: index for index, source in enumerate(labels.volume.sources)}
    found = dict.fromkeys(range(1, len(written) + 1), 0)
    shape = labels.volume.geometry.rows, labels.volume.geometry.columns
    for index, (number, uid) in enumerate(planes):
        frame = _frame(packed, index, shape)
        if number not in found or uid not in slices:
            yield "G10", f"a frame of segment {number} on a slice that has no labels"
            return
        bit = 1 << (written[number - 1].number - 1)
        if not np.array_equal(frame != 0, labels.volume.array[slices[uid]] & bit != 0):
            yield "G10", f"segment {number} differs from the labels on {uid}"
            return
        found[number] += int(np.count_nonzero(frame))
    expected = [int(np.count_nonzero(labels.mask(one))) for one in written]
    if list(found.values()) != expected:
        yield "G10", f"voxels per segment {list(found.values())}; the labels have {expected}"
