"""The result gate: what the writers make passes; every mutant is blocked by the rule that is meant to see it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest
from pydicom import Dataset
from pydicom.uid import generate_uid
from support.results import Made, make_results

from writers.identity import save

Mutation = Callable[[Dataset], None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_results(tmp_path_factory.mktemp("gate"))


def test_what_the_writers_make_passes(made: Made) -> None:
    assert made.findings() == []


def test_a_set_without_results_is_blocked(made: Made) -> None:
    assert [one.rule for one in made.check([])] == ["G08"]


def _set(keyword: str, value: object) -> Mutation:
    return lambda ds: setattr(ds, keyword, value)


def _drop(keyword: str) -> Mutation:
    return lambda ds: delattr(ds, keyword)


def _private(ds: Dataset) -> None:
    ds.private_block(0x0009, "ACME", create=True).add_new(1, "LO", "x")


# Every result of every kind must be stopped by these.
COMMON: dict[str, tuple[str, Mutation]] = {
    "other study": ("G04", _set("StudyInstanceUID", "1.2.3")),
    "other patient": ("G04", _set("PatientID", "SOMEBODY")),
    "other name": ("G04", _set("PatientName", "Some^Body")),
    "other birth date": ("G04", _set("PatientBirthDate", "19010101")),
    "other accession": ("G04", _set("AccessionNumber", "X1")),
    "no series": ("G02", _drop("SeriesInstanceUID")),
    "empty manufacturer": ("G02", _set("Manufacturer", "")),
    "no patient name": ("G02", _drop("PatientName")),
    "no serial number": ("G02", _drop("DeviceSerialNumber")),
    "private element": ("G16", _private),
    "random UID": ("G05", lambda ds: setattr(ds, "SOPInstanceUID", generate_uid())),
    "UID of nobody's": ("G05", _set("SOPInstanceUID", "2.25.1")),
    "series of nobody's": ("G05", _set("SeriesInstanceUID", "2.25.1")),
}


@pytest.mark.parametrize("name", ["seg", "rtstruct", "sr", "overview"])
@pytest.mark.parametrize("mutant", COMMON)
def test_common_mutants_are_blocked(made: Made, name: str, mutant: str) -> None:
    rule, mutate = COMMON[mutant]
    ds = copy.deepcopy(made.objects[name])
    mutate(ds)
    assert f"{rule} {name}" in made.findings(**{name: ds})


def _other_frame_of_reference(ds: Dataset) -> None:
    ds.FrameOfReferenceUID = "1.2.3"


def _flip_voxel(ds: Dataset) -> None:
    """Move one voxel of a frame: the counts stay what they were."""
    bits = np.unpackbits(np.frombuffer(ds.PixelData, dtype=np.uint8), bitorder="little")
    on, off = int(np.flatnonzero(bits)[0]), int(np.flatnonzero(bits == 0)[0])
    bits[[on, off]] = bits[[off, on]]
    ds.PixelData = np.packbits(bits, bitorder="little").tobytes()


def _empty_frame(ds: Dataset) -> None:
    size = ds.Rows * ds.Columns // 8
    ds.PixelData = bytes(size) + ds.PixelData[size:]


def _swap_frames(ds: Dataset) -> None:
    items = ds.PerFrameFunctionalGroupsSequence
    items[0].PlanePositionSequence, items[1].PlanePositionSequence = (
        items[1].PlanePositionSequence, items[0].PlanePositionSequence,
    )  # fmt: skip


def _swap_segments(ds: Dataset) -> None:
    one, two = ds.SegmentSequence[0], ds.SegmentSequence[1]
    one.SegmentNumber, two.SegmentNumber = two.SegmentNumber, one.SegmentNumber


def _drop_frame(ds: Dataset) -> None:
    ds.PixelData = ds.PixelData[: -(ds.Rows * ds.Columns // 8)]
    ds.NumberOfFrames -= 1
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:-1]


def _cite_stranger(ds: Dataset) -> None:
    cited = ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    cited.ReferencedSOPInstanceUID = "1.2.3.4"


def _cite_as_mr(ds: Dataset) -> None:
    cited = ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    cited.ReferencedSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"


def _turn(ds: Dataset) -> None:
    shared = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0]
    shared.ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def _stretch(ds: Dataset) -> None:
    shared = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    shared.PixelSpacing = [float(one) * 1.1 for one in shared.PixelSpacing]


SEG: dict[str, tuple[str, Mutation]] = {
    "frame of reference": ("G04", _other_frame_of_reference),
    "a voxel moved": ("G10", _flip_voxel),
    "an empty frame": ("G08", _empty_frame),
    "two planes swapped": ("G07", _swap_frames),
    "segment numbers swapped": ("G09", _swap_segments),
    "a frame dropped": ("G10", _drop_frame),
    "a frame too many": ("G08", lambda ds: setattr(ds, "NumberOfFrames", ds.NumberOfFrames + 1)),
    "pixels cut": ("G08", lambda ds: setattr(ds, "PixelData", ds.PixelData[:-2])),
    "rows": ("G07", _set("Rows", 47)),
    "a slice nobody sent": ("G06", _cite_stranger),
    **{
        f"no {keyword}": ("G02", _drop(keyword))
        for keyword in (
            *("SegmentSequence", "SegmentationType", "ContentLabel", "DimensionIndexSequence", "ContentDate"),
            *("DimensionOrganizationSequence", "SharedFunctionalGroupsSequence", "LossyImageCompression", "PixelData"),
        )
    },
    "no frame of reference": ("G04", _drop("FrameOfReferenceUID")),
    "no tracking UID": ("G02", lambda ds: delattr(ds.SegmentSequence[0], "TrackingUID")),
    "another tracking UID": ("G09", lambda ds: setattr(ds.SegmentSequence[0], "TrackingUID", "2.25.9")),
    "another label": ("G09", lambda ds: setattr(ds.SegmentSequence[1], "SegmentLabel", "Right lung")),
    "another class cited": ("G06", _cite_as_mr),
    "turned": ("G07", _turn),
    "stretched": ("G07", _stretch),
    "fractional": ("G08", _set("SegmentationType", "FRACTIONAL")),
    "not marked": ("G16", _set("ContentDescription", "all good")),
}


def _contour(ds: Dataset) -> Dataset:
    item: Dataset = ds.ROIContourSequence[1].ContourSequence[0]
    return item


def _out_of_plane(ds: Dataset) -> None:
    data = [str(one) for one in _contour(ds).ContourData]
    data[2] = "999.5"
    _contour(ds).ContourData = data


def _two_points(ds: Dataset) -> None:
    _contour(ds).ContourData = _contour(ds).ContourData[:6]
    _contour(ds).NumberOfContourPoints = 2


def _move_in_plane(ds: Dataset) -> None:
    data = [str(one) for one in _contour(ds).ContourData]
    data[::3] = [f"{float(one) + 20:.3f}" for one in data[::3]]
    _contour(ds).ContourData = data


def _swap_rois(ds: Dataset) -> None:
    one, two = ds.ROIContourSequence[1], ds.ROIContourSequence[2]
    one.ReferencedROINumber, two.ReferencedROINumber = two.ReferencedROINumber, one.ReferencedROINumber


RTSTRUCT: dict[str, tuple[str, Mutation]] = {
    "out of plane": ("G11", _out_of_plane),
    "two points": ("G11", _two_points),
    "count": ("G11", lambda ds: setattr(_contour(ds), "NumberOfContourPoints", 3)),
    "approved": ("G11", _set("ApprovalStatus", "APPROVED")),
    "one name twice": ("G11", lambda ds: setattr(ds.StructureSetROISequence[1], "ROIName", "Body")),
    "moved in plane": ("G12", _move_in_plane),
    "a contour dropped": ("G12", lambda ds: ds.ROIContourSequence[1].ContourSequence.pop(0)),
    "another ROI": ("G12", lambda ds: setattr(ds.StructureSetROISequence[1], "ROIName", "Spleen")),
    "two ROIs swapped": ("G12", _swap_rois),
    "no frame of reference": ("G04", _drop("FrameOfReferenceUID")),
    "another frame of reference": ("G04", _other_frame_of_reference),
    "an ROI elsewhere": (
        "G04",
        lambda ds: setattr(ds.StructureSetROISequence[0], "ReferencedFrameOfReferenceUID", "1.2.3"),
    ),
    "a frame elsewhere": (
        "G04",
        lambda ds: setattr(ds.ReferencedFrameOfReferenceSequence[0], "FrameOfReferenceUID", "1.2.3"),
    ),
    "open": ("G11", lambda ds: setattr(_contour(ds), "ContourGeometricType", "OPEN_PLANAR")),
    "no observations": ("G02", _drop("RTROIObservationsSequence")),
    "no label": ("G02", _drop("StructureSetLabel")),
    "no contours": ("G11", lambda ds: setattr(ds, "ROIContourSequence", [])),
    "a slice nobody sent": (
        "G06",
        lambda ds: setattr(_contour(ds).ContourImageSequence[0], "ReferencedSOPInstanceUID", "1.2.3.4"),
    ),
}


def _not_finite(ds: Dataset) -> None:
    for one in ds.iterall():
        if one.keyword == "MeasuredValueSequence" and one.value:
            one.value[0]["NumericValue"].value = None
            return


def _numbers(ds: Dataset) -> list[Dataset]:
    return [one.value[0] for one in ds.iterall() if one.keyword == "MeasuredValueSequence" and one.value]


def _wrong_volumes(ds: Dataset) -> None:
    for one in _numbers(ds):
        one.NumericValue = "99999"


def _slightly_wrong_volume(ds: Dataset) -> None:
    first = _numbers(ds)[0]
    first.NumericValue = f"{float(first.NumericValue) * 1.01:.6g}"


def _forget_evidence(ds: Dataset) -> None:
    for series in ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence:
        series.ReferencedSOPSequence = [
            one for one in series.ReferencedSOPSequence if one.ReferencedSOPClassUID != "1.2.840.10008.5.1.4.1.1.66.4"
        ] or series.ReferencedSOPSequence[:0]


def _other_tracking(ds: Dataset) -> None:
    for one in ds.iterall():
        if one.keyword == "UID" and str(one.value).startswith("2.25."):
            one.value = "2.25.9"


SR: dict[str, tuple[str, Mutation]] = {
    "volumes": ("G14", _wrong_volumes),
    "one volume by one per cent": ("G14", _slightly_wrong_volume),
    "evidence without the SEG": ("G06", _forget_evidence),
    "no evidence": ("G02", _drop("CurrentRequestedProcedureEvidenceSequence")),
    "other tracking UIDs": ("G14", _other_tracking),
    "no title": ("G02", _drop("ConceptNameCodeSequence")),
    "no verification flag": ("G02", _drop("VerificationFlag")),
    "partial": ("G13", _set("CompletionFlag", "PARTIAL")),
    "no content": ("G13", lambda ds: setattr(ds, "ContentSequence", [])),
    "a value without a number": ("G13", _not_finite),
}

OVERVIEW: dict[str, tuple[str, Mutation]] = {
    f"no {keyword}": ("G02", _drop(keyword))
    for keyword in ("PixelData", "Rows", "BitsStored", "ConversionType", "PhotometricInterpretation")
}

KINDS = {"seg": SEG, "rtstruct": RTSTRUCT, "sr": SR, "overview": OVERVIEW}


@pytest.mark.parametrize(
    ("name", "mutant", "rule", "mutate"),
    [(kind, text, *one) for kind, all_ in KINDS.items() for text, one in all_.items()],
)
def test_mutants_of_a_kind_are_blocked(made: Made, name: str, mutant: str, rule: str, mutate: Mutation) -> None:
    ds = copy.deepcopy(made.objects[name])
    mutate(ds)
    assert f"{rule} {name}" in made.findings(**{name: ds}), mutant


@pytest.mark.parametrize("name", ["seg", "rtstruct", "sr", "overview"])
def test_no_cut_or_bent_file_passes_or_raises(made: Made, name: str) -> None:
    """Whatever is done to the bytes: a finding, never an exception that leaves the reason in a stack trace."""
    made.findings()
    path = made.folder / f"{name}.dcm"
    whole = path.read_bytes()
    others = [(one, made.folder / f"{one}.dcm") for one in made.objects if one != name]
    rng = np.random.default_rng(1)
    header = whole[:4000]
    for attempt in range(40):
        bent = bytearray(whole[: int(rng.integers(132, len(whole)))] if attempt % 2 else whole)
        if attempt % 2 == 0:
            # A tag or a VR of the header: every byte of it matters.
            place = header.find(b"\x20\x00\x0d\x00", 132) + int(rng.integers(0, 4))
            bent[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(bent))
        assert made.check([*others, (name, path)]), f"attempt {attempt}"
    path.write_bytes(whole)


def test_segment_names_of_any_script_are_compared_as_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bites: compare Latin-1 readings, and a name with an umlaut under UTF-8 is blocked."""
    made = make_results(tmp_path_factory.mktemp("names"), names={"Body": "Körper", "Left lung": "Λεφτ"})
    assert made.findings() == []


def test_two_objects_of_one_uid_are_blocked(made: Made) -> None:
    made.findings()
    twice = [("seg", made.folder / "seg.dcm"), ("again", made.folder / "seg.dcm")]
    assert "G05" in {one.rule for one in made.check(twice)}


def test_findings_are_plain_text(made: Made) -> None:
    """A finding goes into events and logs: it never carries the patient."""
    ds = copy.deepcopy(made.objects["seg"])
    ds.PatientName = "Secret^Person"
    save(ds, made.folder, "seg")
    found = made.check([("seg", made.folder / "seg.dcm")])
    assert found
    assert "Secret" not in json.dumps([one.detail for one in found])
