"""Operator: a chest CT in HU -> body, left lung, right lung, bone, by thresholds and components.

A classical method, no model: air inside the body is lung, what is dense inside the body is bone. It is made for
adults in any supine or prone chest CT; it does not know pathology. Works with NumPy and SciPy, or with CuPy and
cupyx where a GPU and CuPy are present: arrays are `[slice, row, column]`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import array_api_compat
import numpy as np

from clarion.errors import OperatorError
from clarion.labels import Algorithm, CodedConcept, Labels, Segment, save_labels
from clarion.volume import Volume, load_volume

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from clarion.plugins import Workspace
    from clarion.volume import Geometry

Array = Any

# Hounsfield thresholds: halfway between air and soft tissue; lung and soft tissue; cancellous bone and soft tissue.
TISSUE_HU, LUNG_HU, BONE_HU = -300, -400, 220
# Smaller than these, a component is noise, bowel gas or a stray calcification.
MIN_LUNG_ML, MIN_BONE_ML = 100.0, 0.5
# Of two lungs the smaller has at least this part of the larger, else they are joined.
LUNG_RATIO = 0.25
TABLE_OPENING_MM, VESSEL_CLOSING_MM = 4.0, 5.0
MAX_SEPARATION_STEPS = 12

_ANATOMY = CodedConcept("123037004", "SCT", "Anatomical Structure")
SEGMENTS = (
    Segment(
        number=1,
        name="Body",
        category=_ANATOMY,
        kind=CodedConcept("38266002", "SCT", "Entire body"),
        roi_type="EXTERNAL",
        colour=(214, 188, 150),
    ),
    Segment(
        number=2,
        name="Left lung",
        category=_ANATOMY,
        kind=CodedConcept("44029006", "SCT", "Left lung"),
        roi_type="ORGAN",
        colour=(80, 170, 255),
    ),
    Segment(
        number=3,
        name="Right lung",
        category=_ANATOMY,
        kind=CodedConcept("3341006", "SCT", "Right lung"),
        roi_type="ORGAN",
        colour=(90, 220, 140),
    ),
    Segment(
        number=4,
        name="Bone",
        category=_ANATOMY,
        kind=CodedConcept("272673000", "SCT", "Bone"),
        roi_type="ORGAN",
        colour=(250, 230, 120),
    ),
)


class ChestCtSegmentation:
    """The operator."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write the labels. Raises OperatorError when there is no body or not two lungs."""
        volume = load_volume(inputs["volume"])
        if volume.unit != "HU":
            raise OperatorError(f"needs a CT in HU, this volume has unit {volume.unit or 'none'!r}")
        bits = segment_chest(_on_gpu(volume.array), volume.geometry)
        host = Volume(
            array=bits if isinstance(bits, np.ndarray) else bits.get(),
            geometry=volume.geometry,
            unit="segments",
            series_uid=volume.series_uid,
            sources=volume.sources,
            report=volume.report,
        )
        algorithm = Algorithm(
            name="Clarion classical chest CT",
            version=importlib.metadata.version("clarion-gateway"),
            manufacturer="Clarion",
        )
        save_labels(Labels(volume=host, segments=SEGMENTS, algorithm=algorithm), workspace.outputs["labels"])
        for segment in SEGMENTS:
            voxels = int(np.count_nonzero(host.array & (1 << (segment.number - 1))))
            workspace.log(f"{segment.name}: {voxels} voxels")


def _on_gpu(array: Array) -> Array:
    """Move an array to the GPU where CuPy finds one; otherwise leave it."""
    if importlib.util.find_spec("cupy") is None:
        return np.asarray(array)
    cupy = importlib.import_module("cupy")
    try:
        return cupy.asarray(array) if cupy.cuda.runtime.getDeviceCount() else np.asarray(array)
    except cupy.cuda.runtime.CUDARuntimeError:
        return np.asarray(array)


def _ndimage(array: Array) -> Any:  # noqa: ANN401  scipy.ndimage or cupyx.scipy.ndimage
    name = "cupyx.scipy.ndimage" if array_api_compat.is_cupy_array(array) else "scipy.ndimage"
    return importlib.import_module(name)


