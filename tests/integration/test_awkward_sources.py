"""The bundled operators and the gate over series that hospitals send: what belongs to another series, names, zones."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag
from support.results import make_results
from support.world import make_series

from clarion.errors import OperatorError, UnreadableSeriesError
from clarion.testing.phantom import PhantomSpec
from clarion.volume import load_volume
from operators.chest_ct import ChestCtSegmentation
from operators.dicom_reader import DicomReader
from operators.measurements import StructureMeasurements
from writers.gate import ResultGate, check_results
from writers.overview import OverviewWriter
from writers.rtstruct import RtstructWriter
from writers.seg import SegWriter
from writers.sr import SrWriter

DCIODVFY = str(Path(sys.executable).parent / "dciodvfy")
FACTS = {"job_id": "j", "requested": "2026-11-23T22:30:00+00:00", "pipeline": "chest-ct", "pipeline_version": "v1"}


def run(operator: Any, inputs: dict[str, Path], folder: Path, output: str) -> Path:
    folder.mkdir()
    operator.run(inputs, SimpleNamespace(outputs={output: folder}, facts=FACTS, log=lambda _: None))
    return folder


def pipeline(payload: Path, root: Path) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Run what `chest-ct.yaml` names, in the calling process; give the results and what the gate found."""
    reader = DicomReader(DicomReader.Config(modality="CT"))
    volume = run(reader, {"payload": payload}, root / "volume", "volume")
    labels = run(ChestCtSegmentation(), {"volume": volume}, root / "labels", "labels")
    measured = run(StructureMeasurements(), {"volume": volume, "labels": labels}, root / "m", "measurements")
    seg = run(SegWriter(), {"labels": labels, "payload": payload}, root / "seg", "dicom")
    rtstruct = run(RtstructWriter(), {"labels": labels, "payload": payload}, root / "rt", "dicom")
    given = {"measurements": measured, "labels": labels, "dicom": seg, "payload": payload}
    report = run(SrWriter(), given, root / "sr", "dicom")
    overview = run(OverviewWriter(), {"volume": volume, "labels": labels, "payload": payload}, root / "ov", "dicom")
    results = {"seg": seg, "rtstruct": rtstruct, "report": report, "overview": overview}
    seen = {"payload": payload, "segment.labels": labels, **{f"{name}.dicom": path for name, path in results.items()}}
    findings = run(ResultGate(), seen, root / "gate", "findings")
    return results, json.loads((findings / "findings.json").read_text())


def other(source: Path, folder: Path, change: Callable[[Dataset], None]) -> None:
    """Put another instance of another series into the payload."""
    folder.mkdir()
    ds = dcmread(source)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.9"
    ds.SeriesInstanceUID = "1.2.8"
    change(ds)
    ds.save_as(folder / "other.dcm")


def _scout(ds: Dataset) -> None:
    ds.Rows, ds.Columns, ds.PixelData = 128, 64, bytes(128 * 64 * 2)


def _dose_report(ds: Dataset) -> None:
    ds.Modality, ds.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.67"
    for keyword in ("Rows", "Columns", "PixelData", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                    "FrameOfReferenceUID"):  # fmt: skip
        delattr(ds, keyword)


def _no_orientation(ds: Dataset) -> None:
    del ds.ImageOrientationPatient


OTHERS = {"scout": _scout, "dose report": _dose_report, "no orientation": _no_orientation}


