"""The result gate's checks of a structure set: contours closed, in plane, and the labels again when filled.

Filling here shares nothing with `writers.contours`: voxel centres are tested by the even-odd rule in patient space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from writers.gate_view import is_placed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from pydicom import Dataset

    from clarion.labels import Labels, Segment
    from clarion.volume import Geometry
    from writers.gate_view import Expected, Item, View

    Rings = dict[str, list[NDArray[np.float64]]]

_ROI_CONTOURS, _CONTOURS, _CONTOUR_DATA, _GEOMETRY = 0x30060039, 0x30060040, 0x30060050, 0x30060042
_CONTOUR_IMAGES, _REFERENCED, _POINTS = 0x30060016, 0x00081155, 0x30060046
_ROIS, _ROI_NAME, _ROI_NUMBER, _REFERENCED_ROI = 0x30060020, 0x30060026, 0x30060022, 0x30060084
_ROI_FRAME, _FRAMES, _FRAME = 0x30060024, 0x30060010, 0x00200052
_APPROVAL = 0x300E0002
_PLANE_MM = 1e-3
_MIN_POINTS = 3
_MAX_NUMBER_BYTES = 16
# Slices per ROI that are filled and compared; all of them would cost as much as writing did.
_COMPARED = 20


def check_structure_set(view: View, expected: Expected) -> Iterator[tuple[str, str]]:
    """Check names, frames of reference and contours; compare filled contours with the labels."""
    rois = {view.text_in(one, _ROI_NUMBER): view.name_in(one, _ROI_NAME) for one in view.items(_ROIS)}
    if not rois or len(set(rois.values())) != len(view.items(_ROIS)):
        yield "G11", "no ROI, or two of one name or number"
    if view.text(_APPROVAL) != "UNAPPROVED":
        yield "G11", "approval status is not UNAPPROVED"
    yield from _frames_of_reference(view)
    planes = {str(ds.SOPInstanceUID): _plane(ds) for ds in expected.source if is_placed(ds)}
    found: dict[str, Rings] = {}
    for roi in view.items(_ROI_CONTOURS):
        rings = found.setdefault(rois.get(view.text_in(roi, _REFERENCED_ROI), ""), {})
        for contour in view.items_of(roi[_CONTOURS]) if _CONTOURS in roi else []:
            wrong = _contour(view, contour, planes, rings)
            if wrong:
                yield "G11", wrong
                return
    if not any(found.values()):
        yield "G11", "no contour"
    elif expected.labels is not None:
        yield from _filled(found, expected.labels)


def _frames_of_reference(view: View) -> Iterator[tuple[str, str]]:
    """Every frame of reference that the object names is its own."""
    named = {view.text_in(one, _ROI_FRAME) for one in view.items(_ROIS)}
    named |= {view.text_in(one, _FRAME) for one in view.items(_FRAMES)}
    if named - {view.text(_FRAME)}:
        yield "G04", "an ROI or a reference names another frame of reference"


def _plane(ds: Dataset) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    cosines = np.array([float(one) for one in ds.ImageOrientationPatient])
    return np.cross(cosines[:3], cosines[3:]), np.array([float(one) for one in ds.ImagePositionPatient])


def _contour(
    view: View, contour: Item, planes: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]], rings: Rings
) -> str:
    """Check one contour and note its points `[point, xyz]` under the slice it cites; gives what is wrong."""
    cited = view.text_in(contour, _CONTOUR_IMAGES, _REFERENCED)
    if cited not in planes or _CONTOUR_DATA not in contour:
        return "a contour cites no slice of the source, or has no points"
    if view.text_in(contour, _GEOMETRY) != "CLOSED_PLANAR":
        return "a contour that is not CLOSED_PLANAR"
    texts = view.text_of(contour[_CONTOUR_DATA]).split("\\")
    if any(len(text) > _MAX_NUMBER_BYTES for text in texts):
        return "a number of more than 16 bytes"
    points = np.array(texts, dtype=np.float64)
    if len(points) % 3 or len(points) // 3 != int(view.text_of(contour[_POINTS])):
        return "the number of points is not what it says"
    points = points.reshape(-1, 3)
    normal, origin = planes[cited]
    if len(np.unique(points, axis=0)) < _MIN_POINTS or not np.abs((points - origin) @ normal).max() <= _PLANE_MM:
        return "a contour with fewer than 3 points, or out of the plane of its slice"
    rings.setdefault(cited, []).append(points)
    return ""


def _filled(found: dict[str, Rings], labels: Labels) -> Iterator[tuple[str, str]]:
    """Compare the ROIs with the labels: the same names, the same slices, and on a sample of them the same voxels."""
    written = labels.written()
    if set(found) != {one.name for one in written}:
        yield "G12", "the ROIs are not the segments of the labels"
        return
    for segment in written:
        yield from _same(found[segment.name], segment, labels)


def _same(rings: Rings, segment: Segment, labels: Labels) -> Iterator[tuple[str, str]]:
    mask = labels.mask(segment)
    used = np.flatnonzero(mask.any(axis=(1, 2)))
    uids = [labels.volume.sources[int(index)].sop_instance_uid for index in used]
    if set(uids) != set(rings):
        yield "G12", f"{segment.name} has contours on {len(rings)} slices, the labels on {len(uids)}"
        return
    for place in np.unique(np.linspace(0, len(used) - 1, min(_COMPARED, len(used))).astype(int)):
        index = int(used[place])
        if not np.array_equal(fill(rings[uids[place]], labels.volume.geometry, index), mask[index]):
            yield "G12", f"{segment.name} filled differs from the labels on {uids[place]}"
            return


def fill(rings: list[NDArray[np.float64]], geometry: Geometry, index: int) -> NDArray[np.bool_]:
    """Fill rings `[point, xyz]` in mm on slice `index`: booleans `[row, column]`, true where a centre lies inside."""
    crossings = np.zeros((geometry.rows, geometry.columns + 1), dtype=np.int32)
    for ring in rings:
        offset = ring - geometry.positions_mm[index]
        x = offset @ geometry.row_cosines / geometry.spacing_mm[1]
        y = offset @ geometry.column_cosines / geometry.spacing_mm[0]
        x1, y1 = np.roll(x, -1), np.roll(y, -1)
        # Every edge from its lower row on: the two sides of a keyhole's channel then cross at equal floats, and cancel.
        down = y1 < y
        x, x1, y, y1 = np.where(down, x1, x), np.where(down, x, x1), np.where(down, y1, y), np.where(down, y, y1)
        # Each edge crosses the rows from `first` on, `count` of them; one entry per crossing.
        first = np.ceil(y).astype(int)
        count = np.ceil(y1).astype(int) - first
        edge = np.repeat(np.arange(len(ring)), count)
        row = np.repeat(first, count) + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
        at = x[edge] + (row - y[edge]) / (y1[edge] - y[edge]) * (x1[edge] - x[edge])
        column = np.clip(np.ceil(at), 0, geometry.columns).astype(int)
        inside = (row >= 0) & (row < geometry.rows)
        np.add.at(crossings, (row[inside], column[inside]), 1)
    filled: NDArray[np.bool_] = np.cumsum(crossings[:, :-1], axis=1) % 2 == 1
    return filled