def segment_chest(hu: Array, geometry: Geometry) -> Array:
    """Segment a volume in HU `[slice, row, column]`; gives uint8 bits, bit n-1 for segment n."""
    xp = array_api_compat.array_namespace(hu)
    voxel_ml = float(np.median(geometry.voxel_volumes_ml))
    body = find_body(hu, geometry)
    if not bool(xp.any(body)):
        raise OperatorError("no body found: nothing denser than air")
    left, right = find_lungs(hu, body, geometry)
    bone = _drop_small((hu > BONE_HU) & body, max(1, int(MIN_BONE_ML / voxel_ml)))
    bits = xp.zeros(hu.shape, dtype=xp.uint8)
    for segment, mask in zip(SEGMENTS, (body, left, right, bone), strict=True):
        bits |= mask.astype(xp.uint8) << (segment.number - 1)
    return bits


def find_body(hu: Array, geometry: Geometry) -> Array:
    """Find the body: the largest piece of tissue after the table is cut off, holes filled slice by slice."""
    ndimage = _ndimage(hu)
    tissue = hu > TISSUE_HU
    opened = ndimage.binary_opening(tissue, structure=_disc(hu, TABLE_OPENING_MM / 2, geometry))
    return _fill_slices(_largest(opened))


def find_lungs(hu: Array, body: Array, geometry: Geometry) -> tuple[Array, Array]:
    """Find the left and the right lung, vessels included."""
    voxel_ml = float(np.median(geometry.voxel_volumes_ml))
    air = (hu < LUNG_HU) & body
    box = _bounding_box(air)
    if box is None:
        raise OperatorError("no lungs found: no air inside the body")
    inside = air[box]
    labels, sizes = _components(inside)
    pair = _two_largest(sizes, int(MIN_LUNG_ML / voxel_ml))
    if pair is None:
        labels, pair = _separate(inside, sizes, voxel_ml, geometry)
    lungs = [_place(_close_vessels(labels == number, geometry), body, box) for number in pair]
    first, second = lungs
    second &= ~first
    return (first, second) if _leftness(first, geometry) > _leftness(second, geometry) else (second, first)


def _close_vessels(lung: Array, geometry: Geometry) -> Array:
    """Take the vessels into a lung: closed slice by slice, within its own box."""
    xp = array_api_compat.array_namespace(lung)
    box = _bounding_box(lung)
    steps = max(1, round(VESSEL_CLOSING_MM / min(geometry.spacing_mm)))
    cross = xp.asarray(np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]], dtype=bool))
    # Padded, so that closing sees no edge where the box ends.
    padded = xp.pad(lung[box], ((0, 0), (steps + 1, steps + 1), (steps + 1, steps + 1)))
    closed = _ndimage(lung).binary_closing(padded, structure=cross, iterations=steps)
    filled = xp.zeros(lung.shape, dtype=xp.bool_)
    filled[box] = _fill_slices(closed)[:, steps + 1 : -steps - 1, steps + 1 : -steps - 1]
    return filled


def _place(part: Array, body: Array, box: tuple[slice, slice, slice]) -> Array:
    """Put a part that was worked on in a box back into the whole, within the body."""
    xp = array_api_compat.array_namespace(part)
    whole = xp.zeros(body.shape, dtype=xp.bool_)
    whole[box] = part & body[box]
    return whole


def _leftness(mask: Array, geometry: Geometry) -> float:
    """How far to the patient's left a mask lies, in mm (the first axis of LPS)."""
    xp = array_api_compat.array_namespace(mask)
    weights = [np.asarray(_host(xp.sum(mask, axis=axes)), dtype=float) for axes in ((1, 2), (0, 2), (0, 1))]
    slice_index, row, column = (float((np.arange(len(one)) * one).sum() / one.sum()) for one in weights)
    left = float(geometry.positions_mm[round(slice_index)][0])
    left += column * geometry.spacing_mm[1] * float(geometry.row_cosines[0])
    return left + row * geometry.spacing_mm[0] * float(geometry.column_cosines[0])


def _host(array: Array) -> Array:
    return array if isinstance(array, np.ndarray) else array.get()


