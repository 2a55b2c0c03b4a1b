"""The result gate's checks of single kinds of object: SEG, RTSTRUCT, SR. Each yields (rule, what is wrong)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from pydicom import Dataset

    from clarion.elements import Element
    from clarion.labels import Labels
    from writers.gate_view import View

    Check = Callable[[View, list[Dataset], Labels | None], Iterator[tuple[str, str]]]

_ROWS, _COLUMNS, _FRAMES, _PIXELS = 0x00280010, 0x00280011, 0x00280008, 0x7FE00010
_SEGMENTS, _PER_FRAME, _SEGMENT_NUMBER = 0x00620002, 0x52009230, 0x00620004
_SEGMENT_ID, _REFERENCED_SEGMENT = 0x0062000A, 0x0062000B
_DERIVATION, _SOURCE_IMAGE, _REFERENCED = 0x00089124, 0x00082112, 0x00081155
_PLANE, _POSITION = 0x00209113, 0x00200032
_ROI_CONTOURS, _CONTOURS, _CONTOUR_DATA = 0x30060039, 0x30060040, 0x30060050
_CONTOUR_IMAGES, _POINTS, _ROIS, _ROI_NAME = 0x30060016, 0x30060046, 0x30060020, 0x30060026
_APPROVAL = 0x300E0002
_CONTENT, _COMPLETION, _NUMERIC, _VALUE = 0x0040A730, 0x0040A491, 0x0040A300, 0x0040A30A
_PLANE_MM = 1e-3
_MIN_POINTS = 3


def _inside(view: View, item: dict[int, Element], *tags: int) -> Element | None:
    """Follow first items down to an element."""
    for tag in tags[:-1]:
        element = item.get(tag)
        nested = view.items_of(element) if element is not None else []
        if not nested:
            return None
        item = nested[0]
    return item.get(tags[-1])


def check_segmentation(view: View, source: list[Dataset], labels: Labels | None) -> Iterator[tuple[str, str]]:
    """Check geometry, frames and voxels of a BINARY segmentation."""
    rows, columns, frames = view.number(_ROWS), view.number(_COLUMNS), view.number(_FRAMES)
    if (rows, columns) != (int(source[0].Rows), int(source[0].Columns)):
        yield "G07", f"{rows} x {columns} pixels; the source has {source[0].Rows} x {source[0].Columns}"
        return
    items = view.items(_PER_FRAME)
    pixels = view.raw(_PIXELS)
    wanted = (frames * rows * columns + 7) // 8
    if frames < 1 or len(items) != frames or len(pixels) not in {wanted, wanted + 1}:
        yield "G08", f"{frames} frames, {len(items)} items, {len(pixels)} bytes of pixels"
        return
    planes, said = _frames(view, items, source)
    yield from said
    bits = np.unpackbits(np.frombuffer(pixels, dtype=np.uint8), count=frames * rows * columns, bitorder="little")
    voxels = bits.reshape(frames, rows, columns)
    if not voxels.any(axis=(1, 2)).all():
        yield "G08", "an empty frame"
    described = [int.from_bytes(view.data[one[_SEGMENT_NUMBER].start :][:2], "little") for one in view.items(_SEGMENTS)]
    if described != list(range(1, len(described) + 1)):
        yield "G09", f"segment numbers {described} are not 1 to n"
    if labels is not None and len(planes) == frames:
        yield from _voxels(planes, voxels, labels)


def _frames(
    view: View, items: list[dict[int, Element]], source: list[Dataset]
) -> tuple[list[tuple[int, str]], list[tuple[str, str]]]:
    """Read each frame's segment and cited slice, and compare its position with that of the slice."""
    positions = {str(ds.SOPInstanceUID): [float(one) for one in ds.ImagePositionPatient] for ds in source
                 if "ImagePositionPatient" in ds}  # fmt: skip
    planes: list[tuple[int, str]] = []
    said: list[tuple[str, str]] = []
    seen: set[tuple[int, str]] = set()
    for item in items:
        number = _inside(view, item, _SEGMENT_ID, _REFERENCED_SEGMENT)
        position = _inside(view, item, _PLANE, _POSITION)
        cited = _inside(view, item, _DERIVATION, _SOURCE_IMAGE, _REFERENCED)
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
    return planes, said[:5]


