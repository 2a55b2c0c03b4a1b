"""Labels -> RT Structure Set (PS3.3 A.19): closed planar contours per slice, implicit VR, unapproved.

Implicit VR little endian because Contour Data over 64 KiB has no explicit VR encoding as DS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, RTStructureSetStorage

from clarion.errors import OperatorError
from clarion.labels import load_labels
from writers.contours import trace
from writers.identity import (
    ALGORITHM_FAMILY,
    NOT_FOR_CLINICAL_USE,
    JobIdentity,
    SourceSeries,
    add_contributing_equipment,
    code,
    code_of,
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

    from clarion.labels import Labels, Segment
    from clarion.plugins import Workspace
    from clarion.volume import Geometry

KIND = "rtstruct"
_CONTOUR_DATA = Tag(0x3006, 0x0050)
_DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"
# With three decimals rounding stays below half the margin of 0.02 voxel; below this spacing four are needed.
_FINE_MM = 0.1


class RtstructWriter:
    """The operator."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `rtstruct.dcm`; raises OperatorError when no segment has a voxel."""
        labels = load_labels(inputs["labels"])
        source = read_source(inputs["payload"], labels.volume)
        job = JobIdentity.of(workspace.facts)
        save(write_structure_set(labels, source, job), workspace.outputs["dicom"], KIND, ImplicitVRLittleEndian)


def write_structure_set(labels: Labels, source: SourceSeries, job: JobIdentity) -> Dataset:
    """Build the data set; ROI number is the segment's number among the written ones."""
    segments = labels.written()
    if not segments:
        raise OperatorError("no segment has a voxel; an empty structure set is not written")
    ds = Dataset()
    ds.SOPClassUID = RTStructureSetStorage
    copy_patient_and_study(source.first, ds)
    stamp(ds, job, KIND, label="structure set", modality="RTSTRUCT")
    ds.OperatorsName = None
    ds.StructureSetLabel = job.pipeline[:16]
    ds.StructureSetDescription = "; ".join((NOT_FOR_CLINICAL_USE, *labels.volume.report))[:1024]
    ds.StructureSetDate, ds.StructureSetTime = job.moment(ds)
    ds.ApprovalStatus = "UNAPPROVED"
    frame_of_reference = labels.volume.geometry.frame_of_reference_uid
    ds.FrameOfReferenceUID = frame_of_reference
    ds.PositionReferenceIndicator = source.first.get("PositionReferenceIndicator")
    ds.ReferencedFrameOfReferenceSequence = [_referenced_frame(source, frame_of_reference)]
    numbered = list(enumerate(segments, 1))
    ds.StructureSetROISequence = [_roi(number, one, labels, frame_of_reference) for number, one in numbered]
    ds.ROIContourSequence = [_contours(number, one, labels, source) for number, one in numbered]
    ds.RTROIObservationsSequence = [_observation(number, one) for number, one in numbered]
    add_contributing_equipment(ds, source.first, labels)
    return ds


def _referenced_frame(source: SourceSeries, uid: str) -> Dataset:
    series = Dataset()
    series.SeriesInstanceUID = source.first.SeriesInstanceUID
    series.ContourImageSequence = [reference(one) for one in source.headers]
    study = Dataset()
    study.ReferencedSOPClassUID = _DETACHED_STUDY
    study.ReferencedSOPInstanceUID = source.first.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = uid
    frame.RTReferencedStudySequence = [study]
    return frame


def _roi(number: int, segment: Segment, labels: Labels, frame_of_reference: str) -> Dataset:
    roi = Dataset()
    roi.ROINumber, roi.ReferencedFrameOfReferenceUID = number, frame_of_reference
    roi.ROIName, roi.ROIGenerationAlgorithm = segment.name, "AUTOMATIC"
    algorithm = Dataset()
    algorithm.AlgorithmFamilyCodeSequence = [code(*ALGORITHM_FAMILY)]
    algorithm.AlgorithmName, algorithm.AlgorithmVersion = labels.algorithm.name, labels.algorithm.version
    roi.ROIDerivationAlgorithmIdentificationSequence = [algorithm]
    return roi


def _observation(number: int, segment: Segment) -> Dataset:
    observed = Dataset()
    observed.ObservationNumber = observed.ReferencedROINumber = number
    observed.ROIObservationLabel = segment.name[:16]
    observed.RTROIInterpretedType, observed.ROIInterpreter = segment.roi_type, None
    observed.SegmentedPropertyCategoryCodeSequence = [code_of(segment.category)]
    observed.RTROIIdentificationCodeSequence = [code_of(segment.kind)]
    return observed


def _contours(number: int, segment: Segment, labels: Labels, source: SourceSeries) -> Dataset:
    mask, geometry = labels.mask(segment), labels.volume.geometry
    items: list[Dataset] = []
    for index in np.flatnonzero(mask.any(axis=(1, 2))):
        for ring in trace(mask[index]):
            item = Dataset()
            item.ContourImageSequence = [reference(source.headers[index])]
            item.ContourGeometricType = "CLOSED_PLANAR"
            item.NumberOfContourPoints = len(ring)
            item[_CONTOUR_DATA] = _contour_data(to_patient(ring, geometry, int(index)), geometry)
            item.ContourNumber = len(items) + 1
            items.append(item)
    roi = Dataset()
    roi.ROIDisplayColor, roi.ReferencedROINumber = list(segment.colour), number
    roi.ContourSequence = items
    return roi


def to_patient(ring: NDArray[np.float64], geometry: Geometry, index: int) -> NDArray[np.float64]:
    """Map (column, row) indices of a slice to LPS mm, `[point, xyz]`."""
    along_row = ring[:, :1] * geometry.spacing_mm[1] * geometry.row_cosines
    along_column = ring[:, 1:] * geometry.spacing_mm[0] * geometry.column_cosines
    points: NDArray[np.float64] = geometry.positions_mm[index] + along_row + along_column
    return points


def _contour_data(points: NDArray[np.float64], geometry: Geometry) -> RawDataElement:
    """Print the points once, as bytes: at most 16 per number, no exponent, no minus zero."""
    decimals = 3 if min(geometry.spacing_mm) >= _FINE_MM else 4
    rounded = np.round(points, decimals) + 0.0
    text = "\\".join([f"{value:.{decimals}f}" for value in rounded.ravel().tolist()]).encode()
    text += b" " * (len(text) % 2)
    return RawDataElement(_CONTOUR_DATA, "DS", len(text), text, 0, is_implicit_VR=True, is_little_endian=True)