def _disc(like: Array, radius_mm: float, geometry: Geometry) -> Array:
    """Make an in-plane disc as a structuring element `[1, row, column]`."""
    xp = array_api_compat.array_namespace(like)
    reach = [max(1, round(radius_mm / step)) for step in geometry.spacing_mm]
    rows, columns = np.ogrid[-reach[0] : reach[0] + 1, -reach[1] : reach[1] + 1]
    disc = (rows / (reach[0] + 0.5)) ** 2 + (columns / (reach[1] + 0.5)) ** 2 <= 1
    return xp.asarray(disc[np.newaxis])


def _components(mask: Array) -> tuple[Array, Array]:
    """Label the pieces of a mask; gives the labels and the size of each, that of the background 0."""
    xp = array_api_compat.array_namespace(mask)
    labels, count = _ndimage(mask).label(mask)
    sizes = xp.bincount(labels.ravel(), minlength=int(count) + 1)
    sizes[0] = 0
    return labels, sizes


def _largest(mask: Array) -> Array:
    xp = array_api_compat.array_namespace(mask)
    labels, sizes = _components(mask)
    if not bool(xp.any(sizes > 0)):
        return mask
    return labels == int(xp.argmax(sizes))


def _drop_small(mask: Array, least: int) -> Array:
    labels, sizes = _components(mask)
    return (sizes >= least)[labels]


def _fill_slices(mask: Array) -> Array:
    """Fill the holes of each slice: what is outside and cannot be reached from the slice's edge."""
    xp = array_api_compat.array_namespace(mask)
    in_plane = xp.zeros((3, 3, 3), dtype=xp.bool_)
    in_plane[1, 1, :] = True
    in_plane[1, :, 1] = True
    padded = xp.pad(~mask, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    labels, count = _ndimage(mask).label(padded, structure=in_plane)
    outside = xp.zeros(int(count) + 1, dtype=xp.bool_)
    outside[labels[:, 0, 0]] = True
    return ~outside[labels[:, 1:-1, 1:-1]]


def _bounding_box(mask: Array) -> tuple[slice, slice, slice] | None:
    xp = array_api_compat.array_namespace(mask)
    spans = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        places = np.flatnonzero(_host(xp.any(mask, axis=axes)))
        if len(places) == 0:
            return None
        spans.append(slice(int(places[0]), int(places[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _two_largest(sizes: Array, least: int) -> tuple[int, int] | None:
    """Give the numbers of the two largest pieces if both can be a lung."""
    host = _host(sizes)
    order = np.argsort(host)[::-1][:2]
    if len(order) < 2 or host[order[1]] < max(least, host[order[0]] * LUNG_RATIO):  # noqa: PLR2004  two lungs
        return None
    return int(order[0]), int(order[1])


def _separate(air: Array, sizes: Array, voxel_ml: float, geometry: Geometry) -> tuple[Array, tuple[int, int]]:
    """Part joined lungs: shrink until two large pieces stand apart, then give each voxel to the nearest piece."""
    xp = array_api_compat.array_namespace(air)
    ndimage = _ndimage(air)
    least = int(MIN_LUNG_ML / voxel_ml)
    if int(_host(sizes).max(initial=0)) < least:
        raise OperatorError(f"no lungs found: no air inside the body of at least {MIN_LUNG_ML:.0f} ml")
    joined = _largest(air)
    shrunk = joined
    for _ in range(MAX_SEPARATION_STEPS):
        shrunk = ndimage.binary_erosion(shrunk)
        labels, found = _components(shrunk)
        pair = _two_largest(found, least // 4)
        if pair is not None:
            break
    else:
        raise OperatorError("the lungs cannot be told apart: they stay joined however far they are shrunk")
    seeds = labels * ((found >= least // 50)[labels])
    step = (float(np.median(geometry.slice_extents_mm)), *geometry.spacing_mm)
    nearest = ndimage.distance_transform_edt(seeds == 0, sampling=step, return_distances=False, return_indices=True)
    grown = seeds[tuple(nearest)] * joined
    return xp.asarray(grown), pair
