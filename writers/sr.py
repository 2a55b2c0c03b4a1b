"""Measurements -> Comprehensive 3D SR with TID 1500 (PS3.16), built by highdicom, citing its own SEG."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import highdicom as hd
from pydicom import Dataset, dcmread

from clarion.labels import load_labels
from writers.identity import (
    MANUFACTURER,
    NOT_FOR_CLINICAL_USE,
    JobIdentity,
    SourceSeries,
    add_contributing_equipment,
    copy_patient_and_study,
    neutral,
    read_source,
    save,
    stamp,
)
from writers.seg import tracking

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from clarion.labels import Labels, Segment
    from clarion.plugins import Workspace

KIND = "sr"
_Code = hd.sr.CodedConcept
_MEASURED_HU = _Code("112031", "DCM", "Attenuation Coefficient")
_HU = _Code("[hnsf'U]", "UCUM", "Hounsfield unit")
_MEAN = _Code("373098007", "SCT", "Mean")
_VOLUME, _ML = _Code("118565006", "SCT", "Volume"), _Code("mL", "UCUM", "milliliter")
_COMMENT = _Code("121106", "DCM", "Comment")
_SIGNIFICANT = 6


class SrWriter:
    """The operator."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `sr.dcm`: a measurement group per segment of the SEG it is given."""
        labels = load_labels(inputs["labels"])
        source = read_source(inputs["payload"], labels.volume)
        seg = dcmread(inputs["dicom"] / "seg.dcm", stop_before_pixels=True)
        measured = json.loads((inputs["measurements"] / "measurements.json").read_text())
        job = JobIdentity.of(workspace.facts)
        report = write_measurement_report(labels, measured, seg=seg, source=source, job=job)
        save(report, workspace.outputs["dicom"], KIND)


def write_measurement_report(
    labels: Labels, measured: list[dict[str, Any]], *, seg: Dataset, source: SourceSeries, job: JobIdentity
) -> Dataset:
    """Build the data set; volume in ml and mean HU per segment."""
    by_segment = {one["segment"]: one for one in measured}
    groups = [
        _group(number, segment, by_segment[segment.number], labels=labels, seg=seg, source=source, job=job)
        for number, segment in enumerate(labels.written(), 1)
    ]
    content = hd.sr.MeasurementReport(
        observation_context=_observer(job),
        procedure_reported=_Code("77477000", "SCT", "Computed tomography"),
        imaging_measurements=groups,
        title=_Code("126000", "DCM", "Imaging Measurement Report"),
    )
    # What the reader had to say of the series concerns every number in the report.
    content[0].ContentSequence.extend(
        hd.sr.TextContentItem(name=_COMMENT, value=line, relationship_type=hd.sr.RelationshipTypeValues.CONTAINS)
        for line in labels.volume.report
    )
    evidence = [*source.headers, seg]
    report = hd.sr.Comprehensive3DSR(
        evidence=[neutral(ds, source.first) for ds in evidence],
        content=content,
        series_instance_uid=job.uid(KIND, "series"),
        series_number=1,
        sop_instance_uid=job.uid(KIND, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_verified=False,
    )
    copy_patient_and_study(source.first, report)
    stamp(report, job, KIND, label="measurements", modality="SR")
    report.CompletionFlagDescription = NOT_FOR_CLINICAL_USE
    add_contributing_equipment(report, source.first, labels)
    return report


def _observer(job: JobIdentity) -> hd.sr.ObservationContext:
    device = hd.sr.ObserverContext(
        observer_type=_Code("121007", "DCM", "Device"),
        observer_identifying_attributes=hd.sr.DeviceObserverIdentifyingAttributes(
            uid=job.uid("device"),
            name=f"{MANUFACTURER} {job.pipeline}",
            manufacturer_name=MANUFACTURER,
            model_name=job.pipeline,
            serial_number=job.pipeline_version,
        ),
    )
    return hd.sr.ObservationContext(observer_device_context=device)


def _group(
    number: int,
    segment: Segment,
    measured: dict[str, Any],
    *,
    labels: Labels,
    seg: Dataset,
    source: SourceSeries,
    job: JobIdentity,
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    identifier, uid = tracking(job, segment)
    measurements = [hd.sr.Measurement(name=_VOLUME, value=_rounded(measured["volume_ml"]), unit=_ML)]
    if measured["mean"] is not None and measured["unit"] == "HU":
        measurements.append(
            hd.sr.Measurement(name=_MEASURED_HU, value=_rounded(measured["mean"]), unit=_HU, derivation=_MEAN)
        )
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=uid, identifier=identifier),
        referenced_segment=hd.sr.ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=hd.sr.SourceSeriesForSegmentation(source.first.SeriesInstanceUID),
        ),
        finding_category=_Code(segment.category.value, segment.category.scheme, segment.category.meaning),
        finding_type=_Code(segment.kind.value, segment.kind.scheme, segment.kind.meaning),
        algorithm_id=hd.sr.AlgorithmIdentification(name=labels.algorithm.name, version=labels.algorithm.version),
        measurements=measurements,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_SIGNIFICANT}g}")
