"""Volume and labels -> one Secondary Capture picture: coronal, sagittal, axial with coloured overlays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pydicom import Dataset
from pydicom.uid import SecondaryCaptureImageStorage

from clarion.labels import load_labels
from clarion.volume import load_volume
from writers.identity import (
    NOT_FOR_CLINICAL_USE,
    JobIdentity,
    SourceSeries,
    add_contributing_equipment,
    code,
    copy_patient_and_study,
    read_source,
    reference,
    save,
    stamp,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from clarion.labels import Labels
    from clarion.plugins import Workspace
    from clarion.volume import Geometry, Volume

KIND = "overview"
WINDOW_LOW, WINDOW_HIGH = -600, 400
PANEL, MARGIN, LEGEND = 420, 14, 64
OVERLAY = 0.38
_BACKGROUND, _TEXT, _FAINT = (12, 16, 22), (232, 236, 241), (150, 160, 172)


class OverviewWriter:
    """The operator."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `overview.dcm`."""
        volume, labels = load_volume(inputs["volume"]), load_labels(inputs["labels"])
        source = read_source(inputs["payload"], volume)
        job = JobIdentity.of(workspace.facts)
        save(write_overview(draw(volume, labels), source, job, labels), workspace.outputs["dicom"], KIND)


def draw(volume: Volume, labels: Labels) -> NDArray[np.uint8]:
    """Draw the three planes through the middle of what was segmented; RGB `[row, column, 3]`."""
    everything: NDArray[np.uint8] = labels.volume.array
    organs = (everything & 0b0000_1110).astype(np.uint8) if len(labels.segments) > 1 else everything
    centre = _middle(organs if organs.any() else everything)
    width = 3 * PANEL + 4 * MARGIN
    canvas = Image.new("RGB", (width, PANEL + 2 * MARGIN + LEGEND), _BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for place, (name, axis) in enumerate((("Coronal", 1), ("Sagittal", 2), ("Axial", 0))):
        picture = _panel(volume, labels, axis, centre[axis])
        left = MARGIN + place * (PANEL + MARGIN)
        canvas.paste(picture, (left + (PANEL - picture.width) // 2, MARGIN + (PANEL - picture.height) // 2))
        pen.text((left + 6, MARGIN + 4), name, fill=_TEXT, font=ImageFont.load_default(16))
    _legend(pen, labels, PANEL + 2 * MARGIN, width)
    return np.asarray(canvas, dtype=np.uint8)


def _middle(array: NDArray[np.uint8]) -> tuple[int, int, int]:
    places = []
    for axes in ((1, 2), (0, 2), (0, 1)):
        weights = np.count_nonzero(array, axis=axes).astype(float)
        total = float(weights.sum())
        middle = float((np.arange(len(weights)) * weights).sum() / total) if total else len(weights) / 2
        places.append(round(middle))
    return places[0], places[1], places[2]


def _panel(volume: Volume, labels: Labels, axis: int, index: int) -> Image.Image:
    """Draw one plane with true proportions, head up, fitted into a panel."""
    plane = np.take(volume.array, index, axis=axis).astype(np.float32)
    grey = np.clip((plane - WINDOW_LOW) / (WINDOW_HIGH - WINDOW_LOW), 0, 1) * 255
    rgb = np.repeat(grey[..., np.newaxis], 3, axis=2)
    bits = np.take(labels.volume.array, index, axis=axis)
    for segment in labels.segments:
        if segment.roi_type == "EXTERNAL":
            continue
        rgb[(bits & (1 << (segment.number - 1))) != 0] *= 1 - OVERLAY
        rgb[(bits & (1 << (segment.number - 1))) != 0] += np.array(segment.colour) * OVERLAY
    if axis != 0 and volume.geometry.normal[2] > 0:
        rgb = rgb[::-1]
    extent = _extent_mm(volume.geometry, axis)
    scale = PANEL / max(extent)
    size = max(1, round(extent[1] * scale)), max(1, round(extent[0] * scale))
    return Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)


def _extent_mm(geometry: Geometry, axis: int) -> tuple[float, float]:
    """Give height and width of a plane across the axis."""
    depth = float(geometry.slice_extents_mm.sum())
    height, width = geometry.rows * geometry.spacing_mm[0], geometry.columns * geometry.spacing_mm[1]
    return ((height, width), (depth, width), (depth, height))[axis]


def _legend(pen: ImageDraw.ImageDraw, labels: Labels, top: int, width: int) -> None:
    left, font = MARGIN, ImageFont.load_default(16)
    for segment in labels.segments:
        if segment.roi_type == "EXTERNAL":
            continue
        pen.rectangle((left, top + 6, left + 14, top + 20), fill=segment.colour)
        pen.text((left + 22, top + 3), segment.name, fill=_TEXT, font=font)
        left += 40 + int(pen.textlength(segment.name, font=font))
    said = f"{NOT_FOR_CLINICAL_USE} · {labels.algorithm.name} {labels.algorithm.version}"
    pen.text((MARGIN, top + 32), said, fill=_FAINT, font=ImageFont.load_default(14))
    pen.line((MARGIN, top - 4, width - MARGIN, top - 4), fill=(40, 48, 58))


def write_overview(picture: NDArray[np.uint8], source: SourceSeries, job: JobIdentity, labels: Labels) -> Dataset:
    """Put a picture `[row, column, 3]` into a Secondary Capture image (PS3.3 A.8)."""
    ds = Dataset()
    ds.SOPClassUID = SecondaryCaptureImageStorage
    copy_patient_and_study(source.first, ds)
    stamp(ds, job, KIND, label="overview", modality="OT")
    ds.ConversionType, ds.ImageType = "WSD", ["DERIVED", "SECONDARY"]
    ds.BurnedInAnnotation = "NO"
    ds.PatientOrientation = ds.Laterality = None
    said = (f"{NOT_FOR_CLINICAL_USE}: coronal, sagittal and axial planes with segment colours", *labels.volume.report)
    ds.DerivationDescription = "; ".join(said)[:1024]
    ds.SourceImageSequence = [_source(one) for one in source.headers]
    ds.Rows, ds.Columns = picture.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    raw = picture.tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OB"
    add_contributing_equipment(ds, source.first, labels)
    return ds


def _source(header: Dataset) -> Dataset:
    item = reference(header)
    item.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
    return item
