"""Who a result is: derived UIDs, the job's time, copied patient and study attributes, equipment, references.

Everything is derived from the job, so a second attempt writes the same UIDs and times (writers specification 1.3).
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, Self

from pydicom import Dataset, FileMetaDataset
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.filewriter import correct_ambiguous_vr
from pydicom.uid import UID, ExplicitVRLittleEndian

from clarion.dicom import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, read_headers
from clarion.errors import UnreadableSeriesError
from clarion.model import derive_uid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from clarion.labels import CodedConcept, Labels, Segment
    from clarion.volume import Volume

MANUFACTURER = "Clarion"
NOT_FOR_CLINICAL_USE = "Not for clinical use"
QUALIFICATION = "RESEARCH"
SERIES_BASE = 9000
# Thresholds, components, closing (PS3.16 CID 7162).
ALGORITHM_FAMILY = ("123104", "DCM", "Morphological Operations")
NUMBERS = {"seg": 1, "rtstruct": 2, "sr": 3, "overview": 6}

# Patient, Study, Patient Study and Clinical Trial attributes that results share with their source (PS3.3 C.7.1, C.7.2).
_TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_TYPE_2_STUDY = ("StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
_TYPE_3 = (
    "IssuerOfPatientID",
    "OtherPatientIDsSequence",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "StudyDescription",
    "ProcedureCodeSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "ClinicalTrialSponsorName",
    "ClinicalTrialProtocolID",
    "ClinicalTrialProtocolName",
    "ClinicalTrialSiteID",
    "ClinicalTrialSiteName",
    "ClinicalTrialSubjectID",
    "TimezoneOffsetFromUTC",
)

_DANGLING = ("ReferencedStudySequence", "ReferencedPatientSequence")
_UNDEFINED_LENGTH = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class JobIdentity:
    """What a writer may know of its job: nothing else from the job reaches a result."""

    job_id: str
    requested: datetime
    pipeline: str
    pipeline_version: str

    @classmethod
    def of(cls, facts: Mapping[str, str]) -> Self:
        """Take it from a workspace's facts."""
        return cls(
            job_id=facts["job_id"],
            requested=datetime.fromisoformat(facts["requested"]),
            pipeline=facts["pipeline"],
            pipeline_version=facts["pipeline_version"],
        )

    def uid(self, kind: str, *parts: object) -> str:
        """Derive a UID of this job's."""
        return derive_uid(self.job_id, kind, *parts)

    def tracking_uid(self, segment: Segment) -> str:
        """Derive a segment's tracking UID, the same in every result."""
        return self.uid("tracking", segment.number)

    def moment(self, ds: Dataset) -> tuple[str, str]:
        """Give the job's request as date and time in the zone that the data set is in, else in that of this machine."""
        there = _zone(str(ds.get("TimezoneOffsetFromUTC") or ""))
        local = self.requested.astimezone(there)
        return f"{local:%Y%m%d}", f"{local:%H%M%S.%f}"


def _zone(offset: str) -> timezone | None:
    """Read Timezone Offset From UTC (PS3.3 C.12.1.1.8); None when it is absent or not one."""
    if re.fullmatch(r"[+-](0\d|1[0-4])[0-5]\d", offset) is None:
        return None
    minutes = int(offset[1:3]) * 60 + int(offset[3:])
    return timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes))


@dataclass(frozen=True, slots=True)
class SourceSeries:
    """The headers of the series a result is about, in the order of the volume's slices."""

    headers: tuple[Dataset, ...]

    @property
    def first(self) -> Dataset:
        """The first used slice: what patient and study attributes are copied from."""
        return self.headers[0]


def read_source(payload: Path, volume: Volume) -> SourceSeries:
    """Read the headers of the volume's slices from the payload."""
    by_uid = {str(ds.SOPInstanceUID): ds for _, ds in read_headers(payload)}
    missing = [one.sop_instance_uid for one in volume.sources if one.sop_instance_uid not in by_uid]
    if missing:
        raise UnreadableSeriesError("missing-instance", f"{len(missing)} slices are not in the payload: {missing[0]}")
    headers = tuple(by_uid[one.sop_instance_uid] for one in volume.sources)
    for ds in headers:
        # The reader accepts a series whose de-identification gave each instance a frame of reference of its own.
        ds.FrameOfReferenceUID = volume.geometry.frame_of_reference_uid
    return SourceSeries(headers)


def copy_patient_and_study(source: Dataset, target: Dataset) -> None:
    """Copy what results share with their source; absent type 2 attributes become empty, absent type 3 stay absent."""
    for keyword in (*_TYPE_2, *_TYPE_2_STUDY):
        if keyword in source:
            _copy(source, target, keyword)
        else:
            setattr(target, keyword, None)
    for keyword in _TYPE_3:
        if keyword in source and getattr(source.get_item(keyword), "value", None) not in (None, "", b""):
            _copy(source, target, keyword)
        elif keyword in target:
            delattr(target, keyword)
    for keyword in _DANGLING:
        # highdicom copies them; what they reference is in nobody's hands here.
        if keyword in target:
            delattr(target, keyword)
    target.StudyInstanceUID = source.StudyInstanceUID
    if "SpecificCharacterSet" in source:
        target.SpecificCharacterSet = source.SpecificCharacterSet
    elif "SpecificCharacterSet" in target:
        del target.SpecificCharacterSet