def _voxels(planes: list[tuple[int, str]], voxels: NDArray[np.uint8], labels: Labels) -> Iterator[tuple[str, str]]:
    """Compare every frame `[row, column]` with the labels of its slice, and the totals, so that no frame is missing."""
    written = [one for one in labels.segments if labels.mask(one).any()]
    slices = {source.sop_instance_uid: index for index, source in enumerate(labels.volume.sources)}
    found = dict.fromkeys(range(1, len(written) + 1), 0)
    for (number, uid), frame in zip(planes, voxels, strict=True):
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


def check_structure_set(view: View, source: list[Dataset], _labels: Labels | None) -> Iterator[tuple[str, str]]:
    """Check contours: closed, in the plane of the slice they cite, named, unapproved."""
    names = [view.text_of(one[_ROI_NAME]) for one in view.items(_ROIS) if _ROI_NAME in one]
    if not names or len(set(names)) != len(names):
        yield "G11", "no ROI, or two of one name"
    if view.text(_APPROVAL) != "UNAPPROVED":
        yield "G11", "approval status is not UNAPPROVED"
    planes = {str(ds.SOPInstanceUID): _plane(ds) for ds in source if "ImagePositionPatient" in ds}
    total = 0
    for roi in view.items(_ROI_CONTOURS):
        for contour in view.items_of(roi[_CONTOURS]) if _CONTOURS in roi else []:
            total += 1
            wrong = _contour(view, contour, planes)
            if wrong:
                yield "G11", wrong
                return
    if total == 0:
        yield "G11", "no contour"


def _plane(ds: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosines = np.array([float(one) for one in ds.ImageOrientationPatient])
    return np.cross(cosines[:3], cosines[3:]), np.array([float(one) for one in ds.ImagePositionPatient])


def _contour(
    view: View, contour: dict[int, Element], planes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
) -> str:
    cited = _inside(view, contour, _CONTOUR_IMAGES, _REFERENCED)
    if cited is None or view.text_of(cited) not in planes or _CONTOUR_DATA not in contour:
        return "a contour cites no slice of the source, or has no points"
    texts = view.text_of(contour[_CONTOUR_DATA]).split("\\")
    if any(len(text) > 16 for text in texts):  # noqa: PLR2004  the length of VR DS
        return "a number of more than 16 bytes"
    points = np.array([float(text) for text in texts])
    if len(points) % 3 or len(points) // 3 != int(view.text_of(contour[_POINTS])):
        return "the number of points is not what it says"
    points = points.reshape(-1, 3)
    normal, origin = planes[view.text_of(cited)]
    if len(np.unique(points, axis=0)) < _MIN_POINTS or np.abs((points - origin) @ normal).max() > _PLANE_MM:
        return "a contour with fewer than 3 points, or out of the plane of its slice"
    return ""


def check_report(view: View, _source: list[Dataset], _labels: Labels | None) -> Iterator[tuple[str, str]]:
    """Check that a report is complete, has content, and finite numbers."""
    if view.text(_COMPLETION) != "COMPLETE":
        yield "G13", "completion flag is not COMPLETE"
    if not view.items(_CONTENT):
        yield "G13", "no content"
    numbers = [view.text_of(one) for one in view.everywhere(_VALUE)]
    if not numbers:
        yield "G13", "no measurement"
    for text in numbers:
        try:
            finite = bool(np.isfinite(float(text)))
        except ValueError:
            finite = False
        if not finite:
            yield "G13", f"a numeric value {text[:16]!r}"


CHECKS: dict[str, tuple[Check, ...]] = {
    "SEG": (check_segmentation,),
    "RTSTRUCT": (check_structure_set,),
    "SR": (check_report,),
}