@pytest.mark.parametrize("folder", ["a", "z"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_else_a_study_has_does_not_block_its_results(what: str, folder: str, tmp_path: Path) -> None:
    files = make_series(tmp_path / "payload" / "series")
    other(files[0], tmp_path / "payload" / folder, OTHERS[what])
    assert pipeline(tmp_path / "payload", tmp_path)[1] == []


def _set(**values: Any) -> Callable[[Dataset], None]:
    def change(ds: Dataset) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return change


SOURCES: dict[str, Callable[[Dataset], None]] = {
    "western": _set(SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Jörg"),
    "utf-8": _set(SpecificCharacterSet="ISO_IR 192", PatientName="Δοκιμή^Ανδρέας"),
    "japanese": _set(SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName="Yamada^Tarou=山田^太郎"),
    "korean": _set(SpecificCharacterSet=["", "ISO 2022 IR 149"], PatientName="Hong^Gildong=洪^吉洞=홍^길동"),
    "chinese": _set(SpecificCharacterSet="GB18030", PatientName="Wang^XiaoDong=王^小东"),
    "spaces": _set(PatientID="P 1 ", PatientName="A^B^^^", AccessionNumber="", StudyDate=""),
    "none": lambda ds: delattr(ds, "SpecificCharacterSet"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_names_in_any_character_set_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    for path in make_series(tmp_path / "payload"):
        ds = dcmread(path)
        SOURCES[name](ds)
        ds.save_as(path)
    source = dcmread(next((tmp_path / "payload").glob("*.dcm")), stop_before_pixels=True)
    results, findings = pipeline(tmp_path / "payload", tmp_path)
    assert findings == []
    for folder in results.values():
        path = next(folder.glob("*.dcm"))
        ds = dcmread(path)
        assert str(ds.PatientName) == str(source.PatientName)
        assert ds.get("SpecificCharacterSet") == source.get("SpecificCharacterSet")
        done = subprocess.run(
            [DCIODVFY, str(path)], capture_output=True, text=True, timeout=60, check=False, errors="replace"
        )
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == []


@pytest.mark.parametrize(("zone", "date", "time"), [("+0100", "20261123", "233000"), ("-0330", "20261123", "190000"),
                                                    ("+0900", "20261124", "073000")])  # fmt: skip
def test_times_stand_in_the_zone_that_the_result_names(zone: str, date: str, time: str, tmp_path: Path) -> None:
    for path in make_series(tmp_path / "payload"):
        ds = dcmread(path)
        ds.TimezoneOffsetFromUTC = zone
        ds.save_as(path)
    results, findings = pipeline(tmp_path / "payload", tmp_path)
    assert findings == []
    ds = dcmread(results["seg"] / "seg.dcm")
    assert (ds.TimezoneOffsetFromUTC, ds.ContentDate, ds.ContentTime[:6]) == (zone, date, time)


def test_values_beyond_16_bits_are_not_clipped(tmp_path: Path) -> None:
    files = make_series(tmp_path / "payload", PhantomSpec(slices=3, size=16, length_mm=60))
    ds = dcmread(files[1])
    pixels = np.frombuffer(ds.PixelData, dtype=np.int16).copy()
    pixels[0] = 2_000
    ds.PixelData, ds.RescaleSlope = pixels.tobytes(), 20
    ds.save_as(files[1])
    volume = load_volume(run(DicomReader(DicomReader.Config(modality="CT")), {"payload": tmp_path / "payload"},
                             tmp_path / "volume", "volume"))  # fmt: skip
    assert volume.array.max() == 40_000 + float(ds.RescaleIntercept)


def test_what_cannot_be_decoded_is_named_without_its_content(tmp_path: Path) -> None:
    files = make_series(tmp_path / "payload", PhantomSpec(slices=3, size=16, length_mm=60))
    ds = dcmread(files[1])
    changed = copy.deepcopy(ds)
    changed.PixelData = ds.PixelData[:100]
    changed.save_as(files[1])
    with pytest.raises(UnreadableSeriesError, match=r"undecodable: [0-9.]+ \(Explicit VR Little Endian\)"):
        run(DicomReader(DicomReader.Config(modality="CT")), {"payload": tmp_path / "payload"}, tmp_path / "v", "volume")


def test_every_result_says_what_the_reader_said(tmp_path: Path) -> None:
    """A slice is missing: volumes go over the gap, and no result keeps quiet about it (writers specification 1.2)."""
    files = make_series(tmp_path / "payload", PhantomSpec(slices=7, size=64, length_mm=160, seed=5))
    files[3].unlink()
    results, findings = pipeline(tmp_path / "payload", tmp_path)
    assert findings == []
    for name, folder in results.items():
        path = next(folder.glob("*.dcm"))
        texts = [str(one.value) for one in dcmread(path).iterall() if one.VR in {"ST", "LT", "UT", "LO"}]
        assert any("not evenly spaced" in text for text in texts), name
        done = subprocess.run([DCIODVFY, str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == [], name


def test_a_ct_that_is_not_in_hounsfield_units_is_refused(tmp_path: Path) -> None:
    """Bites: call every CT HU, and an iodine map is segmented by thresholds that mean nothing there."""
    for path in make_series(tmp_path / "payload"):
        ds = dcmread(path)
        ds.RescaleType = "MGML"
        ds.save_as(path)
    with pytest.raises(OperatorError, match="MGML"):
        pipeline(tmp_path / "payload", tmp_path)


def test_a_single_slice_has_the_thickness_it_says(tmp_path: Path) -> None:
    files = make_series(tmp_path / "payload", PhantomSpec(slices=3, size=16, length_mm=60))
    for path in files[1:]:
        path.unlink()
    ds = dcmread(files[0])
    ds.SliceThickness = "2.5"
    ds.save_as(files[0])
    volume = load_volume(run(DicomReader(DicomReader.Config(modality="CT")), {"payload": tmp_path / "payload"},
                             tmp_path / "volume", "volume"))  # fmt: skip
    assert volume.geometry.slice_extents_mm.tolist() == [2.5]
    assert any("2.5 mm" in line for line in volume.report)


def _dangling(ds: Dataset) -> None:
    for keyword in ("ReferencedStudySequence", "ReferencedPatientSequence"):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", "1.2.3.4.5"
        setattr(ds, keyword, [item])


def _jitter(ds: Dataset) -> None:
    if int(ds.InstanceNumber) % 2:
        ds.ImageOrientationPatient = [1, 0.000001, 0, 0, 1, 0]


LEGAL: dict[str, Callable[[Dataset], None]] = {
    "references to a study that nobody has": _dangling,
    "thickness is empty": _set(SliceThickness=None),
    "thickness is absent": lambda ds: delattr(ds, "SliceThickness"),
    "orientation differs in the sixth place": _jitter,
}


@pytest.mark.parametrize("name", LEGAL)
def test_legal_sources_give_results_that_pass(name: str, tmp_path: Path) -> None:
    for path in make_series(tmp_path / "payload"):
        ds = dcmread(path)
        LEGAL[name](ds)
        ds.save_as(path)
    results, findings = pipeline(tmp_path / "payload", tmp_path)
    assert findings == []
    for folder in results.values():
        path = next(folder.glob("*.dcm"))
        done = subprocess.run([DCIODVFY, str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")] == [], path.name


RAW_NAMES = {
    "Latin-1 bytes declared as UTF-8": ("ISO_IR 192", "Müller^Jörg".encode("latin-1")),
    "GB2312 with an empty third part": ("\\ISO 2022 IR 58", b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab="),
    "Greek by escape": ("\\ISO 2022 IR 126", b"\x1b-F\xc4\xe9\xef^\x1b-F\xed\xf5\xf3"),
}


@pytest.mark.parametrize("name", RAW_NAMES)
def test_the_bytes_of_a_name_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    """Bites: decode and encode again what is copied, and the gate blocks results of good sources."""
    charset, raw = RAW_NAMES[name]
    raw += b" " * (len(raw) % 2)
    for path in make_series(tmp_path / "payload"):
        ds = dcmread(path)
        ds.SpecificCharacterSet = charset.split("\\")
        tag = Tag(0x00100010)
        ds[tag] = RawDataElement(tag, "PN", len(raw), raw, 0, is_implicit_VR=False, is_little_endian=True)
        ds.set_original_encoding(is_implicit_vr=False, is_little_endian=True, character_encoding=ds._character_set)
        ds.save_as(path)
        assert raw in path.read_bytes()
    results, findings = pipeline(tmp_path / "payload", tmp_path)
    assert findings == []
    for folder in results.values():
        assert raw.rstrip(b" ") in next(folder.glob("*.dcm")).read_bytes()


def test_the_gate_bears_a_payload_it_cannot_place_when_there_are_no_labels(tmp_path: Path) -> None:
    """A pipeline of a stranger's without labels: what the gate cannot read is a finding, never a crash."""
    made = make_results(tmp_path)
    made.findings()
    odd = copy.deepcopy(made.source[0])
    odd.ImagePositionPatient = None
    del made.source[1].ImageOrientationPatient
    files = [(name, made.folder / f"{name}.dcm") for name in made.objects]
    assert isinstance(check_results(files, [odd, *made.source], None, made.job), list)