def _copy(source: Dataset, target: Dataset, keyword: str) -> None:
    """Copy an element as its bytes stand in the source, if they have not been decoded: no encoding is tried twice."""
    raw: Any = source.get_item(keyword)
    if not isinstance(raw, RawDataElement) or raw.VR == "SQ" or raw.length == _UNDEFINED_LENGTH:
        target[keyword] = source[keyword]
        return
    vr = raw.VR or dictionary_VR(raw.tag)
    if vr == "SQ" or not raw.is_little_endian:
        target[keyword] = source[keyword]
        return
    value = raw.value or b""
    target[raw.tag] = RawDataElement(raw.tag, vr, len(value), value, 0, is_implicit_VR=False, is_little_endian=True)


def neutral(ds: Dataset, like: Dataset, thickness_mm: float = 1.0) -> Dataset:
    """Give a header as highdicom bears it: type 2 attributes present, no character set that it would not take.

    Its orientation is that of `like`, from which the reader lets the slices of a series differ by 1e-3; a thickness
    that the source does not say is `thickness_mm`. What a result says of patient and study is copied from the source
    afterwards, as its bytes stand there.
    """
    whole = Dataset()
    whole.update(ds)
    if "SpecificCharacterSet" in whole:
        del whole.SpecificCharacterSet
    for keyword in (*_TYPE_2, *_TYPE_2_STUDY):
        setattr(whole, keyword, "")
    if "ImageOrientationPatient" in whole and "ImageOrientationPatient" in like:
        whole.ImageOrientationPatient = like.ImageOrientationPatient
    if not whole.get("SliceThickness"):
        whole.SliceThickness = f"{thickness_mm:.6g}"
    whole.file_meta = ds.file_meta
    return whole


def stamp(ds: Dataset, job: JobIdentity, kind: str, *, label: str, modality: str) -> None:
    """Set a result's identity: UIDs, numbers, times, equipment, description."""
    ds.Modality = modality
    ds.SOPInstanceUID = job.uid(kind, "instance")
    ds.SeriesInstanceUID = job.uid(kind, "series")
    ds.SeriesNumber, ds.InstanceNumber = SERIES_BASE + NUMBERS[kind], 1
    ds.SeriesDescription = f"AI {job.pipeline} {label}"[:64]
    date, time = job.moment(ds)
    ds.InstanceCreationDate = ds.SeriesDate = date
    ds.InstanceCreationTime = ds.SeriesTime = time
    if modality != "RTSTRUCT":
        ds.ContentDate, ds.ContentTime = date, time
    ds.InstanceCreatorUID = IMPLEMENTATION_CLASS_UID
    ds.Manufacturer, ds.ManufacturerModelName = MANUFACTURER, job.pipeline
    ds.DeviceSerialNumber, ds.SoftwareVersions = job.pipeline_version, importlib.metadata.version("clarion-gateway")


def add_contributing_equipment(ds: Dataset, source: Dataset, labels: Labels | None) -> None:
    """Name the scanner and the algorithm that contributed (PS3.3 C.12.1.1.5)."""
    scanner = Dataset()
    scanner.PurposeOfReferenceCodeSequence = [code("109101", "DCM", "Acquisition Equipment")]
    scanner.Manufacturer = str(source.get("Manufacturer") or "unknown")
    for keyword in ("ManufacturerModelName", "SoftwareVersions"):
        if source.get(keyword):
            setattr(scanner, keyword, source.get(keyword))
    items = [scanner]
    if labels is not None:
        algorithm = Dataset()
        algorithm.PurposeOfReferenceCodeSequence = [code("109102", "DCM", "Processing Equipment")]
        algorithm.Manufacturer = labels.algorithm.manufacturer
        algorithm.ManufacturerModelName = labels.algorithm.name
        algorithm.SoftwareVersions = labels.algorithm.version
        items.append(algorithm)
    ds.ContributingEquipmentSequence = items


def code(value: str, scheme: str, meaning: str) -> Dataset:
    """Make a code sequence item (PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def code_of(concept: CodedConcept) -> Dataset:
    """Make a code sequence item of a coded concept."""
    return code(concept.value, concept.scheme, concept.meaning)


def reference(ds: Dataset) -> Dataset:
    """Make an item that references an instance (PS3.3 10.8)."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    return item


def save(ds: Dataset, folder: Path, kind: str, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write a result as `KIND.dcm`."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = UID(syntax)
    ds.file_meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    ds.file_meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    path = folder / f"{kind}.dcm"
    correct_ambiguous_vr(ds, is_little_endian=True)
    # Said to be as it was read, its raw elements are written as they stand instead of decoded and encoded again.
    ds.set_original_encoding(
        is_implicit_vr=ds.file_meta.TransferSyntaxUID.is_implicit_VR,
        is_little_endian=True,
        character_encoding=ds._character_set,  # noqa: SLF001  what the library compares it with
    )
    ds.save_as(path, enforce_file_format=True)
    return path
