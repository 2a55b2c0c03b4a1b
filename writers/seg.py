"""Labels -> Segmentation, BINARY (PS3.3 A.51), built by highdicom; every UID and time replaced by the job's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import highdicom as hd
import numpy as np

from clarion.errors import OperatorError
from clarion.labels import load_labels
from writers.identity import (
    ALGORITHM_FAMILY,
    MANUFACTURER,
    NOT_FOR_CLINICAL_USE,
    QUALIFICATION,
    JobIdentity,
    SourceSeries,
    add_contributing_equipment,
    copy_patient_and_study,
    neutral,
    read_source,
    save,
    stamp,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydicom import Dataset

    from clarion.labels import Labels, Segment
    from clarion.plugins import Workspace

KIND = "seg"


class SegWriter:
    """The operator."""

    def run(self, inputs: Mapping[str, Path], workspace: Workspace) -> None:
        """Write `seg.dcm`; raises OperatorError when no segment has a voxel."""
        labels = load_labels(inputs["labels"])
        source = read_source(inputs["payload"], labels.volume)
        job = JobIdentity.of(workspace.facts)
        save(write_segmentation(labels, source, job), workspace.outputs["dicom"], KIND)


def tracking(job: JobIdentity, segment: Segment) -> tuple[str, str]:
    """Give a segment's tracking identifier and UID, the same in SEG and SR."""
    return f"{job.pipeline} {segment.name}", job.tracking_uid(segment)


def write_segmentation(labels: Labels, source: SourceSeries, job: JobIdentity) -> Dataset:
    """Build the data set; frames in the source's plane, one per segment and non-empty slice."""
    segments = labels.written()
    if not segments:
        raise OperatorError("no segment has a voxel; an empty SEG is not written")
    thickness_mm = float(np.median(labels.volume.geometry.slice_extents_mm))
    headers = [neutral(ds, source.first, thickness_mm) for ds in source.headers]
    masks = np.stack([labels.mask(one) for one in segments], axis=-1)
    seg = hd.seg.Segmentation(
        source_images=headers,
        pixel_array=masks,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_description(number, one, labels, job) for number, one in enumerate(segments, 1)],
        series_instance_uid=job.uid(KIND, "series"),
        series_number=1,
        sop_instance_uid=job.uid(KIND, "instance"),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=job.pipeline,
        software_versions=job.pipeline_version,
        device_serial_number=job.pipeline_version,
        content_label="SEGMENTATION",
        content_description=f"{NOT_FOR_CLINICAL_USE}: {', '.join(one.name for one in segments)}"[:64],
        omit_empty_frames=True,
    )
    copy_patient_and_study(source.first, seg)
    stamp(seg, job, KIND, label="segmentation", modality="SEG")
    seg.ContentQualification = QUALIFICATION
    _note(seg, labels)
    seg.ContentCreatorName = None
    _replace_dimension_uids(seg, job)
    add_contributing_equipment(seg, source.first, labels)
    return seg


def _description(number: int, segment: Segment, labels: Labels, job: JobIdentity) -> hd.seg.SegmentDescription:
    identifier, uid = tracking(job, segment)
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=hd.sr.CodedConcept(
            segment.category.value, segment.category.scheme, segment.category.meaning
        ),
        segmented_property_type=hd.sr.CodedConcept(segment.kind.value, segment.kind.scheme, segment.kind.meaning),
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name=labels.algorithm.name,
            version=labels.algorithm.version,
            family=hd.sr.CodedConcept(*ALGORITHM_FAMILY),
        ),
        tracking_uid=uid,
        tracking_id=identifier,
        display_color=hd.color.CIELabColor.from_rgb(*segment.colour),
    )


def _note(seg: Dataset, labels: Labels) -> None:
    """Say in every frame's derivation what the reader had to say of the series."""
    said = "; ".join(labels.volume.report)[:1024]
    if said:
        for frame in seg.PerFrameFunctionalGroupsSequence:
            frame.DerivationImageSequence[0].DerivationDescription = said


def _replace_dimension_uids(seg: Dataset, job: JobIdentity) -> None:
    ours = job.uid(KIND, "dimension-organization")
    for item in seg.DimensionOrganizationSequence:
        item.DimensionOrganizationUID = ours
    for item in seg.DimensionIndexSequence:
        item.DimensionOrganizationUID = ours
