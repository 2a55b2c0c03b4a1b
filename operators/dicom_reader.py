"""Operator: a payload's DICOM series -> one volume, slices in the order of their true position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from pydicom import Dataset, dcmread

from clarion.dicom import order_series, read_headers
from clarion.errors import UnreadableSeriesError
from clarion.volume import Geometry, SliceSource, Volume, save_volume

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from clarion.dicom import Ordering
    from clarion.plugins import Workspace

_Slices = list[tuple["Path", Dataset]]
# A step may differ from the median by this part, or by this many mm, and the series still counts as regular.
_REGULAR_PART, _REGULAR_MM = 0.01, 0.01


_INT16 = np.iinfo(np.int16)


class DicomReader:
    """Reads the one series of a modality that the payload clearly holds."""

    class Config(BaseModel):
        """Which modality is wanted; any, when empty."""

        model_config = ConfigDict(extra="forbid", frozen=True)

        modality: str = ""

    def __init__(self, config: Config) -> None:
        self._modality = config.modality

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write the volume. Raises UnreadableSeriesError with a named reason when there is no such series."""
        volume = read_series(_choose(read_headers(inputs["payload"]), self._modality))
        for line in volume.report:
            workspace.log(f"series: {line}")
        save_volume(volume, workspace.outputs["volume"])


def _choose(headers: _Slices, modality: str) -> _Slices:
    """Choose the series of the modality with most instances; the second must have fewer than half of them."""
    series: dict[str, _Slices] = {}
    for path, ds in headers:
        series.setdefault(str(ds.get("SeriesInstanceUID", "")), []).append((path, ds))
    found = sorted({str(slices[0][1].get("Modality", "none")) for slices in series.values()})
    wanted = [one for one in series.values() if not modality or one[0][1].get("Modality") == modality]
    if not wanted:
        raise UnreadableSeriesError("wrong-modality", f"needs {modality}, the payload has {', '.join(found) or 'none'}")
    placed = [one for one in wanted if all("ImagePositionPatient" in ds for _, ds in one)]
    if not placed:
        raise UnreadableSeriesError("no-position", "no series has an Image Position (Patient) in every instance")
    placed.sort(key=len, reverse=True)
    if len(placed) > 1 and len(placed[1]) * 2 >= len(placed[0]):
        sizes = ", ".join(str(len(one)) for one in placed)
        raise UnreadableSeriesError("ambiguous-series", f"several series could be meant, with {sizes} instances")
    return placed[0]


def read_series(slices: _Slices) -> Volume:
    """Decode one series into a volume; int16 where the rescaled values are whole and fit, else float32."""
    headers = [ds for _, ds in slices]
    first = headers[0]
    for keyword in ("Rows", "Columns", "PixelSpacing"):
        _same_everywhere(headers, keyword)
    if not _frames_scattered(headers):
        _same_everywhere(headers, "FrameOfReferenceUID")
    ordering = order_series(headers)
    ordered = [slices[index] for index in ordering.order]
    spacing = [float(one) for one in first.PixelSpacing]
    if min(spacing) <= 0:
        raise UnreadableSeriesError("bad-spacing", "Pixel Spacing is not positive")
    return Volume(
        array=_decode(ordered),
        geometry=Geometry(
            positions_mm=ordering.positions_mm,
            row_cosines=ordering.row_cosines,
            column_cosines=ordering.column_cosines,
            spacing_mm=(spacing[0], spacing[1]),
            rows=int(first.Rows),
            columns=int(first.Columns),
            frame_of_reference_uid=str(ordered[0][1].FrameOfReferenceUID),
            single_slice_mm=_thickness(first) or 1.0,
        ),
        unit=_unit(headers),
        series_uid=str(first.SeriesInstanceUID),
        sources=tuple(
            SliceSource(sop_class_uid=str(ds.SOPClassUID), sop_instance_uid=str(ds.SOPInstanceUID)) for _, ds in ordered
        ),
        report=_report(ordering, headers),
    )


