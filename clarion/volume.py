"""Voxels with geometry, and the folder in which operators hand them on.

Arrays are `[slice, row, column]`, index 0 at the centre of the first voxel; space is patient LPS in mm (PS3.3
C.7.6.2.1.1). Voxel (k, r, c) lies at `positions[k] + c * spacing[1] * row_cosines + r * spacing[0] * column_cosines`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where the voxels of a volume lie, slice by slice.

    `positions_mm` is `[slice, xyz]` float64, ascending along the normal; `spacing_mm` is the distance between rows,
    then between columns (Pixel Spacing, PS3.3 10.7.1.3); the cosines are unit vectors of Image Orientation (Patient).
    """

    positions_mm: NDArray[np.float64]
    row_cosines: NDArray[np.float64]
    column_cosines: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    rows: int
    columns: int
    frame_of_reference_uid: str
    single_slice_mm: float = 1.0
    """How far the slice of a volume of one slice reaches; of several the positions say it."""

    @property
    def normal(self) -> NDArray[np.float64]:
        """The unit vector across the slices."""
        normal: NDArray[np.float64] = np.cross(self.row_cosines, self.column_cosines)
        return normal

    @property
    def slice_extents_mm(self) -> NDArray[np.float64]:
        """How far each slice reaches: half-way to both neighbours; at an end the one neighbour's step."""
        depths = self.positions_mm @ self.normal
        if len(depths) == 1:
            return np.full(1, self.single_slice_mm)
        steps = np.diff(depths)
        return (np.concatenate((steps[:1], steps)) + np.concatenate((steps, steps[-1:]))) / 2

    @property
    def voxel_volumes_ml(self) -> NDArray[np.float64]:
        """The volume of one voxel of each slice in ml, `[slice]`."""
        return self.slice_extents_mm * self.spacing_mm[0] * self.spacing_mm[1] / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceSource:
    """The instance a slice was read from."""

    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """An array `[slice, row, column]` with its geometry and the instances it was read from, one per slice."""

    array: NDArray[Any]
    geometry: Geometry
    unit: str
    series_uid: str
    sources: tuple[SliceSource, ...]
    report: tuple[str, ...] = ()


def save_volume(volume: Volume, folder: Path) -> None:
    """Write a volume as `array.npy` and `volume.json`; the JSON comes last, so a folder with it is whole."""
    geometry = volume.geometry
    np.save(folder / "array.npy", volume.array, allow_pickle=False)
    described = {
        "positions_mm": geometry.positions_mm.tolist(),
        "row_cosines": geometry.row_cosines.tolist(),
        "column_cosines": geometry.column_cosines.tolist(),
        "spacing_mm": list(geometry.spacing_mm),
        "rows": geometry.rows,
        "columns": geometry.columns,
        "frame_of_reference_uid": geometry.frame_of_reference_uid,
        "single_slice_mm": geometry.single_slice_mm,
        "unit": volume.unit,
        "series_uid": volume.series_uid,
        "sources": [[source.sop_class_uid, source.sop_instance_uid] for source in volume.sources],
        "report": list(volume.report),
    }
    (folder / "volume.json").write_text(json.dumps(described))


def load_volume(folder: Path) -> Volume:
    """Read what `save_volume` wrote; the array is mapped, not copied."""
    raw = json.loads((folder / "volume.json").read_text())
    geometry = Geometry(
        positions_mm=np.array(raw["positions_mm"], dtype=np.float64),
        row_cosines=np.array(raw["row_cosines"], dtype=np.float64),
        column_cosines=np.array(raw["column_cosines"], dtype=np.float64),
        spacing_mm=(raw["spacing_mm"][0], raw["spacing_mm"][1]),
        rows=raw["rows"],
        columns=raw["columns"],
        frame_of_reference_uid=raw["frame_of_reference_uid"],
        single_slice_mm=raw["single_slice_mm"],
    )
    return Volume(
        array=np.load(folder / "array.npy", mmap_mode="r", allow_pickle=False),
        geometry=geometry,
        unit=raw["unit"],
        series_uid=raw["series_uid"],
        sources=tuple(SliceSource(sop_class_uid=a, sop_instance_uid=b) for a, b in raw["sources"]),
        report=tuple(raw["report"]),
    )
