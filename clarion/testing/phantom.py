"""A chest CT phantom: body, two lungs with vessels, heart, spine, ribs, trachea, table and noise; no real patient.

Seeded: the same seed gives the same voxels and the same UIDs. The truth of the lungs comes with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from clarion.dicom import IMPLEMENTATION_CLASS_UID
from clarion.model import derive_uid

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

AIR, FAT, MUSCLE, BLOOD, LUNG, MARROW, CORTEX, TABLE = -1000, -95, 50, 45, -820, 180, 650, -120
INTERCEPT = -1024
_RIB_DISTANCE_MM = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhantomSpec:
    """What to generate; the defaults are a chest CT as a clinic would send it."""

    slices: int = 128
    size: int = 512
    field_mm: float = 400.0
    length_mm: float = 320.0
    noise_hu: float = 14.0
    seed: int = 1

    @property
    def pixel_mm(self) -> float:
        """The distance between pixels."""
        return self.field_mm / self.size

    @property
    def step_mm(self) -> float:
        """The distance between slices."""
        return self.length_mm / self.slices


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """HU int16 and the two lungs as booleans, all `[slice, row, column]`, slices from the feet to the head."""

    spec: PhantomSpec
    hu: NDArray[np.int16]
    left_lung: NDArray[np.bool_]
    right_lung: NDArray[np.bool_]


def make_phantom(spec: PhantomSpec, progress: Callable[[int], None] = lambda _: None) -> Phantom:
    """Generate the voxels slice by slice; `progress` is called with the number of slices done."""
    rng = np.random.default_rng(spec.seed)
    shape = (spec.slices, spec.size, spec.size)
    hu = np.empty(shape, dtype=np.int16)
    left, right = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    axis = ((np.arange(spec.size) - (spec.size - 1) / 2) * spec.pixel_mm).astype(np.float32)
    x, y = axis[np.newaxis, :], axis[:, np.newaxis]
    vessels = _vessels(rng)
    for index in range(spec.slices):
        z = (index + 0.5) * spec.step_mm - spec.length_mm / 2
        plane, left[index], right[index] = _slice(x, y, z, vessels)
        grain = rng.standard_normal(plane.shape, dtype=np.float32)
        # Reconstruction smooths noise a little along rows and columns.
        grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1)) / np.float32(np.sqrt(3))
        hu[index] = np.clip(plane + grain * spec.noise_hu, -1024, 3071)
        progress(index + 1)
    return Phantom(spec=spec, hu=hu, left_lung=left, right_lung=right)


def _ellipse(
    x: NDArray[np.float32], y: NDArray[np.float32], centre: tuple[float, float], radii: tuple[float, float]
) -> NDArray[np.float32]:
    """Give the squared elliptical distance from a centre: below 1 is inside."""
    distance: NDArray[np.float32] = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2
    return distance


def _slice(
    x: NDArray[np.float32], y: NDArray[np.float32], z: float, vessels: list[tuple[NDArray[np.float64], float]]
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw one slice at height z: HU, left lung, right lung. +x is the patient's left, +y the back."""
    taper = 1 - 0.10 * (z / 160) ** 2
    body = _ellipse(x, y, (0, 0), (172 * taper, 118 * taper))
    plane = np.full(body.shape, AIR, dtype=np.float32)
    plane[_ellipse(x, y, (0, -60), (230, 205)) < 1] = AIR
    table = (np.abs(y - 138 - 0.0006 * x**2) < 5) & (np.abs(x) < 190)
    plane[table] = TABLE
    plane[body < 1] = FAT
    plane[body < 0.86] = MUSCLE
    heart = _ellipse(x, y, (22, -28), (_bulge(z, -35, 62, 58), _bulge(z, -35, 62, 46))) < 1
    mediastinum = _ellipse(x, y, (0, -8), (30, 72)) < 1
    lungs = []
    for side in (1, -1):
        reach = _bulge(z, 5, 150, 1.0)
        lung = _ellipse(x, y, (side * 76, 0), (58 * reach, 84 * reach)) < 1
        lung &= ~mediastinum & ~(_ellipse(x, y, (22, -28), (_bulge(z, -35, 66, 62), _bulge(z, -35, 66, 50))) < 1)
        plane[lung] = LUNG + 0.35 * (y + np.zeros_like(x))[lung]
        lungs.append(lung)
    plane[heart & (body < 0.8)] = BLOOD
    plane[_ellipse(x, y, (-8, 20), (11, 11)) < 1] = BLOOD + 10
    for path, radius in vessels:
        near = path[np.abs(path[:, 2] - z) < radius * 1.5]
        for px, py, pz in near:
            size = radius**2 - (pz - z) ** 2
            if size > 0:
                spot = (x - px) ** 2 + (y - py) ** 2 < size
                plane[spot & (lungs[0] | lungs[1])] = BLOOD
    if z > 20:
        plane[_ellipse(x, y, (0, 8), (10, 10)) < 1] = MUSCLE
        plane[_ellipse(x, y, (0, 8), (8, 8)) < 1] = AIR
    _bones(plane, x, y, z, taper)
    return plane, lungs[0], lungs[1]


