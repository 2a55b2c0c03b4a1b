"""Scanning by layout: whatever is bent, what it says is what a scan says."""

from __future__ import annotations

import random
import zlib
from io import BytesIO

import pytest
from pydicom import Dataset, dcmwrite
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from clarion.layouts import Layouts
from clarion.scanning import scan

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def encoded(syntax: str, number: int, *, undefined: bool = False) -> bytes:
    item = Dataset()
    item.CodeValue = f"{number:04d}"
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.33", f"1.2.3.{10**7 + number}"
    ds.PatientName, ds.StudyInstanceUID, ds.SeriesInstanceUID = "A^B", "1.2.4", "1.2.5.6"
    ds.ConceptNameCodeSequence = [item]
    ds["ConceptNameCodeSequence"].is_undefined_length = undefined
    ds.add_new(0x00420011, "OB", bytes(64))
    buffer = BytesIO()
    little = syntax != ExplicitVRBigEndian
    dcmwrite(buffer, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=little)
    data = buffer.getvalue()
    return deflated(data) if syntax == DeflatedExplicitVRLittleEndian else data


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("undefined", [False, True])
def test_bent_data_sets_say_what_a_scan_says(syntax: str, *, undefined: bool) -> None:
    layouts, rng = Layouts(), random.Random(7)
    whole = [encoded(syntax, number, undefined=undefined) for number in range(8)]
    for data in whole:
        assert layouts.scan(data, syntax) == scan(data, syntax)
        assert layouts.scan(data, syntax).study_uid == "1.2.4"
    for _ in range(4000):
        bent = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 3)):
            bent[rng.randrange(len(bent))] = rng.choice([0, 1, 2, 8, 255, rng.randrange(256)])
        if rng.random() < 0.1:
            del bent[rng.randrange(len(bent)) :]
        ours, plain = layouts.scan(bytes(bent), syntax), scan(bytes(bent), syntax)
        assert ours._replace(fault=None) == plain._replace(fault=None)
        assert str(ours.fault) == str(plain.fault)


def test_a_layout_is_compared_not_walked(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = Layouts()
    for number in range(2):
        layouts.scan(encoded(ExplicitVRLittleEndian, number), ExplicitVRLittleEndian)

    def walked(*_: object) -> None:
        raise AssertionError("it was walked")

    monkeypatch.setattr("clarion.layouts.scan", walked)
    seen = layouts.scan(encoded(ExplicitVRLittleEndian, 3), ExplicitVRLittleEndian)
    assert (seen.sop_instance_uid, seen.study_uid, seen.series_uid) == ("1.2.3.10000003", "1.2.4", "1.2.5.6")
    assert (seen.sop_class_uid, seen.fault, seen.checked) == ("1.2.840.10008.5.1.4.1.1.88.33", None, True)


def test_what_is_remembered_has_a_bound() -> None:
    layouts = Layouts()
    for size in range(2000):
        ds = Dataset()
        ds.SOPInstanceUID = "1.2"
        ds.add_new(0x00420011, "OB", bytes(2 * size))
        buffer = BytesIO()
        dcmwrite(buffer, ds, implicit_vr=False, little_endian=True)
        for _ in range(3):
            assert layouts.scan(buffer.getvalue(), ExplicitVRLittleEndian).sop_instance_uid == "1.2"
    assert len(layouts._known) <= 512