def _same_everywhere(headers: list[Dataset], keyword: str) -> None:
    values = {str(ds.get(keyword, "")) for ds in headers}
    if values == {""}:
        raise UnreadableSeriesError("missing-attribute", f"{keyword} is absent")
    if len(values) > 1:
        raise UnreadableSeriesError("mixed-series", f"{keyword} differs among the instances")


def _unit(headers: list[Dataset]) -> str:
    """Give the unit of the rescaled values: of CT Hounsfield units, unless Rescale Type says another (C.7.6.1.1.2)."""
    if headers[0].get("Modality") != "CT":
        return ""
    units = {str(ds.get("RescaleType") or "HU") for ds in headers}
    if len(units) > 1:
        raise UnreadableSeriesError("mixed-series", f"RescaleType differs among the instances: {sorted(units)}")
    return units.pop()


def _thickness(ds: Dataset) -> float:
    try:
        return max(0.0, float(ds.get("SliceThickness") or 0))
    except ValueError:
        return 0.0


def _frames_scattered(headers: list[Dataset]) -> bool:
    """Tell whether every instance has a frame of reference of its own, as some de-identification leaves a series."""
    frames = {str(ds.get("FrameOfReferenceUID", "")) for ds in headers}
    return len(headers) > 1 and len(frames) == len(headers) and "" not in frames


def _decode(ordered: _Slices) -> NDArray[Any]:
    first = ordered[0][1]
    whole = all(_is_whole(ds) for _, ds in ordered)
    array: NDArray[Any] = np.empty(
        (len(ordered), int(first.Rows), int(first.Columns)), dtype=np.int16 if whole else np.float32
    )
    for index, (path, header) in enumerate(ordered):
        if int(header.get("SamplesPerPixel", 1)) != 1:
            raise UnreadableSeriesError("colour", "a volume needs one sample per pixel")
        try:
            stored = dcmread(path).pixel_array
        except Exception as error:
            # A decoder may raise anything; the instance is named, the pixels are not used.
            said = f"{header.SOPInstanceUID} ({header.file_meta.TransferSyntaxUID.name}): {type(error).__name__}"
            raise UnreadableSeriesError("undecodable", said) from error
        if stored.shape != array.shape[1:]:
            raise UnreadableSeriesError("multi-frame", f"an instance has shape {stored.shape}, not rows x columns")
        slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
        values = stored.astype(np.int64) * int(slope) + int(intercept) if whole else stored * slope + intercept
        if array.dtype == np.int16 and (values.min() < _INT16.min or values.max() > _INT16.max):
            array = array.astype(np.float32)
        array[index] = values
    return array


def _is_whole(ds: Dataset) -> bool:
    return float(ds.get("RescaleSlope", 1)).is_integer() and float(ds.get("RescaleIntercept", 0)).is_integer()


def _report(ordering: Ordering, headers: list[Dataset]) -> tuple[str, ...]:
    lines = []
    if "RescaleSlope" not in headers[0]:
        lines.append("no rescale in the headers: stored values are taken as they are")
    if _frames_scattered(headers):
        lines.append("every instance names a frame of reference of its own: that of the first slice is used for all")
    if len(headers) == 1:
        thickness = _thickness(headers[0])
        said = f"of {thickness:g} mm, its Slice Thickness" if thickness else "taken as 1 mm thick: it says no thickness"
        lines.append(f"one slice only, {said}")
    if len(headers) > 1:
        steps = np.linalg.norm(np.diff(ordering.positions_mm, axis=0), axis=1)
        median = float(np.median(steps))
        worst = float(np.abs(steps - median).max())
        if worst > max(median * _REGULAR_PART, _REGULAR_MM):
            lines.append(f"slices are not evenly spaced: median step {median:.3f} mm, largest deviation {worst:.3f} mm")
    return tuple(lines)