def _bones(plane: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32], z: float, taper: float) -> None:
    """Draw spine, sternum and ribs into a slice."""
    disc = abs((z % _RIB_DISTANCE_MM) - _RIB_DISTANCE_MM / 2) < 2.5
    vertebra = _ellipse(x, y, (0, 68), (19, 16))
    plane[vertebra < 1] = MUSCLE + 40 if disc else CORTEX
    plane[vertebra < 0.7] = MUSCLE + 40 if disc else MARROW
    arch = _ellipse(x, y, (0, 92), (15, 13))
    plane[(arch < 1) & (arch > 0.45)] = CORTEX
    plane[arch <= 0.45] = 20
    plane[_ellipse(x, y, (0, -92 * taper), (17, 5)) < 1] = MARROW + 120
    ring = _ellipse(x, y, (0, 0), (150 * taper, 99 * taper))
    slope = (z + 0.30 * y) % _RIB_DISTANCE_MM
    rib = (ring > 0.90) & (ring < 1.02) & (slope < 9) & (np.abs(x) > 14)
    plane[rib] = CORTEX
    plane[rib & (ring > 0.935) & (ring < 0.985) & (slope > 2) & (slope < 7)] = MARROW


def _bulge(z: float, centre: float, half: float, size: float) -> float:
    """Give the half-axis of an ellipsoid at height z; nearly nothing outside of it."""
    inside = 1 - ((z - centre) / half) ** 2
    return size * float(np.sqrt(inside)) if inside > 0 else 1e-3


def _vessels(rng: np.random.Generator) -> list[tuple[NDArray[np.float64], float]]:
    """Grow branching vessels from both hila: points `[step, xyz]` in mm and a radius each."""
    grown: list[tuple[NDArray[np.float64], float]] = []
    for side in (1.0, -1.0):
        for _ in range(14):
            start = np.array([side * 34, rng.uniform(-15, 25), rng.uniform(-40, 40)])
            heading = np.array([side * rng.uniform(0.5, 1), rng.uniform(-0.8, 0.8), rng.uniform(-1, 1)])
            trunk = _walk(rng, start, heading, 34)
            grown.append((trunk, 3.0))
            for joint in (10, 18, 26):
                branch = heading + rng.normal(0, 0.8, 3)
                grown.append((_walk(rng, trunk[joint], branch, 22), 1.6))
    return grown


def _walk(
    rng: np.random.Generator, start: NDArray[np.float64], heading: NDArray[np.float64], steps: int
) -> NDArray[np.float64]:
    points = [start]
    for _ in range(steps):
        heading = heading / np.linalg.norm(heading) + rng.normal(0, 0.10, 3)
        points.append(points[-1] + heading * 2.2)
    return np.array(points)


def write_phantom(phantom: Phantom, folder: Path, *, patient: str = "Phantom^Chest") -> list[Path]:
    """Write the phantom as a CT series in explicit VR little endian; gives the files in spatial order.

    The files' names and Instance Numbers are shuffled against the positions, as archives often deliver them.
    """
    spec = phantom.spec
    study = derive_uid("phantom", spec, "study")
    names = np.random.default_rng(spec.seed + 1).permutation(spec.slices)
    files = []
    for index in range(spec.slices):
        ds = _header(spec, index, study, patient)
        ds.InstanceNumber = int(names[index]) + 1
        ds.PixelData = (phantom.hu[index] - np.int16(INTERCEPT)).astype("<u2").tobytes()
        path = folder / f"{names[index]:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def _header(spec: PhantomSpec, index: int, study: str, patient: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(derive_uid("phantom", spec, "instance", index))
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, derive_uid("phantom", spec, "series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = derive_uid("phantom", spec, "frame"), ""
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = patient, "PHANTOM-1", "19700101", "O"
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260102"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "101500"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = "PH0001", "1", ""
    ds.StudyDescription, ds.SeriesDescription, ds.Modality = "CT chest (generated)", "Chest 2.5 mm", "CT"
    ds.Manufacturer, ds.ManufacturerModelName = "Clarion", "Chest phantom"
    ds.PatientPosition, ds.BodyPartExamined, ds.KVP = "HFS", "CHEST", "120"
    ds.SeriesNumber, ds.AcquisitionNumber = 2, 1
    edge = -(spec.size - 1) / 2 * spec.pixel_mm
    height = (index + 0.5) * spec.step_mm - spec.length_mm / 2
    ds.ImagePositionPatient = [f"{edge:.4f}", f"{edge:.4f}", f"{height:.4f}"]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [f"{spec.pixel_mm:.6f}", f"{spec.pixel_mm:.6f}"]
    ds.SliceThickness = f"{spec.step_mm:.4f}"
    ds.Rows = ds.Columns = spec.size
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 12, 11
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = INTERCEPT, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = 40, 400
    return ds
